"""The pieces of work that `gpu.py` measures: each is the real method, loop and model code on random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from random_bases import random_backbone
from shapes import BACKBONES, RANK, random_clip, random_images, tokenizer, vit_h_config

from attune.config.settings import Model, PreferenceConfig
from attune.data.batches import PairBatch, PromptBatch
from attune.diffusion.ddim import sample
from attune.diffusion.noise import Draws
from attune.diffusion.policy import Policy
from attune.distributed import Part, Shard
from attune.interfaces import Conditioning, Objective
from attune.methods import alignprop, dpo, spo
from attune.rewards import pickscore
from attune.spm.model import StepAwareCLIP, StepAwareReward
from attune.spm.objective import SPMObjective
from attune.training.step import TrainStep, allow_tf32

GUIDANCE = {"sd15": 5.0, "sdxl": 5.0, "sd35m": 4.5, "flux": 3.5, "z_image": 5.0}
PROMPT = "a cat on a mat"


@dataclass(frozen=True)
class Row:
    """One line of the table: a piece of work on one model, and what differs from its plain form."""

    work: str  # a key of WORKS
    base: str  # a key of BACKBONES or, of a scorer, "vit-h"
    batch: int  # pairs, prompts or images at a time
    switches: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.base, self.work, *(f"{key}={value}" for key, value in self.switches.items())])


@dataclass(frozen=True)
class Work:
    """What is timed, and how many of what one call does."""

    step: Callable[[], object]
    per_step: float
    unit: str


@dataclass(frozen=True)
class Place:
    """Where rows run, and whether on small models that cost nothing."""

    device: torch.device
    small: bool


def policy_of(row: Row, place: Place, lora: bool = True) -> Policy:
    """A policy with an adapter, or with all its weights in training, as `attune.build.load_learner` makes one."""
    names = ("lora_dtype", "channels_last", "vae_dtype", "quantize", "resolution")
    given = {"dtype": "bfloat16", "vae_dtype": "bfloat16"} | {k: row.switches[k] for k in names if k in row.switches}
    model = Model(backbone=BACKBONES[row.base], path="random", **given)
    dtype, autocast = (None, None) if lora else (torch.float32, torch.bfloat16)
    backbone = random_backbone(row.base, model, place.device, dtype, place.small)
    policy = Policy(backbone, backbone.encode_prompts([""]), autocast)
    if lora:
        policy.add_adapter(RANK[row.base], 0)
    else:
        policy.unfreeze()
    if row.switches.get("checkpointing"):
        policy.denoiser.enable_gradient_checkpointing()
    return policy


def loop(row: Row) -> dict[str, Any]:
    """The settings of training that rows differ in, and those that no row needs."""
    switches = {key: row.switches[key] for key in ("compile", "tf32") if key in row.switches}
    return {"lr": 1e-5, "batches": 1, "batch_size": row.batch, "warmup": 0, "accumulation": 1, **switches}


def draws_of(n: int) -> Draws:
    return Draws.of_batch(0, 0, n, Shard())


def trained(objective: Objective, trainable: Any, batch: Any, n: int) -> Callable[[], object]:
    """One optimizer step on the first minibatch of a batch of n rows, noise and all."""
    train_step, draws = TrainStep(trainable, objective.config), draws_of(n)

    def step() -> object:
        minibatch = next(iter(objective.minibatches(batch, draws)))
        return train_step(objective, [minibatch], 1, objective.config.lr)

    return step


def pairs(policy: Policy, n: int) -> PairBatch:
    shape, device = (n, *policy.backbone.latent_shape), policy.device
    latents = (torch.randn(shape, device=device) for _ in range(2))
    ones = torch.ones(n, device=device)
    return PairBatch([PROMPT] * n, policy.backbone.encode_prompts([PROMPT] * n), *latents, ones, ones)


def prompts(policy: Policy, n: int) -> PromptBatch:
    return PromptBatch([PROMPT] * n, policy.backbone.encode_prompts([PROMPT] * n))


def step_aware(place: Place) -> tuple[StepAwareCLIP, Any]:
    """A random step-aware preference model and its tokenizer."""
    words = tokenizer()
    with torch.device(place.device):
        return StepAwareCLIP(vit_h_config(words, place.small)), words


def scorer(place: Place) -> pickscore.Scorer:
    """PickScore with random weights, differentiable."""
    words = tokenizer()
    config = pickscore.Config(path="random", preprocess="tensor")
    return pickscore.Scorer(random_clip(words, place.device, place.small), words, config)


# ---------------------------------------------------------------- what is timed


def dpo_step(row: Row, place: Place) -> Work:
    policy = policy_of(row, place, lora=row.work == "DPO LoRA")
    config = dpo.Config(**loop(row), gradient_checkpointing=bool(row.switches.get("checkpointing")))
    return Work(trained(dpo.Method(config, policy), policy, pairs(policy, row.batch), row.batch), row.batch, "pairs")


def spo_of(row: Row, place: Place) -> spo.Method:
    """SPO with the paper's candidates, on a run of 6 steps of which 4 have them, on a flow 3."""
    own = {"candidates": 4 if row.base == "sd15" else 2, "steps": 6, "start_step": 2, "threshold": 0.0}
    own |= {"minibatch_size": row.batch, "guidance_scale": GUIDANCE[row.base]}
    policy = policy_of(row, place)
    return spo.Method(spo.Config(**loop(row), **own), policy, StepAwareReward(*step_aware(place)))


def spo_rollout(row: Row, place: Place) -> Work:
    method = spo_of(row, place)
    batch, draws = prompts(method.policy, row.batch), draws_of(row.batch)
    decisions = 3 if method.policy.backbone.prediction_type == "flow" else 4
    return Work(lambda: method.rollout(batch, draws.noise, draws.integers), row.batch * decisions, "decisions")


@dataclass
class StepPairsOnly:
    """SPO's update alone, on random step pairs: what is repeated for every kept step of a rollout."""

    method: spo.Method

    def __post_init__(self) -> None:
        self.config, self.policy, self.loss = self.method.config, self.method.policy, self.method.loss

    def minibatches(self, batch: Conditioning, draws: Draws) -> Iterable[Part[spo.StepPairs]]:
        n, device = self.config.minibatch_size, self.policy.device
        shape = (n, *self.policy.backbone.latent_shape)
        x_t, chosen, rejected = (draws.noise(shape).to(device) for _ in range(3))
        yield Part(spo.StepPairs(x_t, chosen, rejected, torch.full((n,), 501), batch), n)


def spo_update(row: Row, place: Place) -> Work:
    method = spo_of(row, place)
    cond = method.policy.backbone.encode_prompts([PROMPT] * row.batch)
    return Work(trained(StepPairsOnly(method), method.policy, cond, row.batch), row.batch, "step pairs")


def spm_step(row: Row, place: Place) -> Work:
    model, words = step_aware(place)
    base = policy_of(row, place)
    settings = {"precision": "bfloat16", "gradient_checkpointing": bool(row.switches.get("checkpointing"))}
    config = PreferenceConfig(clip="random", **{**loop(row), **settings})
    objective = SPMObjective(config, model, words, base)
    return Work(trained(objective, objective, pairs(base, row.batch), row.batch), row.batch, "pairs")


def alignprop_step(row: Row, place: Place) -> Work:
    """K = 8 of 10 steps with a gradient."""
    policy = policy_of(row, place)
    own = {"steps": 10, "truncation": "fixed", "truncation_range": [0.2], "rewards": {"pickscore": 1.0}}
    saves = bool(row.switches.get("checkpointing"))
    config = alignprop.Config(**{**loop(row), **own, "checkpoint_steps": saves, "checkpoint_decoder": saves})
    method = alignprop.Method(config, policy, {"pickscore": scorer(place)})
    return Work(trained(method, policy, prompts(policy, row.batch), row.batch), row.batch, "images")


def generation(row: Row, place: Place) -> Work:
    """20 steps with guidance, and decoding."""
    policy = policy_of(row, place)
    cond, draws = policy.backbone.encode_prompts([PROMPT] * row.batch), draws_of(row.batch)

    @torch.no_grad()
    def step() -> torch.Tensor:
        eta = 0.0 if policy.backbone.prediction_type == "flow" else 1.0
        latents = sample(policy, cond, draws.noise, 4 if place.small else 20, eta, GUIDANCE[row.base])
        return policy.backbone.decode_latents(latents).clamp(0, 1).cpu()

    return Work(step, row.batch, "images")


def scoring(row: Row, place: Place) -> Work:
    score, images = scorer(place), random_images(row.batch, 32 if place.small else 512, place.device)

    @torch.no_grad()
    def step() -> torch.Tensor:
        return score(images, [PROMPT] * row.batch).cpu()

    return Work(step, row.batch, "images")


WORKS = {
    "DPO LoRA": dpo_step,
    "DPO full": dpo_step,
    "SPO rollout": spo_rollout,
    "SPO update": spo_update,
    "SPM step": spm_step,
    "AlignProp K=8": alignprop_step,
    "generation": generation,
    "scoring": scoring,
}


def prepared(row: Row, place: Place) -> Work:
    """The work of a row, ready to be called."""
    allow_tf32(bool(row.switches.get("tf32")))
    return WORKS[row.work](row, place)


# In the order of what one wants to know first, for a run that is cut off: every work once, then the switches.
CHECKPOINTED = {"checkpointing": True}
ROWS = (
    Row("DPO LoRA", "sd15", 8),
    Row("DPO LoRA", "sdxl", 1),
    Row("DPO LoRA", "sd35m", 1),
    Row("DPO LoRA", "z_image", 1, CHECKPOINTED | {"resolution": 768}),
    Row("DPO LoRA", "flux", 1, CHECKPOINTED),
    Row("SPO rollout", "sd15", 2),
    Row("SPO update", "sd15", 10),
    Row("SPM step", "sd15", 8),
    Row("AlignProp K=8", "sd15", 2, CHECKPOINTED),
    Row("generation", "sd15", 8),
    Row("generation", "sdxl", 2),
    Row("generation", "sd35m", 2),
    Row("scoring", "vit-h", 32),
    Row("DPO full", "sd15", 4),
    Row("DPO LoRA", "flux", 1, CHECKPOINTED | {"quantize": "nf4", "resolution": 512}),
    Row("DPO LoRA", "z_image", 1, CHECKPOINTED | {"quantize": "nf4", "resolution": 768}),
    Row("DPO LoRA", "sdxl", 1, {"quantize": "nf4"}),
    Row("DPO LoRA", "sdxl", 1, {"quantize": "int8"}),
    Row("SPO rollout", "sd35m", 1),
    Row("SPO update", "sd35m", 2, CHECKPOINTED),
    Row("generation", "flux", 1),
    Row("generation", "z_image", 1),
    Row("DPO LoRA", "sd15", 8, {"lora_dtype": "float32"}),
    Row("DPO LoRA", "sd15", 8, {"channels_last": True}),
    Row("DPO LoRA", "sd15", 8, CHECKPOINTED),
    Row("scoring", "vit-h", 32, {"tf32": True}),
    Row("SPO rollout", "sd15", 2, {"vae_dtype": "float32"}),
    Row("SPO rollout", "sd15", 2, {"tf32": True}),
    Row("generation", "sd15", 8, {"channels_last": True}),
    Row("DPO LoRA", "sdxl", 4, CHECKPOINTED),
    Row("DPO LoRA", "sd35m", 4, CHECKPOINTED),
    Row("DPO LoRA", "sdxl", 1, {"lora_dtype": "float32"}),
    Row("SPO update", "sdxl", 2, CHECKPOINTED),
    Row("SPO rollout", "sdxl", 1),
    Row("SPM step", "sdxl", 2),
    Row("SPM step", "sd15", 8, {"tf32": True}),
    Row("AlignProp K=8", "sdxl", 1, CHECKPOINTED),
    Row("AlignProp K=8", "sd15", 2),
    Row("SPO update", "sd15", 10, CHECKPOINTED),
    Row("generation", "sdxl", 2, {"channels_last": True}),
    Row("DPO full", "sdxl", 1, CHECKPOINTED),
    Row("DPO LoRA", "sd15", 8, {"compile": True}),
)
