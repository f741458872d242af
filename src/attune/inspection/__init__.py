"""A look at the data before any training: what `prepare` would keep, and what a training could learn from it."""
