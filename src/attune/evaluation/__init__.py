"""Evaluation that can be trusted: one protocol, paired statistics, signs of reward hacking, one report."""
