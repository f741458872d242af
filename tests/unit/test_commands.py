"""No value of the parameter files reaches a shell: DVC's commands are the same for every run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import params as files
from attune.config.resolve import load, read_yaml
from attune.config.schema import ConfigError

ROOT = Path(__file__).parents[2]


def commands(values: Any) -> Iterator[str]:
    """All that stands behind a `cmd`, at any depth."""
    for key, value in values.items() if isinstance(values, dict) else ():
        yield from [value] if key == "cmd" else commands(value)


@pytest.mark.parametrize("file", ["dvc.yaml", "sweeps/dvc.yaml"])
def test_commands_hold_no_value(file):
    found = list(commands(read_yaml(ROOT / file)))
    assert len(found) >= 1
    assert not [line for line in found if not line.startswith("PYTHONPATH=src python -m attune.stages.") or "$" in line]


@pytest.mark.parametrize("name", ["sft;touch x", "a'b", 'a"b', "a\nb", "$(x)", "a b", "../a", "", "-a", "a" * 101])
def test_a_run_whose_name_means_something_to_a_shell_or_a_path_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    params, profile = files.shipped()
    runs = {**params["runs"], name: {"method": "sft", "after": "data"}}
    with pytest.raises(ConfigError) as caught:
        load(files.write(tmp_path, {**params, "runs": runs}, profile))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("runs.")
