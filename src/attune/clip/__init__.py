"""CLIP as all scorers use it."""
