"""Scorers: one file each, exporting `Config` and `load(config, device) -> Scorer`, a `Reward`."""
