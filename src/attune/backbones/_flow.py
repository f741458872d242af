"""The path of a flow model, as the scheduler in its folder says."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from attune.backbones import _latent
from attune.config.settings import Model
from attune.diffusion.path import Flow, logit_normal

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
OTHER_TABLES = (  # not of Stable Diffusion 3: FLUX's shift by size, and sigmas that samplers of other families use
    *("use_dynamic_shifting", "shift_terminal", "invert_sigmas", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)


def load_path(model: Model) -> Flow:
    """Sampling at the scheduler's own sigmas; training at logit-normal ones with its shift, as Stable Diffusion 3.

    Raises:
        ValueError: the scheduler is of another family, or its sigmas are none.
        FileNotFoundError: there is no scheduler.
    """
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
    return Flow(partial(sampling_sigmas, config), logit_normal(shift), n_train)


def sampling_sigmas(config: Mapping[str, Any], steps: int) -> Tensor:
    """The falling sigmas (steps + 1,) of a run, from 1 to 0, as diffusers' own scheduler makes them.

    They are read and never computed here, because it shifts a range that is shifted already.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    most = scheduler.config.num_train_timesteps - 1
    if not 1 <= steps <= most:
        raise ValueError(f"sampling steps must lie in 1..{most}, got {steps}")
    scheduler.set_timesteps(steps)
    return scheduler.sigmas
