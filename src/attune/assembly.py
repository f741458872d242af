"""The composition root: from params to a backbone, a policy, a method, scorers. Only here are plug-ins known."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

# before the libraries below are imported: they read these once
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

from attune import plugins
from attune.config import Profile, plugin_config
from attune.interfaces import Backbone, Objective, Reward, StepReward

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy

transformers.logging.set_verbosity_error()  # diffusers' import below warns about torchvision otherwise
transformers.utils.logging.disable_progress_bar()


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_backbone(profile: Profile) -> Backbone:
    """The base model, frozen."""
    model = profile.model
    module = plugins.load("backbones", model.backbone)
    return module.load(model.path, model.revision, getattr(torch, model.dtype), device())


def load_policy(profile: Profile) -> Policy:
    """The base model as a policy without an adapter yet."""
    from attune.diffusion.policy import Policy  # diffusers takes seconds to import, and scoring does without

    backbone = load_backbone(profile)
    return Policy(backbone, backbone.encode_prompts([""]))


def build_method(name: str, profile: Profile, policy: Policy, preference: Path) -> Objective:
    """A method, handed what its constructor names: `judge` is the step-aware preference model."""
    module = plugins.load("methods", name)
    config = module.Config.model_validate(profile.methods[name])
    provided: Mapping[str, Callable[[], Any]] = {"judge": lambda: load_judge(preference)}
    wanted = list(inspect.signature(module.Method).parameters)[2:]
    unknown = [parameter for parameter in wanted if parameter not in provided]
    if unknown:
        raise TypeError(f"methods/{name}.py: Method wants {unknown[0]!r}; on offer: {', '.join(provided)}")
    return module.Method(config, policy, **{parameter: provided[parameter]() for parameter in wanted})


def load_judge(folder: Path) -> StepReward:
    """The step-aware preference model saved by train_preference."""
    from attune.preference.model import StepAwareReward, load

    model, tokenizer = load(folder)
    return StepAwareReward(model.to(device()), tokenizer)


def load_scorers(profile: Profile) -> dict[str, Reward]:
    """Every scorer of the profile, by name, in the profile's order."""
    scorers = {}
    for name, block in profile.scorers.items():
        config = plugin_config("rewards", name, block, f"scorers.{name}")
        module = plugins.load("rewards", name)
        scorers[name] = module.load(module.Config.model_validate(config.model_dump()), device())
    return scorers
