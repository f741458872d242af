"""What a parameter file may hold: names, numbers, texts and lists in blocks, as deep and large as a person writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from attune.config.schema import ConfigError, join
from attune.text import SHOWN, cut, printable, shown

FILE_BYTES = 2_000_000
DEPTH, VALUES = 20, 50_000  # aliases count as often as they are used, or nine lines make 10^9 values
TEXT = 4096  # characters; also the longest path
LARGEST = 3.4028235e38  # what float32 holds
DIRECTION = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # make a line read otherwise than it is


def check_plain(values: Mapping[Any, Any], path: Path) -> None:
    """Raises ConfigError, naming file and key, at the first entry that no parameter file holds."""
    todo: list[tuple[tuple[str, ...], Any]] = [((), values)]
    count = 0
    while todo:
        keys, value = todo.pop()
        count += 1
        if count > VALUES:
            raise ConfigError(f"{path}: holds more than {VALUES:,} values, counting each use of an alias")
        fault = "is nested too deeply" if len(keys) > DEPTH else _fault(value)
        if fault:
            raise ConfigError(f"{path}:{join('', *(cut(printable(key), 60) for key in keys[:DEPTH]))}: {fault}")
        if isinstance(value, Mapping):
            todo += [((*keys, str(key)), entry) for key, entry in reversed(list(value.items()))]
        elif isinstance(value, list):
            todo += [((*keys, str(i)), entry) for i, entry in reversed(list(enumerate(value)))]


def check_expanded(node: Node | None, path: Path) -> None:
    """Raises ConfigError for a document that aliases and merges (`<<`) would make too large, before they are followed.

    Fourteen lines of merges make 8^13 values.
    """
    sizes: dict[int, int] = {}

    def size(node: Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0  # of a node that is inside of itself, which `check_plain` refuses
            parts = node.value if isinstance(node, SequenceNode) else []
            parts = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else parts
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    if node is not None and size(node) > 2 * VALUES:
        raise ConfigError(f"{path}: holds more than {VALUES:,} values, counting each use of an alias")


def _fault(value: Any) -> str:
    """What is wrong with one value, without what is inside it; empty if nothing is."""
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not isinstance(key, str) or _text_fault(key)), None)
        odd = _text_fault(wrong) if isinstance(wrong, str) else "a name is a text, so put it in quotes"
        return "" if wrong is None and None not in value else f"the key {shown(wrong)}: {odd}"
    if isinstance(value, str):
        return _text_fault(value)
    if isinstance(value, int | float) and LARGEST < abs(value) < float("inf"):
        return f"a number beyond {LARGEST:.2g}, the largest that float32 holds (given {shown(value)})"
    return ""


def _text_fault(text: str) -> str:
    if len(text) > TEXT:
        return f"a text of {len(text):,} characters; at most {TEXT:,} (given {shown(text)})"
    for sign in text:
        if sign in DIRECTION or (ord(sign) < 32 and sign not in "\n\t") or 0x7F <= ord(sign) < 0xA0 or _is_half(sign):
            return f"holds the character U+{ord(sign):04X}, which does not show (given {shown(text)})"
    return ""


def _is_half(sign: str) -> bool:
    """Half of a UTF-16 pair, which no file can be written with."""
    return 0xD800 <= ord(sign) < 0xE000


def yaml_fault(error: Exception) -> str:
    """An error of the YAML library in one line, with the line of the file but without its text."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, MarkedYAMLError):
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    mark = error.problem_mark or error.context_mark
    problem = re.sub(r"^(found duplicate key) \"?(.*?)\"? with value.*", r"\1 \2", error.problem or "", flags=re.S)
    problem = re.sub(r"(constructor for the tag) .*", r"\1 there, and parameter files have none", problem, flags=re.S)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{cut(' '.join(' '.join(part for part in (error.context, problem) if part).split()), SHOWN)}"
