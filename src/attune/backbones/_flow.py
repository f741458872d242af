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
from attune.diffusion.path import Density, Flow, logit_normal, shifted, uniform_over

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
    """Sampling at the scheduler's own sigmas; training at those of `model.density`, with the scheduler's shift.

    Args:
        tokens: of an image, where the shift depends on their number, as FLUX's; None: it is one number.

    Raises:
        ValueError: the scheduler is of another family, or its sigmas are none.
        FileNotFoundError: there is no scheduler.
    """
    config, mu = checked_config(model, tokens)
    n_train = config.get("num_train_timesteps", 1000)
    return Flow(partial(sampling_sigmas, config, mu=mu), density(model, config, mu), n_train)


def checked_config(model: Model, tokens: int | None = None) -> tuple[Mapping[str, Any], float | None]:
    """What the scheduler says of itself, and the logarithm of a shift that depends on the size. As `load_path`."""
    config, file = _latent.scheduler_config(model)
    if config.get("_class_name") != SCHEDULER:
        raise ValueError(f"{file}: a model for {config.get('_class_name')!r:.60} is no flow, which needs {SCHEDULER}")
    refused = OTHER_TABLES if tokens is not None else (*OTHER_TABLES, DYNAMIC)
    odd = [key for key in refused if config.get(key)]
    if odd:
        raise ValueError(f"{file}: a flow model with {odd[0]} is not supported")
    n_train, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
    if isinstance(n_train, bool) or not isinstance(n_train, int) or n_train < 2:
        raise ValueError(f"{file}: num_train_timesteps {n_train!r:.40} is no number of timesteps")
    if tokens is not None:
        return config, size_shift(config, tokens, file)
    if not _is_number(shift) or not 0.01 <= shift <= 100:
        raise ValueError(f"{file}: shift {shift!r:.40} is no number of 0.01 to 100")
    return config, None


def density(model: Model, config: Mapping[str, Any], mu: float | None = None) -> Density:
    """Of training times: logit-normal and shifted, as Stable Diffusion 3; or uniform over the shifted table."""
    if model.density != "uniform":
        return logit_normal(shift_of(config, mu))
    table = scheduler_of(config).sigmas  # n_train of them, shifted unless that depends on the size
    return uniform_over(table if mu is None else shifted(table, shift_of(config, mu)))


def shift_of(config: Mapping[str, Any], mu: float | None) -> float:
    """The scheduler's one shift, or that of a size."""
    return config.get("shift", 1.0) if mu is None else math.exp(mu)


def times(model: Model, tokens: int | None = None) -> dict[str, Any]:
    """What run.json and the card say of the times that a model is trained and sampled at. As `load_path`."""
    shift = round(shift_of(*checked_config(model, tokens)), 4)
    return {"density": model.density or "logit_normal", "shift": shift, "sampled_at": SCHEDULER}


def load_scheduler(model: Model, tokens: int | None = None) -> Any:
    """diffusers' own, which has our sampler's times. As `load_path`."""
    return scheduler_of(checked_config(model, tokens)[0])


def scheduler_of(config: Mapping[str, Any]) -> Any:
    """diffusers' scheduler of a configuration."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_config(config)


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
    scheduler = scheduler_of(config)
    most = scheduler.config.num_train_timesteps - 1
    if not 1 <= steps <= most:
        raise ValueError(f"sampling steps must lie in 1..{most}, got {steps}")
    if mu is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas
