"""What a DPO step with a LoRA needs on Z-Image besides weights: counted in blocks of the released widths.

    PYTHONPATH=src python benchmarks/z_image_memory.py --resolution 512

All 34 blocks do not fit most machines in memory, but they are alike: what autograd keeps for the backward pass is
counted by its hooks with one main block and with two, and the difference is multiplied. Then a step is trained with few
blocks in a process of its own, whose peak tells what working memory comes on top. Weights are random, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from shapes import made
from torch import Tensor

from attune.backbones._flow import sampling_sigmas
from attune.backbones._memory import ModelOffload
from attune.backbones.z_image import ZImage
from attune.config.settings import Model
from attune.diffusion.noised import NoisedBatch
from attune.diffusion.path import Flow, logit_normal
from attune.diffusion.policy import Policy
from attune.distributed import Part
from attune.interfaces import Conditioning
from attune.methods import dpo
from attune.training.step import TrainStep

BLOCKS, REFINERS, WIDTH, TOKENS, RANK = 30, 2, 3840, 64, 32
CPU = torch.device("cpu")


class FewBlocks(ZImage):
    """Z-Image without encoder and autoencoder, of some main blocks and one refiner each of image and prompt."""

    def __init__(self, blocks: int, resolution: int):
        self.model = Model(backbone="z_image", path=".", dtype="bfloat16", resolution=resolution)
        self.device, self.dtype, self.offload = CPU, torch.bfloat16, ModelOffload(CPU, offload=False)
        self.path = Flow(partial(sampling_sigmas, {"shift": 6.0}, mu=0.0), logit_normal(6.0))
        shape: dict[str, Any] = {"n_layers": blocks, "n_refiner_layers": 1, "axes_lens": [1536, 512, 512]}
        self.denoiser = made(lambda: ZImageTransformer2DModel(**shape), self.dtype)
        self.resolution, self.latent_shape = resolution, (16, resolution // 8, resolution // 8)

    def release(self) -> None:
        """Nothing is read anew, so nothing is let go."""

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        own = torch.ones(len(prompts), TOKENS, dtype=torch.bool)
        return Conditioning({"prompt_embeds": torch.randn(*own.shape, 2560), "prompt_mask": own})


def dpo_of_a_pair(blocks: int, resolution: int, checkpointing: bool) -> tuple[dpo.Method, NoisedBatch]:
    backbone = FewBlocks(blocks, resolution)
    policy = Policy(backbone, backbone.encode_prompts([""]))
    policy.add_adapter(RANK, seed=0)
    method = dpo.Method(dpo.Config(lora={"rank": RANK}, gradient_checkpointing=checkpointing), policy)
    latents, noise = torch.randn(2, *backbone.latent_shape), torch.randn(1, *backbone.latent_shape)
    cond = backbone.encode_prompts(["a prompt"])
    return method, NoisedBatch.pairs(latents[:1], latents[1:], torch.tensor([500.0]), noise, cond)


def saved(blocks: int, resolution: int) -> int:
    """Bytes that autograd keeps of a pair's forward pass, weights left out, each storage once."""
    method, pair = dpo_of_a_pair(blocks, resolution, checkpointing=False)
    weights = {weight.untyped_storage().data_ptr() for weight in method.policy.denoiser.parameters()}
    kept: dict[int, Tensor] = {}  # held, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = method.loss(pair)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def counted(resolution: int) -> dict[str, int]:
    """Bytes that a pair's forward pass keeps of a block and of all, with checkpointing too, and per latent."""
    one, two = (saved(blocks, resolution) for blocks in (1, 2))
    latents = 2 * ((resolution // 8) ** 2 + 4 * TOKENS)  # a token of a prompt counts as the four of a patch
    inputs = 2 * ((resolution // 16) ** 2 + TOKENS) * WIDTH * 2  # of a main block, both images, 2 bytes
    of_all = one + (BLOCKS - 1 + REFINERS - 1) * (two - one)  # refiners of prompts, which are short, count as none
    found = {"a block": two - one, "plain": of_all, "checkpointed": (BLOCKS + REFINERS) * inputs + two - one}
    return found | {f"{name}, per latent": round(found[name] / latents) for name in ("plain", "checkpointed")}


def step(blocks: int, resolution: int, checkpointing: bool) -> dict[str, float]:
    """Two steps: seconds of the second, bytes of the weights, and bytes of the process at its peak."""
    method, pair = dpo_of_a_pair(blocks, resolution, checkpointing)
    weights = sum(weight.numel() * weight.element_size() for weight in method.policy.denoiser.parameters())
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train = TrainStep(method.policy, method.config)
    train(method, [Part(pair, 1)], 1, 1e-5)
    started = time.perf_counter()
    train(method, [Part(pair, 1)], 1, 1e-5)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": time.perf_counter() - started, "weights": weights, "before": before, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=512, help="pixels")
    parser.add_argument("--blocks", type=int, default=3, help="main blocks of the step that is trained")
    parser.add_argument("--part", choices=["counted", "plain", "checkpointed"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "counted":
        sys.stdout.write(json.dumps({args.part: counted(args.resolution)}) + "\n")
    elif args.part:
        found = step(args.blocks, args.resolution, args.part == "checkpointed")
        sys.stdout.write(json.dumps({args.part: found}) + "\n")
    else:
        for part in ("counted", "plain", "checkpointed"):  # each in a process: a peak of memory is never given back
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], check=True)


if __name__ == "__main__":
    main()
