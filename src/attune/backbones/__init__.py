"""Base models: one file per architecture."""
