"""Seconds, memory and floating-point operations of a piece of work, on a GPU or on a CPU."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Measured:
    """One call of a piece of work, the mean of several."""

    first_s: float  # the first call: warm-up, compilation
    step_s: float
    steps: int
    flops: float  # of one call; 0 where they were not counted
    peak_GiB: float  # the unit is part of the name


def synchronise(device: torch.device) -> None:
    """Waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Gives back what is not used any more, and forgets the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_GiB(device: torch.device) -> float:
    """Of a GPU what torch had allocated at most; of a CPU the process's peak, which no later work lowers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, until the GPU is done."""
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - start


def measure(step: Callable[[], object], device: torch.device, budget_s: float, count: bool = True) -> Measured:
    """Calls the work once to count and warm up, once more to warm up, and then while there is time (3 to 20 times).

    The peak of a GPU's memory is that of the calls after the first: counting operations keeps what checkpointing
    would let go of (43 GiB for 15 with Z-Image).

    Args:
        budget_s: seconds for all of it; a call that has begun is not broken off. 0: the first call is all.
        count: whether to count operations, which compiled code does not allow.
    """
    began = time.perf_counter()
    counter = FlopCounterMode(display=False)
    if count:
        with counter:
            first = seconds(step, device)
    else:
        first = seconds(step, device)
    flops = float(counter.get_total_flops()) if count else 0.0
    if not budget_s:
        return Measured(first, first, 1, flops, peak_GiB(device))
    release_memory(device)
    seconds(step, device)
    taken = [seconds(step, device) for _ in range(3)]
    while len(taken) < 20 and time.perf_counter() - began + taken[-1] < budget_s:
        taken.append(seconds(step, device))
    return Measured(first, sum(taken) / len(taken), len(taken), flops, peak_GiB(device))


def matmul_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16, side: int = 8192) -> float:
    """Operations per second of one large matrix product: what this machine can do at most, in practice."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    step = lambda: a @ b  # noqa: E731
    for _ in range(3):
        step()
    repeats = 20 if device.type == "cuda" else 3
    return 2 * side**3 * repeats / seconds(lambda: [step() for _ in range(repeats)], device)
