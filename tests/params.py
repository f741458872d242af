"""Parameter files for tests: the repository's own, changed value by value and written to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from attune.config.plan import Plugin
from attune.config.resolve import read_yaml
from attune.config.schema import set_path

ROOT = Path(__file__).parents[1]


def shipped(profile: str = "tiny") -> tuple[dict[str, Any], dict[str, Any]]:
    """params.yaml and params/<profile>.yaml as plain values."""
    return read_yaml(ROOT / "params.yaml") | {"profile": profile}, read_yaml(ROOT / "params" / f"{profile}.yaml")


def changed(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with values set by dotted key, `__` for a dot; ... (an ellipsis) removes a key."""
    for key, value in changes.items():
        dotted = key.replace("__", ".")
        values = without(values, dotted) if value is ... else set_path(values, dotted, value)
    return values


def without(values: dict[str, Any], dotted: str) -> dict[str, Any]:
    """A copy without a key."""
    key, _, rest = dotted.partition(".")
    if not rest:
        return {name: value for name, value in values.items() if name != key}
    return {**values, key: without(values[key], rest)}


def write(folder: Path, params: dict[str, Any], profile: dict[str, Any]) -> Path:
    """Both files below a folder, which is returned."""
    (folder / "params").mkdir(parents=True, exist_ok=True)
    for path, values in ((folder / "params.yaml", params), (folder / "params" / f"{params['profile']}.yaml", profile)):
        YAML().dump(values, path)
    return folder


def scorers(profile: dict[str, Any]) -> dict[str, Plugin]:
    """A profile's scorers as the plans hold them."""
    named = {name: dict(block) for name, block in profile["scorers"].items()}
    return {
        name: Plugin(kind="rewards", name=block.pop("scorer", name), settings=block) for name, block in named.items()
    }
