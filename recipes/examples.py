"""Makes docs/examples/pairs and docs/examples/thumbs: images of the embedded base, judged by the oracle.

    PYTHONPATH=src:. python -m recipes.examples

40 pairs for as many prompts: two images from different noise, the one that the oracle prefers is chosen. 60 single
images for other prompts: the better half is liked, the others are not. Both are what a person's folder looks like; a
tutorial and its test train on them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from attune.build import load_policy
from attune.config.settings import Model, Sampling
from attune.diffusion.generate import generate_images
from attune.world import oracle
from attune.world.grammar import all_scenes

FOLDER = Path("docs/examples")
PAIRS, THUMBS, SEED = 40, 60, 1
SAMPLING = Sampling(steps=20, eta=0, guidance_scale=1, batch_size=50)


def main() -> None:
    torch.set_num_threads(1)
    policy = load_policy(Model(backbone="sd", path="models/embedded/base"))
    scenes = [scene for scene in all_scenes() if scene.split == "train"]
    picked = np.random.default_rng(SEED).permutation(len(scenes))[: PAIRS + THUMBS]
    prompts = [scenes[i].prompt for i in picked]

    first, second = (
        generate_images(policy, prompts, [ordinal] * len(prompts), SAMPLING, SEED, "examples") for ordinal in (0, 1)
    )
    scores = [oracle.scores(images / 255, prompts) for images in (first, second)]
    write_pairs(FOLDER / "pairs", prompts[:PAIRS], (first, second), scores)
    write_thumbs(FOLDER / "thumbs", prompts[PAIRS:], first[PAIRS:], scores[0][PAIRS:])


def write_pairs(
    folder: Path, prompts: list[str], images: tuple[np.ndarray, np.ndarray], scores: list[np.ndarray]
) -> None:
    """chosen/, rejected/ and captions.json."""
    shutil.rmtree(folder, ignore_errors=True)
    for i in range(len(prompts)):
        better = int(scores[1][i] > scores[0][i])
        save(images[better][i], folder / "chosen" / f"{i:02d}.png")
        save(images[1 - better][i], folder / "rejected" / f"{i:02d}.png")
    named = {f"{i:02d}": prompt for i, prompt in enumerate(prompts)}
    (folder / "captions.json").write_text(json.dumps(named, indent=1) + "\n")


def write_thumbs(folder: Path, prompts: list[str], images: np.ndarray, scores: np.ndarray) -> None:
    """liked/ and disliked/, a .txt with the prompt beside each image."""
    shutil.rmtree(folder, ignore_errors=True)
    middle = np.median(scores)
    for i, prompt in enumerate(prompts):
        file = folder / ("liked" if scores[i] > middle else "disliked") / f"{i:02d}.png"
        save(images[i], file)
        file.with_suffix(".txt").write_text(prompt + "\n")


def save(image: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file, optimize=True)


if __name__ == "__main__":
    main()
