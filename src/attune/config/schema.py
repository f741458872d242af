"""The base of all settings: strict, immutable models, the types their fields have, and how they are checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, get_args, get_origin

from annotated_types import Le, Lt
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from attune.text import message, printable, shown

LARGEST = 10**9  # of whole numbers without a limit of their own: batches, prompts, trials
_BLOCK = re.compile(r"a valid dictionary( or instance of \w+)?")
MANY = 10**6  # of what a machine holds at once


class ConfigError(ValueError):
    """A setting is wrong; the message names its key, and the file where that is not params.yaml."""

    def __init__(self, text: str):
        super().__init__(message(text))


class StrictModel(BaseModel):
    """A block of settings: an unknown key, a wrong type or a value out of range is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_possible(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses a whole number that can only be a slip, where a field states no limit itself."""
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        limit = MANY if str(info.field_name).endswith("batch_size") else LARGEST
        limits_itself = any(isinstance(rule, Le | Lt) for rule in cls.model_fields[str(info.field_name)].metadata)
        if abs(value) > limit and not limits_itself:
            raise ValueError(f"no machine can do that many; at most {limit:,}")
        return value


def _whole_number_as_float(value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:
        raise ValueError("no number of 64 bits is that large") from None


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
        found: dict[str, list[Any]] = {}
        for item in error.errors(include_url=False):
            keys = _keys(values, item["loc"], item["type"] == "missing")
            found.setdefault(join(where, *map(_part, keys)), []).append(item)
        raise ConfigError("\n".join(_problem(model, key, items) for key, items in found.items())) from None


def _problem(model: type[StrictModel], key: str, items: Sequence[Any]) -> str:
    """What is wrong with one key; where a value may be one of several things, each of them refuses it."""
    first, *others = dict.fromkeys(_BLOCK.sub("a block of settings", item["msg"]) for item in items)
    said = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    kind, given = items[0]["type"], items[0]["input"]
    if kind == "missing":
        return f"{key}: {said}"
    if kind != "extra_forbidden":
        return f"{key}: {said} (given {shown(given)})"
    *block, name = items[0]["loc"]
    return f"{key}: {said}; {known_keys(_at(model, block), str(name))}"


def known_keys(block: type[StrictModel], name: str) -> str:
    """The keys of a block, and the one of them that `name` may be a slip of, as half a sentence."""
    known = [field.alias or key for key, field in block.model_fields.items()]
    near = get_close_matches(name[:50], known, 1)
    return f"known keys: {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")


def _keys(values: Any, loc: Sequence[Any], is_missing: bool) -> list[Any]:
    """The keys that lead to a value, without the names of alternatives that pydantic puts between them."""
    found: list[Any] = []
    for part in loc:
        is_key = isinstance(values, Mapping) and part in values
        if is_key or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            values = values[part]
            found.append(part)
    return [*found, loc[-1]] if is_missing else found


def _part(key: Any) -> str:
    """One part of a dotted key, in few printable characters."""
    text = printable(str(key)[:100])
    return text if len(str(key)) <= 100 else f"{text}..."


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
            raise ConfigError(f"{where}: no such key; {known_keys(place, name)}")
    found = _types(fields[last].annotation if fields else place)
    numbers = [kind for kind in (float, int) if kind in found]
    if not numbers or bool in found:
        raise ConfigError(f"{where}: only a number has a range; give choices")
    return numbers[0]


def _types(annotation: Any) -> set[type]:
    """The plain types an annotation is made of: {float, NoneType} of `Real | None`."""
    return {annotation} if isinstance(annotation, type) else set().union(*map(_types, get_args(annotation)))


def _at(model: type[StrictModel], place: Iterable[Any]) -> Any:
    """The block at `place` inside a block, or the type of what is there instead.

    A step leads into a field of a block, or into an entry of a mapping or a list, whose entries are of one type.
    """
    found: Any = model
    for name in place:
        if isinstance(found, type) and issubclass(found, StrictModel):
            named = {field.alias or key: field.annotation for key, field in found.model_fields.items()}
            found = _plain(named.get(name, found))
        elif get_args(found):
            found = _plain(get_args(found)[-1])
    return found


def _plain(kind: Any) -> Any:
    """A type without null beside it: the block of `Block | None`; of other alternatives the first with parts."""
    if get_origin(kind) in (None, list, dict, Mapping):
        return kind
    parts = [part for part in get_args(kind) if part is not type(None)]
    blocks = [part for part in parts if isinstance(part, type) and issubclass(part, StrictModel)]
    return blocks[0] if blocks else kind
