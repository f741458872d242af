"""What autograd keeps of a forward pass for the backward pass, at full size: counted, and nothing is computed.

    PYTHONPATH=src python benchmarks/saved_activations.py sd15 sdxl sd35m

Networks in the released shapes with a LoRA on their attention are called on tensors that have shapes and no memory
(torch's fake tensors), in bfloat16, at two sizes. Bytes grow in a straight line with the latents of an image: its slope
is what a latent costs, and what is left at no latents is the prompt's, told in latents too. Weights are left out, and
each storage is counted once. Working memory comes on top: docs/full_size.md.
"""

from __future__ import annotations

import argparse
import json
import sys

import shapes
import torch
from shapes import BACKBONES, RANK, TRANSFORMERS, made
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from attune.config import plugins
from attune.diffusion.lora import add_lora, target_modules

SIZES = (512, 1024)  # pixels
TOKENS = {"sd15": 77, "sdxl": 77, "sd35m": 77 + 256}


def network(base: str, checkpointing: bool) -> nn.Module:
    """A denoiser with an adapter, to be called within a `FakeTensorMode`."""
    denoiser = made(lambda: shapes.denoiser(base), torch.bfloat16)
    names = target_modules(denoiser, "attention", lora_targets(base))
    move, nn.Module.to = (
        nn.Module.to,
        lambda self, *args, **options: self,
    )  # fake tensors cannot be moved in their place
    try:
        add_lora(denoiser, dict.fromkeys(names, RANK[base]))
    finally:
        nn.Module.to = move
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser.train()


def lora_targets(base: str) -> tuple[str, ...]:
    module = plugins.load("backbones", BACKBONES[base])
    return next(kind.lora_targets for kind in vars(module).values() if hasattr(kind, "lora_targets"))


def saved(base: str, pixels: int, checkpointing: bool) -> int:
    """Bytes that are kept of an image of so many pixels, squared."""
    with FakeTensorMode():
        denoiser = network(base, checkpointing)
        weights = {weight.untyped_storage()._cdata for weight in [*denoiser.parameters(), *denoiser.buffers()]}
        kept: dict[int, Tensor] = {}  # held, so that no storage's address is used twice

        def keep(tensor: Tensor) -> Tensor:
            if (place := tensor.untyped_storage()._cdata) not in weights:
                kept[place] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = call(denoiser, base, pixels // 8).float().square().mean()
        assert loss.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def call(denoiser: nn.Module, base: str, side: int) -> Tensor:
    """The output for one image of side x side latents."""
    config, half = denoiser.config, {"dtype": torch.bfloat16}
    x = torch.randn(1, config["in_channels"], side, side, **half)
    if base in TRANSFORMERS:
        text = torch.randn(1, TOKENS[base], config["joint_attention_dim"], **half)
        pooled = torch.randn(1, config["pooled_projection_dim"], **half)
        return denoiser(x, timestep=torch.rand(1), encoder_hidden_states=text, pooled_projections=pooled).sample
    text = torch.randn(1, TOKENS[base], config["cross_attention_dim"], **half)
    added = {"text_embeds": torch.randn(1, 1280, **half), "time_ids": torch.randn(1, 6)}
    return denoiser(x, torch.zeros(1, dtype=torch.long), text, added_cond_kwargs=added).sample


def counted(base: str, checkpointing: bool) -> dict[str, float]:
    """Bytes per latent, and the latents that a prompt counts as."""
    small, large = (saved(base, pixels, checkpointing) for pixels in SIZES)
    latents = [(pixels // 8) ** 2 for pixels in SIZES]
    slope = (large - small) / (latents[1] - latents[0])
    return {"bytes_per_latent": round(slope), "prompt_in_latents": round(small / slope - latents[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="+", choices=TOKENS)
    for base in parser.parse_args().bases:
        for checkpointing in (False, True):
            found = {"base": base, "checkpointing": checkpointing, **counted(base, checkpointing)}
            sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
