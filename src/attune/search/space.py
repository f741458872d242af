"""The search space: what Optuna may draw for a run's settings, and the settings a trial then has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from itertools import product
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from attune.config.schema import SearchRange, StrictModel, number_type, set_path

DIGITS = 3  # of a drawn number: more would only be harder to read


def distributions(space: Mapping[str, SearchRange], method: type[StrictModel]) -> dict[str, BaseDistribution]:
    """Dotted key -> what is drawn for it, whole numbers where the method's Config wants them."""
    return {key: _distribution(dimension, method, key) for key, dimension in space.items()}


def _distribution(dimension: SearchRange, method: type[StrictModel], key: str) -> BaseDistribution:
    if dimension.choices is not None:
        return CategoricalDistribution(dimension.choices)
    if number_type(method, key, key) is int:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def cells(space: Mapping[str, SearchRange]) -> list[dict[str, Any]]:
    """Every combination of a grid's choices, the last key changing fastest."""
    return [dict(zip(space, values, strict=True)) for values in product(*(d.choices for d in space.values()))]


def drawn(params: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's parameters as they are trained with and written down: floats rounded to three digits."""
    return {key: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for key, v in params.items()}


def in_use(space: Mapping[str, SearchRange], config: StrictModel) -> dict[str, Any]:
    """What a run's settings are now, of those that are searched; rounded as what is drawn is, None if not set."""
    values = config.model_dump()
    return drawn({key: reduce(lambda block, name: block.get(name), key.split("."), values) for key in space})


def unsearched(block: Mapping[str, Any], space: Iterable[str]) -> dict[str, Any]:
    """The settings of a run that are not searched: what it is whatever is drawn."""
    for key in space:
        block = set_path(block, key, None)
    return {key: value for key, value in block.items() if key not in space}


def settings(block: Mapping[str, Any], fixed: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """A run's block with what all trials share, and what this one has drawn."""
    for key, value in {**fixed, **params}.items():
        block = set_path(block, key, value)
    return dict(block)
