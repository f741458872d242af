"""Where a stage's CPU time goes: start-up, networks, their gradients, the optimizer, and everything else.

    python benchmarks/profiles.py align --run dpo

runs the stage in the checkout in which it is started, whatever its commit, with the settings and data that are there
(`dvc repro` has been run before; outputs are written again), and prints a line of a Markdown table. Times are CPU
seconds of the process, each counted once: what is called inside a timed call counts for the inner one. A network that
is computed again in the backward pass counts as a network.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

NETWORKS = {  # kind -> (module, class, methods)
    "denoiser": [("diffusers.models.unets.unet_2d_condition", "UNet2DConditionModel", ["forward"])],
    "autoencoder": [("diffusers.models.autoencoders.autoencoder_kl", "AutoencoderKL", ["encode", "decode"])],
    "CLIP": [
        ("transformers", "CLIPTextModel", ["forward"]),
        ("transformers", "CLIPModel", ["get_text_features", "get_image_features"]),
        ("transformers", "CLIPVisionModelWithProjection", ["forward"]),
        ("attune.spm.model", "StepAwareCLIP", ["image_features"]),
    ],
    "backward": [("torch.autograd", None, ["backward"])],
    "optimizer": [("torch.optim", "AdamW", ["step"])],
}
COLUMNS = ("start-up", *NETWORKS, "rest")


class Clock:
    """CPU seconds by kind; the innermost call that is timed gets them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open = ["start-up"]
        self._since = time.process_time()

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        self._add()
        self._open.append(name)

    def leave(self) -> None:
        self._add()
        self._open.pop()

    def _add(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, f: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(f)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.kind(name):
                return f(*args, **kwargs)

        return timed


def watch(clock: Clock) -> None:
    """Replaces the methods of NETWORKS by timed ones."""
    for kind, places in NETWORKS.items():
        for module, owner, methods in places:
            found = importlib.import_module(module)
            holder = getattr(found, owner) if owner else found
            for method in methods:
                setattr(holder, method, clock.timed(getattr(holder, method), kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage")
    parser.add_argument("--run")
    given = parser.parse_args()
    clock = Clock()
    os.environ |= {"ATTUNE_TRACKING": "off", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, "src")
    sys.argv = [given.stage, *(["--run", given.run] if given.run else [])]
    for name in ("attune.finetune", "attune.evaluation.scoring", "attune.spm.objective"):  # what stages import late
        importlib.import_module(name)
    watch(clock)
    with clock.kind("rest"):
        runpy.run_module("attune.stages." + given.stage, run_name="__main__", alter_sys=True)
    all_of_it = sum(clock.seconds.values())
    outside = clock.seconds["rest"] / (all_of_it - clock.seconds["start-up"])
    name = given.stage + (f"@{given.run}" if given.run else "")
    row = [name, *(f"{clock.seconds[column]:.1f}" for column in COLUMNS), f"{all_of_it:.1f}", f"{outside:.0%}"]
    sys.stdout.write(f"| stage | {' | '.join(COLUMNS)} | all | rest, of all but start-up |\n| {' | '.join(row)} |\n")


if __name__ == "__main__":
    main()
