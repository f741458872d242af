"""The command `attune`: what it starts, from where, and that no text given to make is run as code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attune.__main__ import COMMANDS, checkout
from attune.stages.repro import table

ROOT = Path(__file__).parents[2]


def attune(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-m", "attune", *words], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_and_has_a_target_of_make(name):
    module = f"attune.stages.{name.replace('-', '_')}"
    assert importlib.util.find_spec(module) is not None
    assert re.search(rf"^{name}: ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert f"$(ATTUNE) {name}" in (ROOT / "Makefile").read_text()


def test_help_lists_every_command_and_an_unknown_one_is_an_error():
    assert all(name in attune().stdout for name in COMMANDS)
    done = attune("tune")
    assert done.returncode == 1
    assert "there is no command 'tune'" in done.stderr


def test_it_works_anywhere_in_a_checkout_and_nowhere_else(tmp_path):
    assert checkout(ROOT / "docs" / "methods") == ROOT
    assert attune("plan", "--help", cwd=ROOT / "docs").returncode == 0
    done = attune("plan", cwd=tmp_path)
    assert done.returncode == 1
    assert "works in a checkout" in done.stderr


@pytest.mark.parametrize("text", ["$(touch x)", "`touch x`", '"; touch x; "', "it's $HOME", "a\\b"])
def test_make_passes_a_prompt_on_as_it_is(text, tmp_path):
    (tmp_path / "ready").touch()
    command = ["make", "-s", "-f", str(ROOT / "Makefile"), "-o", str(tmp_path / "ready"), f"READY={tmp_path}/ready"]
    echo = f"{sys.executable} -c 'import sys; sys.stdout.write(repr(sys.argv[1:]))'"
    done = subprocess.run(
        [*command, "sample", f"ATTUNE={echo}", "RUN=dpo", f"PROMPT={text}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == ["sample", "--run", "dpo", "--prompt", text]
    assert not (tmp_path / "x").exists()


def test_a_run_ends_with_a_line_for_each_model():
    text = (ROOT / "reports/tiny/summary.json").read_text()
    oracle = {name: method["scores"]["oracle"]["mean"] for name, method in json.loads(text)["methods"].items()}
    first, _, runs = table(text).partition("\n\n")
    assert f"beats base: oracle rises from {oracle['base']:.3f} to {max(oracle.values()):.3f}" in first
    lines = runs.strip().splitlines()
    assert lines[0].split()[:2] == ["run", "oracle"]
    assert [line.split()[:2] for line in lines[1:]] == [
        [name, f"{oracle[name]:.4g}"] for name in ("base", "sft", "dpo", "spo")
    ]
    assert re.search(r"^dpo +0\.\d+ +\+0\.\d+ \[\+0\.\d+, \+0\.\d+\] +better; hacking: none$", runs, flags=re.MULTILINE)
