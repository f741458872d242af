"""What the cells of data sets mean: text, numbers, flags and splits, in whatever type they are written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from attune.data.quarantine import RejectedRow

YES = ("true", "t", "yes", "y", "on")
NO = ("false", "f", "no", "n", "off")
LIKED = ("up", "like", "liked", "good", "+1", "\N{THUMBS UP SIGN}")
DISLIKED = ("down", "dislike", "disliked", "bad", "\N{THUMBS DOWN SIGN}")
NOTHING = ("", "none", "null", "nan", "na", "n/a")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
KINDS = {str: "text", bytes: "bytes", bool: "a truth value", int: "a number", float: "a number", type(None): "nothing"}
FOUND_CHARS = 40  # of a cell that is quoted


def as_float(value: Any) -> float | None:
    """A number or truth value, however the data set writes it; None if it is missing, NaN or not a number."""
    word = _word(value)
    if word in YES or word in NO:
        return float(word in YES)
    if word is not None and ("_" in word or not word.isascii()):  # `float` reads 1_0 as 10, and digits of any script
        return None
    try:
        return None if math.isnan(number := float(_plain(value))) else number
    except (TypeError, ValueError, OverflowError):
        return None


def as_flag(value: Any, column: str) -> bool | None:
    """What a flag says; None where it says nothing.

    Raises:
        RejectedRow: `malformed_row`: it is neither yes nor no.
    """
    word, number = _word(value), as_float(value)
    if value is None or word in NOTHING or _is_nan(value):
        return None
    if number not in (0, 1):
        raise RejectedRow("malformed_row", f"column {column}: expected true or false, found {shown(value)}")
    return bool(number)


def as_verdict(value: Any) -> bool | None:
    """Whether somebody liked something: a flag, 1 or -1, or a word as up, thumbs down, liked; None where it is empty.

    Raises:
        RejectedRow: `label_value`: it says neither.
    """
    word = re.sub(r"^thumbs?[ _-]*", "", _word(value) or "")
    if word in LIKED or word in DISLIKED:
        return word in LIKED
    try:
        return False if as_float(value) == -1 else as_flag(value, "liked")
    except RejectedRow:
        expected = "1, true, yes, up or liked, or 0, false, no, down or disliked"
        raise RejectedRow("label_value", f"column liked: expected {expected}, found {shown(value)}") from None


def as_text(value: Any, column: str) -> str | None:
    """A prompt: text, UTF-8 bytes, or a list of one text; None where there is none.

    Raises:
        RejectedRow: `malformed_row`: it is anything else.
    """
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | bytes):
        value = value[0]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise RejectedRow("malformed_row", f"column {column}: expected text, found bytes not UTF-8") from None
    if value is None or isinstance(value, str) or _is_nan(value):
        return value if isinstance(value, str) else None
    raise RejectedRow("malformed_row", f"column {column}: expected text, found {shown(value)}")


def as_split(value: Any) -> str | None:
    """The split that a word names; None where there is none.

    Raises:
        RejectedRow: `malformed_row`: no split is called so.
    """
    word = _word(value)
    if value is None or word == "" or _is_nan(value):
        return None
    if word not in SPLIT_WORDS:
        words = "train, validation (val, dev) or test"
        raise RejectedRow("malformed_row", f"column split: expected {words}, found {shown(value)}")
    return SPLIT_WORDS[word]


def as_image(value: Any, column: str) -> bytes | None:
    """An encoded image: bytes, a list of them as numbers, or either in the mapping of the `datasets` library.

    Raises:
        RejectedRow: `missing_image`: it only names a file; `malformed_row`: it is anything else.
    """
    if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is not None:
        where = f"column {column}: only the path {str(value['path'])[:FOUND_CHARS]!r}"
        raise RejectedRow("missing_image", f"{where}; expected the bytes of the image in the file itself")
    value = value["bytes"] if isinstance(value, Mapping) and "bytes" in value else value
    try:
        if value is None or isinstance(value, bytes | bytearray | memoryview | list):
            return None if value is None else bytes(value)
    except (TypeError, ValueError):  # a list of something else
        pass
    expected = "the bytes of an encoded image"
    raise RejectedRow("malformed_row", f"column {column}: expected {expected}, found {shown(value)}")


def shown(value: Any) -> str:
    """What a cell holds, in a few words: its type, and its value where that is short."""
    kind = next((name for kind, name in KINDS.items() if isinstance(value, kind)), f"a {type(value).__name__}")
    if isinstance(value, str | bytes):
        short = value[:FOUND_CHARS]
        return f"{kind} {short!r}{'...' if len(value) > FOUND_CHARS else ''}"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, value))}"[: 3 * FOUND_CHARS]
    return f"{kind}, {value!r:.{FOUND_CHARS}}" if isinstance(value, float | int) else kind


def _plain(value: Any) -> Any:
    """A number of numpy's or Arrow's as Python's."""
    return value.item() if hasattr(value, "item") else value


def _word(value: Any) -> str | None:
    """The cell in lower case, if it is text."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return value.strip().lower() if isinstance(value, str) else None


def _is_nan(value: Any) -> bool:
    return isinstance(_plain(value), float) and math.isnan(value)
