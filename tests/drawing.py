"""Images drawn by policies and by diffusers from the same noise, and the weights behind them."""

import torch

from attune.diffusion.ddim import sample

START = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6))


def drawn(policy):
    """An image, as the evaluation draws it."""
    cond = policy.backbone.encode_prompts(["a cat"])
    with torch.no_grad():
        return policy.backbone.decode_latents(sample(policy, cond, lambda shape: START, 4, 0.0, 3.0))


def drawn_by(pipeline):
    options = {"latents": START, "num_inference_steps": 4, "guidance_scale": 3.0, "eta": 0.0}
    return pipeline("a cat", output_type="pt", **options).images


def same_weights(policy, other):
    state, again = policy.denoiser.state_dict(), other.denoiser.state_dict()
    return state.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in state.items())
