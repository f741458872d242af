"""Trains the embedded models and writes models/embedded: `make embedded`.

About 50 minutes on one core. Intermediate results stay in .checkpoints/embedded, and an interrupted run goes on from
them. The model card records seed, cost and figures. The weights in git were made by this recipe; training on other
hardware gives other bits but the same quality.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from recipes.embedded import base, flow, scorers
from recipes.embedded.card import BASES, GUIDANCE, base_figures, base_policy, write_card
from recipes.embedded.training import BaseTraining, train_base, web_data
from recipes.embedded.vae import train_vae
from safetensors.torch import save_file
from torch import nn

from attune.clip.open_clip import save_open_clip
from attune.config.settings import Sampling
from attune.diffusion.generate import generate_images

OUT = Path("models/embedded")
WORK = Path(".checkpoints/embedded")
SEED = 0
VAE_STEPS, BASE_STEPS, FLOW_STEPS, BASE_IMAGES = 4200, 1600, 700, 65_536
SCORER_STEPS = {"pickscore": 1200, "hpsv2": 1000, "aesthetic": 1200}
POOL_RENDERED, POOL_GENERATED = 6000, 350  # prompts whose images train a scorer
TEST_RENDERED, TEST_GENERATED = 300, 150
SEEDS = {"pickscore": 11, "hpsv2": 12, "aesthetic": 13, "test": 99}


def main() -> None:
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    vae = cached("vae", lambda: train_vae(VAE_STEPS, batch_size=16, seed=SEED), AutoencoderKL)
    tokenizer = base.build_tokenizer()
    if not (WORK / "base").exists():  # not asked of OUT, which holds the models that are being replaced
        data = web_data(vae, tokenizer, BASE_IMAGES, SEED + 1)
        training = BaseTraining(data, tokenizer, base.build_networks(tokenizer, SEED), base.loss, SEED)
        train_base(training, BASE_STEPS, 96, WORK / "base.pt")
        base.to_pipeline(training, vae, tokenizer).to(torch.float16).save_pretrained(WORK / "base")
    shutil.copytree(WORK / "base", OUT / "base", dirs_exist_ok=True)
    build_flow()
    generate = base_generator(OUT / "base")
    test = pool(generate, "test", TEST_RENDERED, TEST_GENERATED)
    figures = {}
    for name in ("pickscore", "hpsv2", "aesthetic"):
        started = time.monotonic()
        figures[name] = {**build_scorer(name, generate, test), "seconds": round(time.monotonic() - started)}
    write_card(OUT, {(name, w): base_figures(OUT / name, w) for name in BASES for w in GUIDANCE}, figures)


def build_flow() -> None:
    """Trains the base's flow twin and copies it to OUT."""
    if not (WORK / "flow").exists():
        vae, tokenizer = flow.shifted_autoencoder(OUT / "base/vae"), base.build_tokenizer()
        data = web_data(vae, tokenizer, BASE_IMAGES, SEED + 1)
        training = BaseTraining(data, tokenizer, flow.build_networks(tokenizer, SEED), flow.loss, SEED)
        train_base(training, FLOW_STEPS, 192, WORK / "flow.pt")
        flow.to_pipeline(training, vae, tokenizer).to(torch.float16).save_pretrained(WORK / "flow")
    shutil.copytree(WORK / "flow", OUT / "flow", dirs_exist_ok=True)


def build_scorer(name: str, generate: scorers.ImageGenerator, test: scorers.Pool) -> dict[str, float]:
    """Trains one scorer, saves it in its real layout, and returns how often it agrees with the oracle."""
    tokenizer, seed, head = base.build_tokenizer(), SEEDS[name], None
    data = pool(generate, name, POOL_RENDERED, POOL_GENERATED)
    if name == "aesthetic":
        model, head = scorers.train_aesthetic(data, tokenizer, SCORER_STEPS[name], seed)
    else:
        model = scorers.train_clip_scorer(data, name, tokenizer, SCORER_STEPS[name], seed, temperature=0.1)
    figures = scorers.agreement(model, test, TEST_RENDERED, tokenizer, head)
    save_scorer(name, model, head, OUT / name)
    return figures


def save_scorer(name: str, model: nn.Module, head: nn.Module | None, folder: Path) -> None:
    """PickScore: a CLIPModel folder. HPSv2: open_clip keys. Aesthetic: a CLIP folder and the head's layers."""
    folder.mkdir(parents=True, exist_ok=True)
    base.build_tokenizer().save_pretrained(folder)
    if name == "hpsv2":
        save_open_clip(model.half(), folder / "open_clip_model.safetensors")
        return
    model.half().save_pretrained(folder)
    if head is not None:
        save_file({key: value.half() for key, value in head.state_dict().items()}, folder / "head.safetensors")


def base_generator(folder: Path) -> scorers.ImageGenerator:
    """Images of the base in 12 DDIM steps; the scorers are tested on and used for images of other samplers."""
    policy = base_policy(folder)
    sampling = Sampling(steps=12, eta=0, guidance_scale=2, batch_size=64)

    def generate(prompts: Sequence[str], seed: int) -> np.ndarray:
        return generate_images(policy, prompts, range(len(prompts)), sampling, seed, "images of the base")

    return generate


def pool(generate: scorers.ImageGenerator, name: str, rendered: int, generated: int) -> scorers.Pool:
    """The named pool of images, kept on disk because generating it takes minutes."""
    file = WORK / f"pool-{name}.pt"
    if not file.exists():
        made = scorers.image_pool(generate, rendered, generated, SEEDS[name])
        torch.save(made.state(), file)
    return scorers.Pool.from_state(torch.load(file, weights_only=True))


def cached(name: str, make: Callable[[], Any], kind: type) -> Any:
    """A model made once and read back after an interruption."""
    folder = WORK / name
    if not folder.exists():
        make().save_pretrained(folder)
    return kind.from_pretrained(folder).eval().requires_grad_(False)


if __name__ == "__main__":
    main()
