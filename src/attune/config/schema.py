"""The base of all settings: strict, immutable models, the types their fields have, and how they are checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A setting is wrong; the message names its key, and the file where that is not params.yaml."""


class StrictModel(BaseModel):
    """A block of settings: an unknown key, a wrong type or a value out of range is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _whole_number_as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Float = Annotated[float, BeforeValidator(_whole_number_as_float)]
"""A float that may be written without a point: `beta: 10`."""


class SearchRange(StrictModel):
    """A searched setting: from `low` to `high`, or one of `choices`."""

    low: Float | None = Field(None, description="included")
    high: Float | None = Field(None, description="included")
    log: bool = Field(False, description="drawn evenly in the logarithm")
    choices: list[bool | int | float | str | None] | None = Field(None, min_length=1, description="a grid's points")

    @model_validator(mode="after")
    def _one_of_two(self) -> SearchRange:
        low, high, chosen = self.low, self.high, self.choices is not None
        if (low is None) != chosen or (high is None) != chosen:
            raise ValueError("either low and high, or choices")
        if low is not None and high is not None and low >= high:
            raise ValueError("low must be less than high")
        if self.log and (low is None or low <= 0):
            raise ValueError("log is for a range above 0")
        return self

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends of a range. Raises ValueError of choices, which have none."""
        if self.low is None or self.high is None:
            raise ValueError("choices have no ends")
        return self.low, self.high


def check(model: type[StrictModel], values: Any, where: str = "") -> Any:
    """Validates one block, found at the key `where`; every problem is reported with its full key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = join(where, *map(str, item["loc"]))
            unknown = item["type"] == "extra_forbidden"
            known = f"; known keys: {', '.join(_at(model, item['loc'][:-1]).model_fields)}" if unknown else ""
            given = "" if item["type"] in ("missing", "extra_forbidden") else f" (given {item['input']!r})"
            problems.append(f"{key}: {item['msg']}{given}{known}")
        raise ConfigError("\n".join(problems)) from None


def join(where: str, *keys: str) -> str:
    """A key inside a block: `params/tiny.yaml:seed` as DVC writes it, with dots between all further keys."""
    inner = ".".join(keys)
    return f"{where}{inner}" if not where or not inner or where.endswith(":") else f"{where}.{inner}"


def set_path(values: Mapping[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy of nested values with one of them set: `set_path({"lora": {"rank": 4}}, "lora.rank", 8)`."""
    key, _, rest = dotted.partition(".")
    if not rest:
        return {**values, key: value}
    if not isinstance(values.get(key), Mapping):
        raise ConfigError(f"{key}: is no block that {rest} could be set in")
    return {**values, key: set_path(values[key], rest, value)}


def number_type(model: type[StrictModel], dotted: str, where: str) -> type[int] | type[float]:
    """What kind of number the setting `dotted` of a block is, of which there may be a range."""
    *blocks, last = dotted.split(".")
    for depth, name in enumerate([*blocks, last]):
        place = _at(model, blocks[:depth])
        fields = getattr(place, "model_fields", {})
        if fields and name not in fields:
            raise ConfigError(f"{where}: no such key; known keys: {', '.join(fields)}")
    found = _types(fields[last].annotation if fields else place)
    numbers = [kind for kind in (float, int) if kind in found]
    if not numbers or bool in found:
        raise ConfigError(f"{where}: only a number has a range; give choices")
    return numbers[0]


def _types(annotation: Any) -> set[type]:
    """The plain types an annotation is made of: {float, NoneType} of `Real | None`."""
    return {annotation} if isinstance(annotation, type) else set().union(*map(_types, get_args(annotation)))


def _at(model: type[StrictModel], place: Sequence[Any]) -> Any:
    """The block at `place` inside a block, or the type of what is there instead."""
    found: Any = model
    for name in place:
        kind = found.model_fields[name].annotation
        found = next(
            (part for part in get_args(kind) if isinstance(part, type) and issubclass(part, StrictModel)), kind
        )
    return found
