"""Changing single values of a YAML file; comments, order and every other line stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from attune.config.resolve import merged, read_yaml
from attune.config.schema import ConfigError
from attune.files import write_atomically

LONG = 4096  # characters of a line


def update_params_file(changes: Mapping[str, Any], path: Path | str) -> None:
    """Sets values by dotted key, in one step: a reader sees the old file or the new one.

    Line endings are kept. A key that is not written yet is added to its block, and a block likewise.

    Raises:
        ConfigError: the value is shared with another block by an anchor, and both would change.
    """
    path = Path(path)
    wanted, written = read_yaml(path), StringIO()
    text = path.read_bytes().decode("utf-8")
    yaml = like(text)
    values = yaml.load(text)
    for dotted, value in changes.items():
        *blocks, last = dotted.split(".")
        wanted = merged(wanted, reduce(lambda inner, key: {key: inner}, [last, *reversed(blocks)], value))
        reduce(lambda place, block: place.setdefault(block, {}), blocks, values)[last] = value
    yaml.dump(values, written)
    if YAML(typ="safe").load(written.getvalue()) != wanted:
        raise ConfigError(
            f"{path}: {', '.join(changes)}: another block shares these by an anchor; write them out there"
        )
    newline = "\r\n" if "\r\n" in text else "\n"
    write_atomically(path, written.getvalue().replace("\r\n", "\n").replace("\n", newline).encode("utf-8"))


def write_yaml(values: Mapping[str, Any], path: Path) -> None:
    """Plain values as a YAML file."""
    round_trip().dump(dict(values), path)


def like(text: str) -> YAML:
    """The YAML that writes a text as it is laid out: with lines of any length, or broken at 80 as DVC breaks them."""
    for width in (80, LONG):
        yaml, written = round_trip(width), StringIO()
        yaml.dump(yaml.load(text), written)
        if written.getvalue() == text.replace("\r\n", "\n"):
            return yaml
    return round_trip()


def round_trip(width: int = LONG) -> YAML:
    """ruamel's YAML that keeps quotes; nothing behind a key is null, as DVC writes it."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = width, True
    return yaml
