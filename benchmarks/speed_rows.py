"""The rows of `speed.py`: which works are compared, on which models; and how equality, seconds and memory are found."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import speed_alignprop
import speed_dpo
import speed_generation
import speed_scorers
import speed_spm
import speed_spo
import torch
from gpu_checks import without_tf32
from measuring import peak_GiB, release_memory, synchronise
from speed_sides import BASE, Place, Side
from torch import Tensor

OUTPUTS = 1e-4  # largest relative difference of losses, images and scores, float32
WEIGHTS = (
    2e-2  # of what a step changes in the weights: where a gradient is nearly 0, its sign is chance, which Adam takes
)


@dataclass(frozen=True)
class Work:
    """What is compared: who says in which order the reference computes, and both sides."""

    reference_is: str
    reference: Callable[[Place], Side]
    ours: Callable[[Place], Side]


WORKS = {
    "DPO": Work("diffusers' script", speed_dpo.in_order_of_diffusers, speed_dpo.ours),
    "DPO, second UNet": Work("authors", speed_dpo.in_order_of_the_authors, speed_dpo.ours),
    "SPO rollout": Work("authors", speed_spo.their_rollout, speed_spo.our_rollout),
    "SPO update": Work("authors", speed_spo.their_update, speed_spo.our_update),
    "SPO": Work("authors", speed_spo.their_whole, speed_spo.our_whole),
    "SPM": Work("authors", speed_spm.in_order_of_the_authors, speed_spm.ours),
    "AlignProp": Work("authors", speed_alignprop.in_order_of_the_authors, speed_alignprop.ours),
    "HPSv2": Work("package, a list of images", speed_scorers.in_order_of_the_package, speed_scorers.ours),
    "PickScore": Work("model card, image by image", speed_scorers.in_order_of_the_card, speed_scorers.ours),
    "generation": Work("diffusers' pipeline", speed_generation.in_order_of_diffusers, speed_generation.ours),
}


@dataclass(frozen=True)
class Row:
    """A work on one model. Its name is what `--rows` chooses by, and its key in the report."""

    work: str  # a key of WORKS
    base: str  # "tiny", the embedded model in float32, or "sd15", random weights in bfloat16
    n: int  # pairs, prompts or images of one call
    resolution: int  # pixels
    options: Mapping[str, Any] = field(default_factory=dict)
    says: str = ""  # of the options, in words
    short: bool = True  # whether `--short` measures it

    @property
    def name(self) -> str:
        return " ".join([self.base, self.work, *([self.says] if self.says else []), f"n={self.n} {self.resolution}px"])

    def place(self, folder: Path, device: torch.device) -> Place:
        """Args: folder: of the pipeline."""
        dtype = {"tiny": "float32", "sd15": "bfloat16"}[self.base]
        return Place(folder, dtype, self.resolution, self.n, device, self.options)

    def small(self, device: torch.device) -> Place:
        """The same work where it costs little, in float32: for the comparison of what both sides compute."""
        small = (
            {"clip": "small", "steps": 4, "dtype": "float32"}
            if self.work in ("HPSv2", "PickScore", "generation")
            else {}
        )
        options = {name: small.get(name, value) for name, value in self.options.items()}
        return Place(BASE, "float32", 32, min(self.n, 2), device, options)


def _rows(base: str, n: int, sizes: Mapping[str, int], long: bool) -> list[Row]:
    """All works on one model.

    Args:
        n: pairs of a step of DPO or SPM, and images of generation.
        sizes: pixels by work.
        long: whether most of them take too long for `--short`.
    """

    def row(work: str, count: int, says: str = "", short: bool = not long, **options: Any) -> Row:
        return Row(work, base, count, sizes.get(work.split(",")[0], sizes[""]), options, says, short)

    clip, images, steps, shown = {"tiny": ("small", 16, 20, 8), "sd15": ("vit-h", 2, 4, 1)}[base]
    return [
        row("DPO", n, short=True),
        row("DPO", n, "latents and embeddings given", encodes=False),
        row("DPO, second UNet", n, at_once=2 * n),
        *(row("SPO rollout", prompts, short=not long or prompts == 1) for prompts in (1, 2)),
        row("SPO update", 4, short=True),
        *(row("SPO", prompts) for prompts in (1, 2)),
        row("SPM", n),
        row("AlignProp", shown, "K=1", k=1, checkpoint=False),
        row("AlignProp", shown, "K=1 checkpointed", k=1, checkpoint=True),
        row("AlignProp", shown, "K=8", k=8, checkpoint=False),
        row("AlignProp", shown, "K=8 checkpointed", short=True, k=8, checkpoint=True),
        row("HPSv2", 20, scorer="hpsv2", clip=clip, dtype="float32"),
        row("HPSv2", 20, "in bfloat16", scorer="hpsv2", clip=clip, dtype="bfloat16"),
        row("PickScore", 20, scorer="pickscore", clip=clip, dtype="float32"),
        row("generation", images, steps=steps, lora=False),
        row("generation", images, "with a LoRA", short=True, steps=steps, lora=True),
    ]


DPO_512 = Row("DPO", "sd15", 1, 512, short=False)
SD15 = {"": 128, "DPO": 256, "SPM": 256, "HPSv2": 512, "PickScore": 512}
ROWS = (*_rows("tiny", 16, {"": 32}, long=False), *_rows("sd15", 1, SD15, long=True), DPO_512)


def with_resolution(row: Row, pixels: int | None) -> Row:
    """A row of SD 1.5 at another size; the embedded model has one alone."""
    return row if pixels is None or row.base == "tiny" else replace(row, resolution=pixels)


# ---------------------------------------------------------------- equality


def differences(work: Work, place: Place) -> dict[str, float]:
    """Relative differences of what both sides say, and of what a call changes in their weights; all are float32.

    Raises:
        AssertionError: they are not the same.
    """
    sides = work.reference(place), work.ours(place)
    before = [[weight.detach().clone() for weight in side.trained] for side in sides]
    with without_tf32():
        theirs, ours = (side.step() for side in sides)
    found = {name: relative(theirs[name], ours[name]) for name in theirs}
    wrong = [f"{name} differ by {error:.1e}" for name, error in found.items() if not error < OUTPUTS]
    if sides[0].trained:
        moved = [
            torch.cat([(now.detach() - old).flatten() for now, old in zip(side.trained, start, strict=True)])
            for side, start in zip(sides, before, strict=True)
        ]
        found["changes of weights"] = relative(*moved)
        wrong += [] if found["changes of weights"] < WEIGHTS else ["the weights change differently"]
    if wrong:
        raise AssertionError(f"reference and attune do not compute the same: {', '.join(wrong)}")
    return found


def relative(reference: Tensor, ours: Tensor) -> float:
    """Norm of the difference over the reference's; infinite if shapes differ or there is nothing to compare."""
    a, b = (x.detach().cpu().double() for x in (reference, ours))
    if a.shape != b.shape or not a.any():
        return float("inf")
    return float((a - b).norm() / a.norm())


# ---------------------------------------------------------------- time and memory


def timed(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of one call on the clock and of the processor, until the GPU is done."""
    synchronise(device)
    clock, processor = time.perf_counter(), time.process_time()
    step()
    synchronise(device)
    return time.perf_counter() - clock, time.process_time() - processor


def alternated(work: Work, place: Place, repeats: int) -> dict[str, Any]:
    """Both sides in turn, `repeats` times after a first call of each that does not count."""
    sides = work.reference(place), work.ours(place)
    for side in sides:
        side.step()
    pairs = [[timed(side.step, place.device) for side in sides] for _ in range(repeats)]
    clock, processor = ([(a[i], b[i]) for a, b in pairs] for i in (0, 1))
    seconds = {name: statistics.median(pair[i] for pair in clock) for i, name in enumerate(("reference_s", "ours_s"))}
    found = {"n": repeats, "ratio": ratios(clock), **seconds}
    return found | ({"ratio_processor": ratios(processor)} if place.device.type == "cpu" else {})


def ratios(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Reference over ours, of each pair of calls: above 1 ours is faster."""
    each = [reference / ours for reference, ours in pairs]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def peak(make: Callable[[Place], Side], place: Place) -> float:
    """GiB at most while one side is made and called; only true in a process of its own.

    A training step is made twice: the optimizer's state is there from the end of the first.
    """
    release_memory(place.device)
    side = make(place)
    for _ in range(2 if side.trained else 1):
        side.step()
    return peak_GiB(place.device)
