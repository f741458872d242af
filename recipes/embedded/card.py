"""The model card of the embedded models, written from measurements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from recipes.embedded.flow import T5_TOKENS

from attune.backbones import sd, sd3
from attune.config.settings import Model, Sampling
from attune.data.sources.world import draw_prompts
from attune.diffusion.generate import generate_images
from attune.diffusion.policy import Policy
from attune.interfaces import Backbone
from attune.world.oracle import VERDICT_FIELDS, judge

PROMPTS = 240
BASES = ("base", "flow")
GUIDANCE = (1.0, 2.0)  # profile tiny samples without guidance: half the cost, and more left to improve


def base_policy(folder: Path) -> Policy:
    """The base as saved, in float32 on the CPU."""
    backbone: Backbone
    if (folder / "transformer").exists():
        model = Model(backbone="sd3", path=str(folder), max_sequence_length=T5_TOKENS)
        backbone = sd3.load(model, torch.device("cpu"))
    else:
        backbone = sd.load(Model(backbone="sd", path=str(folder)), torch.device("cpu"))
    return Policy(backbone, backbone.encode_prompts([""]))


def base_figures(folder: Path, guidance_scale: float) -> dict[str, float]:
    """Mean of every oracle field over images of test prompts, DDIM (Euler of a flow) in 20 steps."""
    policy = base_policy(folder)
    prompts = draw_prompts("test", PROMPTS, np.random.default_rng(0)).prompt.tolist()
    sampling = Sampling(steps=20, eta=0, guidance_scale=guidance_scale, batch_size=60)
    images = generate_images(policy, prompts, [0] * PROMPTS, sampling, 0, "base figures")
    verdicts = judge(images.astype(np.float32) / 255, prompts)
    return {name: float(np.mean([getattr(v, name) for v in verdicts])) for name in VERDICT_FIELDS}


def write_card(
    folder: Path, bases: Mapping[tuple[str, float], Mapping[str, float]], figures: Mapping[str, Mapping[str, float]]
) -> None:
    """Writes README.md beside the models, with their size and figures."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    scorers = "\n".join(
        f"| {name} | {row['all']:.3f} | {row['rendered']:.3f} | {row['generated']:.3f} | {row['seconds']:.0f} |"
        for name, row in figures.items()
    )
    columns = [*bases]
    oracle = "\n".join(
        f"| {name} | " + " | ".join(f"{bases[column][name]:.3f}" for column in columns) + " |"
        for name in VERDICT_FIELDS
    )
    (folder / "README.md").write_text(_CARD.format(size=size, scorers=scorers, oracle=oracle, prompts=PROMPTS))


# ruff: noqa: E501 - a Markdown table cannot be wrapped
_CARD = """---
license: apache-2.0
pipeline_tag: text-to-image
---
# The embedded models

Small real models that stand in for Hub checkpoints, so that attune's whole pipeline runs on a laptop without a
network. {size:.1f} MB in all, float16 safetensors, float32 in use. Made by `make embedded`
(`recipes/embedded`, seed 0) on one core of a 2-core machine; weights and pictures are our own work,
Apache-2.0, no third-party data.

| folder | layout | stands in for |
|---|---|---|
| `base` | diffusers `StableDiffusionPipeline`: AutoencoderKL (factor 4, 8x8x4 latents), CLIPTextModel, UNet2DConditionModel (4 M parameters), DDIM, epsilon | Stable Diffusion 1.5 |
| `pickscore` | `CLIPModel`, gelu | PickScore v1, and the start of the step-aware preference model |
| `hpsv2` | open_clip keys and config | HPSv2 |
| `aesthetic` | `CLIPModel` and a linear head `layers.{{0,2,4,6,7}}` | LAION aesthetic predictor |

## Base
32 px images of one, two or three coloured shapes. Trained on 65,536 pictures with the flaws of the web (35 %
damaged, 10 % with a wrong caption, 10 % of captions dropped), 1,600 steps of 96, on all combinations of the
grammar: only alignment holds combinations out. It is deliberately imperfect. Oracle on {prompts} test prompts, DDIM,
20 steps (of the flow: Euler, the same):

| mean of | base, guidance 1 (off) | base, 2 | flow, 1 | flow, 2 |
|---|---|---|---|---|
{oracle}

Autoencoder: 38.9 dB on clean renders, which keep an oracle score of 0.90 through it (0.95 before).

## Scorers
None is the oracle in disguise: each saw pictures of its own and opinions of its own (`OPINIONS` in
`recipes/embedded/scorers.py`): `pickscore` favours bright pictures, `hpsv2` weighs the prompt far above looks and favours
warm colours, `aesthetic` never reads the prompt and dislikes dark pictures; choices and ratings are noisy.
Agreement with the oracle on pairs of held-out pictures of one prompt (0.5 is chance; pairs the oracle puts closer
than 0.05 left out):

| scorer | all pairs | rendered pictures | samples of the base | training, s |
|---|---|---|---|---|
{scorers}

Cost: autoencoder 450 s, pictures and base 1,200 s, pools of pictures about 110 s each, scorers as above.
"""
