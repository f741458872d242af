"""Data sources, prepared files and typed batches."""
