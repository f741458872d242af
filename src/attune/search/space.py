"""The search space: distributions for Optuna, and the settings of a trial."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from itertools import product
from typing import Any, TypeVar

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from attune.config.schema import SearchRange, StrictModel, number_type, set_path

Distribution = CategoricalDistribution | IntDistribution | FloatDistribution
K = TypeVar("K")
DIGITS = 3  # significant digits of a float: more would only be harder to read


def distributions(space: Mapping[str, SearchRange], method: type[StrictModel]) -> dict[str, Distribution]:
    """Dotted key -> its distribution, of whole numbers where the method's Config has an int."""
    return {key: _distribution(searched, method, key) for key, searched in space.items()}


def _distribution(searched: SearchRange, method: type[StrictModel], key: str) -> Distribution:
    if searched.choices is not None:
        return CategoricalDistribution(searched.choices)
    low, high = searched.ends
    if number_type(method, key, key) is int:
        return IntDistribution(int(low), int(high), log=searched.log)
    return FloatDistribution(low, high, log=searched.log)


def grid_points(space: Mapping[str, SearchRange]) -> list[dict[str, Any]]:
    """Every combination of the choices, the last key changing fastest."""
    choices = [searched.choices or [] for searched in space.values()]
    return [dict(zip(space, values, strict=True)) for values in product(*choices)]


def rounded_params(params: Mapping[K, Any]) -> dict[K, Any]:
    """A trial's parameters as they are trained with and written to files: floats have three significant digits."""
    return {key: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for key, v in params.items()}


def current_settings(space: Iterable[str], config: StrictModel) -> dict[str, Any]:
    """The searched keys as a run's settings have them, rounded as a trial's are; None where a block is absent."""
    values = config.model_dump()
    return rounded_params({key: reduce(_get, key.split("."), values) for key in space})


def _get(block: Any, key: str) -> Any:
    return None if block is None else block.get(key)


def fixed_settings(values: Mapping[str, Any], space: Iterable[str]) -> dict[str, Any]:
    """The settings of a run without those that are searched, so equal for all trials."""
    for key in space:
        values = set_path(values, key, None)
    return {key: value for key, value in values.items() if key not in space}


def with_values(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with some values set, by dotted key."""
    for key, value in values.items():
        settings = set_path(settings, key, value)
    return dict(settings)
