"""The path of a flow model, as the scheduler in its folder says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from attune.backbones import _latent
from attune.config.settings import Model
from attune.diffusion.path import Flow, logit_normal

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = "use_dynamic_shifting"
OTHER_TABLES = (  # neither of Stable Diffusion 3 nor of FLUX: sigmas that samplers of other families use
    *("shift_terminal", "invert_sigmas", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)
SIZES = {  # a scheduler's names -> those of diffusers' `calculate_shift`
    **{"base_image_seq_len": "base_seq_len", "max_image_seq_len": "max_seq_len"},
    **{"base_shift": "base_shift", "max_shift": "max_shift"},
}


def load_path(model: Model, tokens: int | None = None) -> Flow:
    """Sampling at the scheduler's own sigmas; training at logit-normal ones with its shift, as Stable Diffusion 3.

    Args:
        tokens: of an image, where the shift depends on their number, as FLUX's; None: it is one number.

    Raises:
        ValueError: the scheduler is of another family, or its sigmas are none.
        FileNotFoundError: there is no scheduler.
    """
    config, file = _latent.scheduler_config(model)
    if config.get("_class_name") != SCHEDULER:
        raise ValueError(f"{file}: a model for {config.get('_class_name')!r:.60} is no flow, which needs {SCHEDULER}")
    refused = OTHER_TABLES if tokens is not None else (*OTHER_TABLES, DYNAMIC)
    odd = [key for key in refused if config.get(key)]
    if odd:
        raise ValueError(f"{file}: a flow model with {odd[0]} is not supported")
    n_train = config.get("num_train_timesteps", 1000)
    if isinstance(n_train, bool) or not isinstance(n_train, int) or n_train < 2:
        raise ValueError(f"{file}: num_train_timesteps {n_train!r:.40} is no number of timesteps")
    if tokens is not None:
        mu = size_shift(config, tokens, file)
        return Flow(partial(sampling_sigmas, config, mu=mu), logit_normal(math.exp(mu)), n_train)
    shift = config.get("shift", 1.0)
    if not _is_number(shift) or not 0.01 <= shift <= 100:
        raise ValueError(f"{file}: shift {shift!r:.40} is no number of 0.01 to 100")
    return Flow(partial(sampling_sigmas, config), logit_normal(shift), n_train)


def size_shift(config: Mapping[str, Any], tokens: int, file: Path | str = "the scheduler") -> float:
    """FLUX's mu for an image of so many tokens, by diffusers' line through two sizes; its shift is e^mu.

    Raises:
        ValueError: the scheduler does not shift so.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    if not config.get(DYNAMIC) or config.get("time_shift_type", "exponential") != "exponential":
        raise ValueError(f"{file}: {DYNAMIC} must be true and time_shift_type exponential, as FLUX's are")
    given = {key: config[key] for key in SIZES if key in config}
    if odd := [key for key, value in given.items() if not _is_number(value)]:
        raise ValueError(f"{file}: {odd[0]} {given[odd[0]]!r:.40} is no number")
    try:
        mu = float(calculate_shift(tokens, **{SIZES[key]: value for key, value in given.items()}))
    except ZeroDivisionError:
        mu = math.inf
    if not abs(mu) <= math.log(100):
        raise ValueError(f"{file}: its shift for {tokens} tokens, e^{mu:g}, is no number of 0.01 to 100")
    return mu


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def sampling_sigmas(config: Mapping[str, Any], steps: int, mu: float | None = None) -> Tensor:
    """The falling sigmas (steps + 1,) of a run, from 1 to 0, as diffusers' own scheduler makes them.

    They are read and never computed here, because it shifts a range that is shifted already, unless it is given one,
    as FLUX's pipeline does.

    Args:
        mu: logarithm of the shift, of a scheduler that is told it for each size.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    most = scheduler.config.num_train_timesteps - 1
    if not 1 <= steps <= most:
        raise ValueError(f"sampling steps must lie in 1..{most}, got {steps}")
    if mu is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas
