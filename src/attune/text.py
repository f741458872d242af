"""Text from outside for people to read: on one line, without passwords and control characters, and short."""

from __future__ import annotations

import re
import reprlib
from typing import Any

SHOWN = 200  # characters of a value
LINE = 700  # of a message
LINES = 8
_SECRET = re.compile(
    r"((?:password|passwd|pwd|passphrase|token|secret|api[_-]?key|access[_-]?key|credentials?|signature)['\"]?\s*[=:]\s*)"
    r"('[^']*'|\"[^\"]*\"|[^&\s'\",;}]+)",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text with user and password hidden in addresses, and what follows `password=`, `token=` and the like.

    In an address all up to the last "@" is hidden, as a password may hold "@" and "/".
    """
    return _SECRET.sub(r"\1***", re.sub(r"\S+", lambda word: _without_user(word[0]), text))


def has_secret(text: str) -> bool:
    """Whether it says `password=`, `token=` and the like."""
    return _SECRET.search(text) is not None


def _without_user(word: str) -> str:
    start, end = word.find("//"), word.rfind("@")
    return f"{word[: start + 2]}***{word[end:]}" if -1 < start < end else word


def printable(text: str) -> str:
    """The text with line ends, control characters and marks of writing direction as escapes."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def cut(text: str, length: int) -> str:
    """The text, shortened in its middle, as a remedy stands at the end."""
    tail = length // 3
    return text if len(text) <= length else f"{text[: length - tail - 5]} ... {text[-tail:]}"


def shown(value: Any) -> str:
    """A value as a message quotes it: like `repr`, in at most 200 characters, without a password."""
    return cut(redact(_SHORT.repr(value)), SHOWN)


def message(text: str) -> str:
    """A message of a few lines of a sensible length, each printable and without a password."""
    lines = text.split("\n")
    some = [cut(printable(redact(line)), LINE) for line in lines[:LINES]]
    return "\n".join([*some, *([f"and {len(lines) - LINES} more"] if len(lines) > LINES else [])])


class _Short(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        """Hides before it cuts: half an address would no longer be known for one."""
        start, end = x.find("//") + 2 if "//" in x else 0, x.rfind("@")
        has_user = ":" in x[:end] and start < end  # also where the scheme was forgotten, or a blank got in
        return repr(cut(redact(f"{x[:start]}***{x[end:]}" if has_user else x), self.maxstring))

    def repr_int(self, x: int, level: int) -> str:
        return str(x) if x.bit_length() < 200 else f"a whole number of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlevel = 180, 80, 3
