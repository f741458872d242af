"""Peak memory of a DPO step with a LoRA: attune, and a plain loop in the order of diffusers' `train_diffusion_dpo.py`.

    PYTHONPATH=src python benchmarks/dpo_memory.py --resolution 512

Both read the same random weights in SD 1.5's shapes, in bfloat16, hold the same adapter and see the same pair. Their
losses and gradients are compared first, in float32 at 64 px; then each trains two steps in a process of its own. The
loop holds its UNet alone: diffusers' script also keeps autoencoder and text encoder (0.4 GB), because it encodes as it
trains. On a CPU the peak is that of the whole process, libraries (0.6 GiB) and reading of the weights included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from plain import RANK, adamw_step, add_lora, frozen_unet, trained_weights
from shapes import scheduler, write_pipeline
from torch import Tensor, nn

from attune.build import device, load_policy
from attune.config.settings import Model
from attune.diffusion.noised import NoisedBatch
from attune.diffusion.policy import Policy
from attune.distributed import Part
from attune.interfaces import Conditioning
from attune.methods import dpo
from attune.training.step import TrainStep

BETA = 5000.0  # diffusers' beta; attune's has a factor of 2
Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Latents (2n, C, h, w) of n pairs, noise (n, C, h, w), t (n,), prompt embeddings (n, L, D)."""


def batch(side: int, where: torch.device) -> Batch:
    """One pair of latents of side x side, the preferred one first."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, side, side), (1, 4, side, side), (1, 77, 768))
    latents, noise, embeds = (torch.randn(shape, generator=generator).to(where) for shape in shapes)
    return latents, noise, torch.tensor([500], device=where), embeds


def plain_loss(
    unet: UNet2DConditionModel,
    alphas: Tensor,
    batch: Batch,
    dtype: torch.dtype,
    beta: float = BETA,
    reference: nn.Module | None = None,
) -> Tensor:
    """The loss of diffusers' script, under autocast as accelerate sets it up.

    Args:
        reference: another network, as the authors of DPO have one; None: the UNet without its adapter, as diffusers.
    """
    latents, noise, t, embeds = batch
    noise, t, embeds = noise.repeat(2, 1, 1, 1), t.repeat(2), embeds.repeat(2, 1, 1).to(dtype)
    a_t = alphas[t][:, None, None, None]
    noisy = (a_t.sqrt() * latents + (1 - a_t).sqrt() * noise).to(dtype)

    def error(network: nn.Module) -> Tensor:
        with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
            predicted = network(noisy, t, embeds).sample
        return F.mse_loss(predicted.float(), noise.float(), reduction="none").mean([1, 2, 3])

    model_w, model_l = error(unet).chunk(2)
    if reference is None:
        unet.disable_adapters()
    with torch.no_grad():
        reference_w, reference_l = error(unet if reference is None else reference).chunk(2)
    if reference is None:
        unet.enable_adapters()
    return -F.logsigmoid(beta * ((reference_w - reference_l) - (model_w - model_l))).mean()


def attune_policy(folder: Path, dtype: str) -> Policy:
    """As `load_learner` and a training without validation set it up."""
    policy = load_policy(Model(backbone="sd", path=str(folder), dtype=dtype))
    policy.add_adapter(RANK, seed=0)
    policy.backbone.release()
    return policy


def attune_method(policy: Policy) -> dpo.Method:
    settings = {"lora": None, "lr": 1e-5, "weight_decay": 1e-2, "accumulation": 1, "gradient_checkpointing": False}
    return dpo.Method(dpo.Config(**settings, beta=2 * BETA), policy)


def noised(batch: Batch) -> NoisedBatch:
    latents, noise, t, embeds = batch
    return NoisedBatch.pairs(latents[:1], latents[1:], t, noise, Conditioning({"prompt_embeds": embeds}))


def train(which: str, folder: Path, resolution: int, dtype: str) -> dict[str, float | str]:
    """Two steps of one side: losses, seconds of the second, and GiB at the peak."""
    where, pair, computes = device(), batch(resolution // 8, device()), getattr(torch, dtype)
    if which == "diffusers":
        unet = add_lora(frozen_unet(folder, computes, where))
        alphas = scheduler().alphas_cumprod.to(where)
        step = adamw_step(trained_weights(unet), lambda: plain_loss(unet, alphas, pair, computes), 1e-5, 1e-2, 1.0)
    else:
        method = attune_method(attune_policy(folder, dtype))
        train_step, minibatch = TrainStep(method.policy, method.config), Part(noised(pair), 1)
        step = lambda: train_step(method, [minibatch], 1, 1e-5)["loss"]  # noqa: E731
    first = step()
    started = time.perf_counter()
    second = step()
    seconds = time.perf_counter() - started
    cuda = where.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"losses": f"{first:.6f}, {second:.6f}", "step_s": round(seconds, 2), "peak_GiB": round(peak / 2**30, 2)}
    return {"which": which, "resolution": resolution, "dtype": dtype, **found}


def compare(folder: Path) -> dict[str, float]:
    """Relative differences of loss and gradient in float32 at 64 px, with an adapter that has moved.

    Raises:
        AssertionError: they are not the same.
    """
    where, pair = device(), batch(8, device())
    unet = add_lora(frozen_unet(folder, torch.float32, where))
    policy = attune_policy(folder, "float32")
    trained = trained_weights(unet)
    generator = torch.Generator().manual_seed(1)
    for ours, theirs in zip(policy.parameters(), trained, strict=True):
        theirs.data.copy_(0.02 * torch.randn(theirs.shape, generator=generator))
        ours.data.copy_(theirs.data)
    losses = (
        plain_loss(unet, scheduler().alphas_cumprod.to(where), pair, torch.float32),
        attune_method(policy).loss(noised(pair))[0],
    )
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
        for loss, weights in zip(losses, (trained, policy.parameters()), strict=True)
    ]
    pairs = {"loss": losses, "gradient": gradients}
    found = {name: float(((a - b).norm() / a.norm()).detach()) for name, (a, b) in pairs.items()}
    assert found["loss"] < 1e-4, found
    assert found["gradient"] < 1e-3, found
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=512, help="pixels")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--small", action="store_true", help="a small model instead of SD 1.5")
    parser.add_argument("--side", choices=["compare", "diffusers", "attune"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "compare":
        sys.stdout.write(json.dumps({"equal": compare(args.folder)}) + "\n")
    elif args.side:
        sys.stdout.write(json.dumps(train(args.side, args.folder, args.resolution, args.dtype)) + "\n")
    else:
        with tempfile.TemporaryDirectory(prefix="dpo-memory-") as folder:
            write_pipeline("sd15", Path(folder), getattr(torch, args.dtype), args.small)
            for side in ("compare", "diffusers", "attune"):  # each in a process: a peak of memory is never given back
                words = [*sys.argv[1:], "--side", side, "--folder", folder]
                subprocess.run([sys.executable, __file__, *words], check=True)


if __name__ == "__main__":
    main()
