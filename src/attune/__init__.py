"""attune: tune text-to-image diffusion models to human taste, and prove it."""
