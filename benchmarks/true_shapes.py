"""What one training step costs at full size: seconds and peak memory, with random weights in the released shapes.

    PYTHONPATH=src python benchmarks/true_shapes.py sd15-dpo sd15-spo sdxl-dpo --dtype bfloat16 --steps 3
    PYTHONPATH=src python benchmarks/true_shapes.py sdxl-dpo --resolution 256 --checkpointing
    PYTHONPATH=src python benchmarks/true_shapes.py sd35m-dpo --resolution 512

Each case runs in a process of its own through the real loading code and the real training loop; only weights,
latents and text embeddings are random. On a GPU, memory is what torch allocated there; on a CPU, the peak of the whole
process. The first step (warm-up, compilation) is left out of the mean.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gpu_rows import StepPairsOnly
from shapes import BACKBONES, RANK, WRITTEN, write_pipeline

from attune.build import load_policy
from attune.config.settings import Model
from attune.data.batches import PairBatch
from attune.diffusion.policy import Policy
from attune.distributed import Part
from attune.interfaces import Conditioning
from attune.methods import dpo, spo
from attune.training.loop import Callbacks, train


def load_with_lora(base: str, folder: Path, args: argparse.Namespace) -> Policy:
    """The random pipeline as a policy with a LoRA on its attention, read as any other model is."""
    settings = {"dtype": args.dtype, "vae_dtype": args.vae_dtype, "resolution": args.resolution}
    policy = load_policy(Model(backbone=BACKBONES[base], path=str(folder), **settings))
    policy.backbone.release()  # as a training does
    policy.add_adapter(rank=RANK[base], seed=0)
    if args.checkpointing:
        policy.denoiser.enable_gradient_checkpointing()
    return policy


def random_conditioning(policy: Policy, n: int) -> Conditioning:
    shapes = {name: (n, *value.shape[1:]) for name, value in policy.uncond.tensors.items()}
    return Conditioning({name: torch.randn(shape, device=policy.device) for name, shape in shapes.items()})


def build(method: str, policy: Policy, args: argparse.Namespace):
    """The objective and its batches."""
    shared = {
        "lora": None,  # already there
        "lr": 1e-5,
        "warmup": 0,
        "accumulation": 1,
        "gradient_checkpointing": args.checkpointing,
        "weight_decay": 1e-2,
        "batches": args.steps + 1,
        "batch_size": args.batch,
        "compile": args.compile,
    }
    if method == "dpo":
        n, shape = args.batch, (args.batch, *policy.backbone.latent_shape)
        latents = torch.randn(2, *shape, device=policy.device)
        ones = torch.ones(n, device=policy.device)
        pairs = PairBatch(["a cat"] * n, random_conditioning(policy, n), *latents, ones, ones)
        return dpo.Method(dpo.Config(**shared, beta=5000, caption_dropout=0), policy), lambda b, shard: Part(pairs, n)
    config = spo.Config(
        **shared,
        beta=10,
        clip=0.1,
        candidates=2,
        threshold=0.3,
        steps=20,
        start_step=4,
        guidance_scale=5,
        minibatch_size=args.batch,
    )
    cond = random_conditioning(policy, args.batch)
    return StepPairsOnly(spo.Method(config, policy, preference_model=None)), lambda b, shard: Part(cond, args.batch)


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains a few steps of one case; seconds per step and GiB at the peak."""
    base, method = case.split("-")
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    policy = load_with_lora(base, Path(args.folder), args)
    loaded = time.monotonic() - started
    objective, batches = build(method, policy, args)
    times = [time.monotonic()]

    def log(metrics: Any, step: int) -> None:
        times.append(time.monotonic())

    history, _ = train(objective, policy, batches, seed=0, callbacks=Callbacks(case, log))
    seconds = [b - a for a, b in pairwise(times)]
    steady = seconds[1:] or seconds
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "case": case,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {args.threads} threads",
        "resolution": policy.backbone.resolution,
        "dtype": args.dtype,
        "batch": args.batch,
        "checkpointing": args.checkpointing,
        "compile": args.compile,
        "load_s": round(loaded, 1),
        "first_s": round(seconds[0], 3),
        "step_s": round(sum(steady) / len(steady), 3),
        "peak_GiB": round(peak / 2**30, 2),
        "loss": round(history[0]["loss"], 6),
        "grad_norm": f"{history[0]['grad_norm']:.3g}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cases", nargs="+", choices=[f"{base}-{method}" for base in WRITTEN for method in ("dpo", "spo")]
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--vae-dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--resolution", type=int, help="pixels; default 512 and 1024")
    parser.add_argument("--batch", type=int, default=1, help="pairs, or step pairs, per step")
    parser.add_argument("--steps", type=int, default=1, help="steps after the first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        sys.stdout.write(json.dumps(measure(args.cases[0], args)) + "\n")
        return
    options = [word for word in sys.argv[1:] if word not in args.cases]
    for case in args.cases:  # written here and measured in a process of its own: a peak of memory is never given back
        with tempfile.TemporaryDirectory(prefix="true-shapes-") as folder:
            write_pipeline(case.split("-")[0], Path(folder), getattr(torch, args.dtype))
            subprocess.run([sys.executable, __file__, case, *options, "--folder", folder], check=False)


if __name__ == "__main__":
    main()
