"""Tuning methods: one paper, one file."""
