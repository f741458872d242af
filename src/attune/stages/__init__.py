"""The DVC stages: thin entry points."""
