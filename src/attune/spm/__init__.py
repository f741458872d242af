"""The step-aware preference model (SPM): a CLIP that judges one-step predictions and knows their timestep."""
