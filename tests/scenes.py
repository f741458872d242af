"""Scenes of the embedded world, drawn and generated from seeds."""

from __future__ import annotations

import numpy as np

from attune.world.grammar import Scene, all_scenes
from attune.world.render import render

N = 60  # scenes of each kind


def some(kind: str, n: int = N, seed: int = 0) -> list[Scene]:
    of_kind = [scene for scene in all_scenes() if scene.kind == kind]
    return [of_kind[i] for i in np.random.default_rng(seed).choice(len(of_kind), n, replace=False)]


def prompts(scenes: list[Scene]) -> list[str]:
    return [scene.prompt for scene in scenes]


def generate(scenes: list[Scene], seed: int = 0) -> np.ndarray:
    return render(scenes, np.random.default_rng(seed))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)
