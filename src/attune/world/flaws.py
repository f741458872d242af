"""The flaws of web-scale data: damaged images and wrong captions.

The base model is trained on them, so that alignment has something to improve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from attune.world.grammar import BACKGROUNDS, COLOURS, COUNTS, RELATIONS, SHAPES, SIZES, Scene

DAMAGES = ("blur", "noise", "lighting", "washed")


def damage(images: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """Damages a share of the images, one kind of damage each, at a random strength.

    Args:
        images: float32 (B, H, W, 3) in [0, 1]; not changed.
        share: probability in [0, 1] that an image is damaged.
    """
    out = images.copy()
    for row in np.flatnonzero(rng.random(len(images)) < share):
        out[row] = damage_one(images[row], DAMAGES[rng.integers(len(DAMAGES))], rng.uniform(0.35, 1.0), rng)
    return out


def damage_one(image: np.ndarray, kind: str, strength: float, rng: np.random.Generator) -> np.ndarray:
    """One image (H, W, 3) with one kind of `DAMAGES` at a strength in [0, 1]."""
    size = image.shape[0]
    if kind == "blur":
        out = gaussian_filter(image, (strength * 1.8 * size / 32,) * 2 + (0,))
    elif kind == "noise":
        out = image + rng.normal(0, 0.16 * strength, image.shape)
    elif kind == "lighting":
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
        out = image * (1 - 0.6 * strength * (0.5 + 0.35 * (x * np.cos(angle) + y * np.sin(angle))))[..., None]
    elif kind == "washed":
        out = image + (0.6 - image) * 0.6 * strength
    else:
        raise ValueError(f"unknown damage {kind!r}; one of {', '.join(DAMAGES)}")
    return np.clip(out, 0, 1).astype(np.float32)


def wrong_captions(scenes: Sequence[Scene], rng: np.random.Generator, share: float) -> list[Scene]:
    """The scenes with one attribute of a share of them changed, as careless captions have it."""
    wrong = rng.random(len(scenes)) < share
    return [misread(scene, rng) if w else scene for scene, w in zip(scenes, wrong, strict=True)]


def misread(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one attribute changed to another value."""
    fields = ["colours", "shapes", "background"]
    fields += {"one": ["size"], "count": ["count"], "relation": ["relation"]}[scene.kind]
    field = fields[rng.integers(len(fields))]
    if field in ("colours", "shapes"):
        values = list(getattr(scene, field))
        place = int(rng.integers(len(values)))
        choices = list(COLOURS) if field == "colours" else list(SHAPES)
        taken = set(values) if field == "colours" else {values[place]}
        values[place] = _other(choices, taken, rng)
        changed: dict[str, Any] = {field: tuple(values)}
    else:
        others = {"background": BACKGROUNDS, "size": SIZES, "count": COUNTS.values(), "relation": RELATIONS}[field]
        changed = {field: _other(list(others), {getattr(scene, field)}, rng)}
    return replace(scene, **changed)


def _other(choices: list, taken: set, rng: np.random.Generator) -> object:
    free = [choice for choice in choices if choice not in taken]
    return free[rng.integers(len(free))]
