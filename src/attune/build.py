"""The composition root: from settings to a backbone, a policy, a method, scorers. Only here are plug-ins loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

# before the libraries below are imported: they read these once
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

from attune.config import plugins
from attune.config.plan import Plugin
from attune.config.settings import MethodConfig, Model
from attune.distributed import Shard
from attune.files import values_sha
from attune.interfaces import Backbone, Method, Reward, StepReward
from attune.versions import versions

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy

transformers.logging.set_verbosity_error()  # diffusers' import below warns about torchvision otherwise
transformers.utils.logging.disable_progress_bar()
# cuDNN's attention fails or writes where it must not in the backward pass of some shapes, FLUX's among them (measured
# on a H100, torch 2.11; pytorch/pytorch#190321). torch then takes its flash or memory-efficient attention.
torch.backends.cuda.enable_cudnn_sdp(False)


def device() -> torch.device:
    """The GPU if there is one, CUDA's or Apple's (MPS); of several, this process's own. ATTUNE_DEVICE=cpu: the CPU."""
    wanted = os.environ.get("ATTUNE_DEVICE", "")
    if wanted not in ("", "cpu", "cuda", "mps"):
        raise RuntimeError(f"ATTUNE_DEVICE is {wanted!r}; it may be cpu, cuda or mps, or not be set")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("ATTUNE_DEVICE is cuda, but torch finds no GPU: unset it, or install torch for CUDA")
    if wanted in ("cpu", "mps"):
        return torch.device(wanted)
    if not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    own, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if own >= there:
        raise RuntimeError(f"process {own} of this machine has no GPU of its own: the machine has {there}")
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")
    torch.cuda.set_device(own)  # what asks for "the" GPU means this one, say the account of memory and energy
    return torch.device("cuda", own)


def shard_ids(parts: Mapping[str, str]) -> dict[str, str]:
    """Part of a plan -> what identifies its shards: what it is made from, the libraries, and the kind of device."""
    return {part: values_sha([identity, versions(), device().type]) for part, identity in parts.items()}


def shard() -> Shard:
    """This process's part of a training, as the launcher says (torchrun, accelerate)."""
    return Shard(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def load_backbone(model: Model, dtype: torch.dtype | None = None) -> Backbone:
    """The base model, frozen; `dtype` is the denoiser's, if it is not to be the model's."""
    load = plugins.load("backbones", model.backbone).load
    return load(model, device()) if dtype is None else load(model, device(), dtype)


def load_policy(model: Model) -> Policy:
    """The base model as a policy, without trainable weights yet."""
    return as_policy(load_backbone(model))


def load_learner(config: MethodConfig, model: Model, seed: int, start: str | None = None) -> Policy:
    """A policy that a run may train: a LoRA of it, or all its weights, which several processes share.

    Args:
        start: the adapter or denoiser that the training goes on from; None: the base model.
    """
    from attune.training.step import init_distributed  # imports accelerate

    if config.lora is None and model.quantize is not None:
        raise ValueError(
            f"model.quantize: weights in {model.quantize} cannot be trained; set it to null, or use `lora`"
        )
    ours = replace(shard(), sharded_weights=shards_weights(config))
    model = model.model_copy(update={"offload": False})  # a backward pass may begin while the denoiser is elsewhere
    if config.lora is not None:
        policy = load_policy(model)
        policy.shard = ours
        if start is None:
            policy.add_adapter(config.lora.rank, seed, config.lora.targets)
    else:  # weights that are trained are kept in float32, and computed with in the model's dtype
        dtype = None if model.dtype == "float32" else getattr(torch, model.dtype)
        policy = as_policy(load_backbone(model, torch.float32), dtype)
        policy.shard = ours
        if ours.sharded_weights:  # weights are cut when they are unfrozen, for which the processes must have met
            init_distributed(ours, cpu=policy.device.type == "cpu")
        if start is None:
            policy.unfreeze()
    if start is not None:
        policy.continue_from(start, config.lora)
    if config.gradient_checkpointing:
        policy.denoiser.enable_gradient_checkpointing()
    return policy


def shards_weights(config: MethodConfig) -> bool:
    """Whether each process of this training holds a piece of every weight instead of all of them.

    So it is where several train every weight, because there the weights, their gradients, the optimizer's state and the
    reference are most of the memory, unless ATTUNE_SHARDED=0. The states of adafactor and adamw8bit cannot be cut: they
    are means over rows and columns, and blocks of 256 weights with a scale each.
    """
    wanted = os.environ.get("ATTUNE_SHARDED", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"ATTUNE_SHARDED: 0 or 1 is wanted, not {wanted!r}")
    return config.lora is None and shard().world_size > 1 and config.optimizer == "adamw" and wanted != "0"


def as_policy(backbone: Backbone, autocast: torch.dtype | None = None) -> Policy:
    """A base model as a policy; `autocast` is what a float32 denoiser computes in."""
    from attune.diffusion.policy import Policy  # imports diffusers, which takes seconds, and scoring does without

    return Policy(backbone, backbone.encode_prompts([""]), autocast)


def build_method(method: Plugin, policy: Policy, preference: Path, scorers: Mapping[str, Plugin]) -> Method:
    """A method with what it needs.

    Args:
        preference: folder of the step-aware preference model.
        scorers: those of the profile by name, of which the method's rewards are.
    """
    kind, config = plugins.load("methods", method.name).Method, method.config
    makers: dict[str, Callable[[], Any]] = {
        "preference_model": lambda: load_preference_model(preference),
        "rewards": lambda: load_rewards(config, scorers),
    }
    return kind(config, policy, **{what: makers[what]() for what in kind.needs})


def load_preference_model(folder: Path) -> StepReward:
    """The step-aware preference model that train_preference has saved."""
    import importlib

    model = importlib.import_module("attune.spm.model")  # by name: only runs that need it depend on its code
    clip, tokenizer = model.load(folder)
    return model.StepAwareReward(clip.to(device()), tokenizer)


def load_rewards(config: Any, scorers: Mapping[str, Plugin]) -> dict[str, Reward]:
    """The scorers that a method's `rewards` names, shown images by its `preprocess` where they offer that.

    Scores are published with Pillow's preprocessing, which has no gradient; evaluation keeps to the profile's.
    """

    def shown(scorer: Plugin) -> Plugin:
        field = plugins.config_class("rewards", scorer.name).model_fields.get("preprocess")
        if field is None or config.preprocess not in get_args(field.annotation):
            return scorer
        return scorer.model_copy(update={"settings": {**scorer.settings, "preprocess": config.preprocess}})

    return {name: load_scorer(shown(scorers[name])) for name in config.rewards}


def load_scorer(scorer: Plugin) -> Reward:
    """A scorer, frozen."""
    return plugins.load("rewards", scorer.name).load(scorer.config, device())
