"""Search: the settings of a method that a scorer likes best on validation prompts (Optuna)."""
