"""Settings: what may be decided, read and checked before any work; nothing here imports torch."""
