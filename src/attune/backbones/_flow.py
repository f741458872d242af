"""The path of a flow model, as the scheduler in its folder says."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attune.backbones import _latent
from attune.config.settings import Model
from attune.diffusion.path import Density, Flow, logit_normal, uniform_over

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
OTHER_TABLES = (  # not of Stable Diffusion 3: FLUX's shift by size, and sigmas that samplers of other families use
    *("use_dynamic_shifting", "shift_terminal", "invert_sigmas", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)


def load_path(model: Model) -> Flow:
    """Sampling at the scheduler's own sigmas; training at those of `model.density`, with the scheduler's shift.

    Raises:
        ValueError: the scheduler is of another family, or its sigmas are none.
        FileNotFoundError: there is no scheduler.
    """
    config = checked_config(model)
    return Flow(partial(sampling_sigmas, config), density(model, config), config.get("num_train_timesteps", 1000))


def checked_config(model: Model) -> Mapping[str, Any]:
    """What the scheduler says of itself. Raises as `load_path`."""
    config, file = _latent.scheduler_config(model)
    if config.get("_class_name") != SCHEDULER:
        raise ValueError(f"{file}: a model for {config.get('_class_name')!r:.60} is no flow, which needs {SCHEDULER}")
    odd = [key for key in OTHER_TABLES if config.get(key)]
    if odd:
        raise ValueError(f"{file}: a flow model with {odd[0]} is not supported")
    shift, n_train = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0.01 <= shift <= 100:
        raise ValueError(f"{file}: shift {shift!r:.40} is no number of 0.01 to 100")
    if isinstance(n_train, bool) or not isinstance(n_train, int) or n_train < 2:
        raise ValueError(f"{file}: num_train_timesteps {n_train!r:.40} is no number of timesteps")
    return config


def density(model: Model, config: Mapping[str, Any]) -> Density:
    """Of training times: logit-normal and shifted, as Stable Diffusion 3; or any of the shifted table, as likely."""
    if model.density == "uniform":
        return uniform_over(scheduler_of(config).sigmas)  # n_train of them, until `set_timesteps`
    return logit_normal(config.get("shift", 1.0))


def times(model: Model) -> dict[str, Any]:
    """What run.json and the card say of the times that a model is trained and sampled at. Raises as `load_path`."""
    config = checked_config(model)
    return {"density": model.density or "logit_normal", "shift": config.get("shift", 1.0), "sampled_at": SCHEDULER}


def load_scheduler(model: Model) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' own, which has our sampler's times. Raises as `load_path`."""
    return scheduler_of(checked_config(model))


def scheduler_of(config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a configuration."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_config(config)


def sampling_sigmas(config: Mapping[str, Any], steps: int) -> Tensor:
    """The falling sigmas (steps + 1,) of a run, from 1 to 0, as diffusers' own scheduler makes them.

    They are read and never computed here, because it shifts a range that is shifted already.
    """
    scheduler = scheduler_of(config)
    most = scheduler.config.num_train_timesteps - 1
    if not 1 <= steps <= most:
        raise ValueError(f"sampling steps must lie in 1..{most}, got {steps}")
    scheduler.set_timesteps(steps)
    return scheduler.sigmas
