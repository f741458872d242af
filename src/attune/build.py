"""The composition root: from params to a backbone, a policy, a method, scorers. Only here are plug-ins known."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
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
from attune.config.plugins import plugin_config
from attune.config.profile import Profile
from attune.config.settings import MethodConfig, Model
from attune.distributed import Shard
from attune.interfaces import Backbone, Method, Reward, StepReward

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy

transformers.logging.set_verbosity_error()  # diffusers' import below warns about torchvision otherwise
transformers.utils.logging.disable_progress_bar()


def device() -> torch.device:
    """The GPU if there is one; of several, this process's own."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    own, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if own >= there:
        raise RuntimeError(f"process {own} of this machine has no GPU of its own: the machine has {there}")
    return torch.device("cuda", own) if "LOCAL_RANK" in os.environ else torch.device("cuda")


def shard() -> Shard:
    """This process's part of a training, as the launcher says (torchrun, accelerate)."""
    return Shard(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def load_backbone(model: Model) -> Backbone:
    """The base model, frozen."""
    return plugins.load("backbones", model.backbone).load(model, device())


def load_policy(profile: Profile) -> Policy:
    """The base model as a policy that learns nothing yet."""
    return _policy(load_backbone(profile.model))


def load_learner(name: str, profile: Profile, method: str) -> Policy:
    """A policy that a run may train, an adapter of it or all its weights: fresh, or as it was left at `start`."""
    config = method_config(name, profile, method)
    if config.lora is not None:
        policy = load_policy(profile)
        if config.start is None:
            policy.add_adapter(config.lora.rank, profile.seed, config.lora.targets)
    else:  # weights that move are kept in float32; what they are multiplied in is still the model's dtype
        dtype = None if profile.model.dtype == "float32" else getattr(torch, profile.model.dtype)
        model = profile.model.model_copy(update={"dtype": "float32"})
        policy = _policy(load_backbone(model), dtype)
        if config.start is None:
            policy.unfreeze()
    if config.start is not None:
        policy.continue_from(config.start, config.lora)
    if config.gradient_checkpointing:
        policy.denoiser.enable_gradient_checkpointing()
    policy.shard = shard()
    return policy


def _policy(backbone: Backbone, autocast: torch.dtype | None = None) -> Policy:
    from attune.diffusion.policy import Policy  # diffusers takes seconds to import, and scoring does without

    return Policy(backbone, backbone.encode_prompts([""]), autocast)


def method_config(name: str, profile: Profile, method: str) -> MethodConfig:
    """A run's block, as the Config of its method, a file of attune/methods."""
    return plugins.load("methods", method).Config.model_validate(profile.methods[name])


def build_method(name: str, profile: Profile, policy: Policy, preference: Path, method: str) -> Method:
    """A run's method, given what it says it needs: the step-aware preference model in `preference`, or its rewards."""
    plugin = plugins.load("methods", method).Method
    config = method_config(name, profile, method)
    provided: Mapping[str, Callable[[], Any]] = {
        "preference_model": lambda: load_preference_model(preference),
        "rewards": lambda: load_rewards(config, profile),
    }
    return plugin(config, policy, **{need: provided[need]() for need in plugin.needs})


def load_preference_model(folder: Path) -> StepReward:
    """The step-aware preference model saved by train_preference."""
    from attune.spm.model import StepAwareReward, load

    model, tokenizer = load(folder)
    return StepAwareReward(model.to(device()), tokenizer)


def load_rewards(config: Any, profile: Profile) -> dict[str, Reward]:
    """The scorers that a method's `rewards` names, shown images by its `preprocess` where they offer that.

    Scores are published with Pillow's preprocessing, which has no gradient; evaluation keeps to the profile's.
    """

    def shown(name: str) -> dict[str, str]:
        field = plugins.config_class("rewards", name).model_fields.get("preprocess")
        offered = field is not None and config.preprocess in get_args(field.annotation)
        return {"preprocess": config.preprocess} if offered else {}

    return {name: _scorer(name, {**profile.scorers[name], **shown(name)}) for name in config.rewards}


def load_scorer(name: str, profile: Profile) -> Reward:
    """One scorer of the profile, frozen."""
    return _scorer(name, profile.scorers[name])


def _scorer(name: str, block: Mapping[str, Any]) -> Reward:
    config = plugin_config("rewards", name, block, f"scorers.{name}")
    module = plugins.load("rewards", name)
    return module.load(module.Config.model_validate(config.model_dump()), device())
