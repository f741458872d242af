"""The embedded world: a prompt grammar, a renderer and a ground-truth oracle (numpy only)."""
