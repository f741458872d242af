"""How step time and memory grow with batch, K, N, prompts and pairs, on the embedded world's models.

    PYTHONPATH=src:.:tests python benchmarks/curves.py            # all, about eight minutes on two cores
    PYTHONPATH=src:.:tests python benchmarks/curves.py --curves "DPO, batch"

Each point is measured in a process of its own: CPU seconds of one call (the least of three, after one to warm up) and
the process's peak memory. A line is fitted to the points of a curve; the table says what it costs by itself and per
unit, and how far the points lie from it. Writes reports/curves.md, curves.json and curves.png.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_rows import draws_of, pairs, prompts, trained
from measuring import peak_GiB

from attune.build import load_policy
from attune.config.settings import Model, PreferenceConfig, Sampling
from attune.diffusion.generate import generate_batch
from attune.diffusion.policy import Policy
from attune.methods import alignprop, dpo, spo
from attune.rewards import pickscore
from attune.spm.model import StepAwareReward
from attune.spm.objective import starting_model

ROOT = Path(__file__).resolve().parents[1]
BASE, CLIP, RANK = "models/embedded/base", "models/embedded/pickscore", 8
LOOP: dict[str, Any] = {"lr": 1e-5, "batches": 1, "warmup": 0, "accumulation": 1}
REPEATS = 3
Call = Callable[[], object]


def policy() -> Policy:
    found = load_policy(Model(backbone="sd", path=BASE))
    found.add_adapter(RANK, 0, "all")
    return found


def scorer() -> pickscore.Scorer:
    return pickscore.load(pickscore.Config(path=CLIP, preprocess="tensor"), torch.device("cpu"))


def dpo_step(batch: int) -> Call:
    trainee = policy()
    config = dpo.Config(**LOOP, batch_size=batch, gradient_checkpointing=False)
    return trained(dpo.Method(config, trainee), trainee, pairs(trainee, batch), batch)


def alignprop_step(k: int, checkpointed: bool, steps: int = 20, batch: int = 8) -> Call:
    trainee = policy()
    own: dict[str, Any] = {"truncation": "fixed", "truncation_range": [1 - k / steps], "rewards": {"pickscore": 1.0}}
    config = alignprop.Config(**LOOP, **own, steps=steps, batch_size=batch, checkpoint_steps=checkpointed)
    method = alignprop.Method(config, trainee, {"pickscore": scorer()})
    return trained(method, trainee, prompts(trainee, batch), batch)


def spo_rollout(steps: int, batch: int = 8) -> Call:
    trainee = policy()
    config = spo.Config(**LOOP, batch_size=batch, steps=steps, start_step=0)
    judge = StepAwareReward(*starting_model(PreferenceConfig(clip=CLIP, lr=1e-5, batches=1, batch_size=1)))
    method = spo.Method(config, trainee, judge)
    batch_, draws = prompts(trainee, batch), draws_of(batch)
    return lambda: method.rollout(batch_, draws.noise, draws.integers)


def generation(prompts_: int, steps: int) -> Call:
    trainee = policy()
    sampling = Sampling(steps=steps, eta=0, guidance_scale=1, batch_size=60)
    words = [f"a red ring {i}" for i in range(prompts_)]

    def call() -> object:
        rows = (words[start : start + 60] for start in range(0, prompts_, 60))
        return [generate_batch(trainee, some, [0] * len(some), sampling, 0) for some in rows]

    return call


def scoring(images: int) -> Call:
    score, rows = scorer(), torch.rand((images, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    words = [f"a red ring {i}" for i in range(images)]

    @torch.no_grad()
    def call() -> object:
        return [score(rows[i : i + 32], words[i : i + 32]) for i in range(0, images, 32)]

    return call


def preparation(pairs_: int) -> Call:
    """Stage `prepare` on pairs in parquet files, as `scale.py` makes them; the stage is a process of its own."""
    import tempfile

    import scale

    folder = tempfile.TemporaryDirectory(prefix="curves-")
    home = Path(folder.name, "copy")
    scale.write_pairs(home.parent / f"raw{pairs_}", pairs_)
    scale.set_up(home, pairs_)

    def call() -> object:
        for place in (".checkpoints", "data/short/prepared"):
            shutil.rmtree(home / place, ignore_errors=True)
        return scale.stage(home, "prepare", 1), folder

    return call


CURVES: dict[str, tuple[Callable[[int], Call], Sequence[int]]] = {
    "DPO, batch": (dpo_step, (4, 8, 16, 32)),
    "AlignProp, K of 20": (partial(alignprop_step, checkpointed=False), (1, 4, 8, 16)),
    "AlignProp, K of 20, checkpointed": (partial(alignprop_step, checkpointed=True), (1, 4, 8, 16)),
    "AlignProp, batch at K = 2": (lambda n: alignprop_step(2, False, batch=n), (2, 4, 8, 16)),
    "SPO rollout, N": (spo_rollout, (5, 10, 20, 40)),
    "SPO rollout, prompts": (lambda n: spo_rollout(10, n), (2, 4, 8, 16)),
    "generation, N": (partial(generation, 60), (5, 10, 20, 40)),
    "generation, prompts": (partial(generation, steps=5), (60, 120, 240, 480)),
    "scoring, images": (scoring, (60, 120, 240, 480)),
    "prepare, pairs": (preparation, (2500, 5000, 10_000, 20_000)),
}


def point(name: str, x: int) -> dict[str, float]:
    """CPU seconds of a call, of this process and its children, and the largest process's memory."""
    torch.set_num_threads(1)
    make, _ = CURVES[name]
    call, taken = make(x), []
    for _ in range(2 if make is preparation else REPEATS + 1):
        before = cpu_seconds()
        call()
        taken.append(cpu_seconds() - before)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    peak = children if make is preparation else peak_GiB(torch.device("cpu"))
    return {"x": x, "seconds": min(taken[1:]), "peak_GiB": peak}


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measured(name: str) -> list[dict[str, float]]:
    """The points of a curve, each of a process of its own."""
    found = []
    for x in CURVES[name][1]:
        command = [sys.executable, __file__, "--curves", name, "--point", str(x)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found.append(json.loads(said.splitlines()[-1]))
        sys.stdout.write(f"{name} {found[-1]}\n")
        sys.stdout.flush()
    return found


def line(points: Sequence[dict[str, float]], key: str) -> tuple[float, float, float]:
    """Intercept and slope of the line through the points, least squares, and the largest distance in shares of it."""
    x, y = (np.array([point[name] for point in points]) for name in ("x", key))
    slope, intercept = np.polyfit(x, y, 1)
    return float(intercept), float(slope), float(np.abs(y / (intercept + slope * x) - 1).max())


def table(curves: dict[str, list[dict[str, float]]]) -> Iterable[str]:
    """A row for each curve: what its points are, and the lines through them."""
    yield "| curve | at | CPU s | = a + b x | off the line | peak, GiB | = a + b x | off the line |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, points in curves.items():
        cells = [name, *(", ".join(f"{point[key]:.3g}" for point in points) for key in ("x", "seconds"))]
        for key in ("seconds", "peak_GiB"):
            a, b, off = line(points, key)
            if key == "peak_GiB":
                cells.append(", ".join(f"{point[key]:.2f}" for point in points))
            cells += [f"{a:.2g} + {b:.2g} x", f"{off:.0%}"]
        yield f"| {' | '.join(cells)} |"


def draw(curves: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Seconds and memory of every curve, with its line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 6), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for column, (name, points) in enumerate(curves.items()):
        for row, key in enumerate(("seconds", "peak_GiB")):
            ax, x = axes[row][column], [point["x"] for point in points]
            a, b, _ = line(points, key)
            ax.plot(x, [point[key] for point in points], "o", x, [a + b * at for at in x], "-")
            ax.set(ylim=(0, None), xlim=(0, None), title=name if row == 0 else "", ylabel=key.replace("_", ", "))
    figure.savefig(file, dpi=60)


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "ATTUNE_TRACKING": "off", "TQDM_DISABLE": "1"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        sys.stdout.write(json.dumps(point(given.curves[0], given.point)) + "\n")
        return
    file = ROOT / "reports/curves.json"
    curves = json.loads(file.read_text()) if file.exists() else {}
    curves |= {name: measured(name) for name in given.curves}
    curves = {name: curves[name] for name in CURVES if name in curves}
    file.write_text(json.dumps(curves, indent=1) + "\n")
    said = __doc__.split("\n\n")[2].replace("\n", " ")
    text = "\n".join(["# How time and memory grow", "", *table(curves), "", said])
    (ROOT / "reports/curves.md").write_text(text + "\n")
    draw(curves, ROOT / "reports/curves.png")


if __name__ == "__main__":
    main()
