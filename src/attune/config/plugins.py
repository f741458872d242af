"""A plug-in is a file: `method: spo` means attune/methods/spo.py. No registry, no decorator.

A method, a scorer and a source of data bring a class `Config`: what may be set of them. Settings are checked before
any work, so the modules must be quick to import: torch they may import, transformers and diffusers only in the
functions that load something.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from attune.config.schema import ConfigError, StrictModel, check
from attune.text import shown

KINDS = {"methods": "methods", "rewards": "rewards", "backbones": "backbones", "sources": "data.sources"}
ROOT = Path(__file__).parents[1]


def available(kind: str) -> list[str]:
    """Names of all plug-ins of a kind."""
    folder = ROOT / KINDS[kind].replace(".", "/")
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def module_name(kind: str, name: str) -> str:
    """The plug-in's module."""
    return f"attune.{KINDS[kind]}.{name}"


def find(kind: str, name: str | None, where: str) -> None:
    """Raises ConfigError, naming the key `where` and what exists, if there is no such plug-in."""
    if name not in available(kind):
        raise ConfigError(f"{where}: no {kind} plug-in named {shown(name)}; there are {', '.join(available(kind))}")


def load(kind: str, name: str) -> ModuleType:
    """The plug-in's module, imported. Raises ConfigError as `find`."""
    find(kind, name, kind)
    return importlib.import_module(module_name(kind, name))


def config_class(kind: str, name: str) -> type[StrictModel]:
    """The plug-in's `Config`."""
    return load(kind, name).Config


def plugin_config(kind: str, name: str, block: Any, where: str) -> Any:
    """A plug-in's settings, checked by its own Config; `where` is their key, for messages."""
    find(kind, name, where)
    return check(config_class(kind, name), block, where)


def needs(method: str | None, what: str) -> bool:
    """Whether a method needs `preference_model` or `rewards`."""
    return method is not None and what in load("methods", method).Method.needs


def paper(kind: str, name: str) -> str | None:
    """The number at arXiv of the paper that the plug-in's docstring names first."""
    found = re.search(r"arXiv:(\d{4}\.\d{4,5})", load(kind, name).__doc__ or "")
    return found[1] if found else None


def changed_settings(kind: str, name: str, settings: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that are not the plug-in's defaults, which for a method are the paper's: dotted key, value, default."""
    default = _flat(config_class(kind, name).model_construct().model_dump(mode="json"))
    return [(key, value, default.get(key)) for key, value in _flat(settings).items() if value != default.get(key)]


def _flat(values: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{start}{key}.") if isinstance(value, Mapping) else {f"{start}{key}": value}
    return found
