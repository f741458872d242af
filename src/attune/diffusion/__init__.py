"""What every method stands on: the diffusion process, losses, the policy, samplers."""
