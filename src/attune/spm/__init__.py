"""The step-aware preference model (SPM): a CLIP that scores one-step predictions, conditioned on their timestep."""
