"""docs/tutorial.md does what it says: every block marked `sh` is run, in order, in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from clones import CODE, JUNK, ROOT
from PIL import Image

from attune.evaluation.summary import Summary

pytestmark = pytest.mark.pipeline

PAGE = ROOT / "docs/tutorial.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> tuple[Path, list[str]]:
    """The copy after all blocks, and what each of them said."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in (
        *CODE,
        "Makefile",
        "requirements.txt",
        "docs",
        "data/.gitignore",
        "models/.gitignore",
        "reports/.gitignore",
    ):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, target, **({"ignore": JUNK} if (ROOT / name).is_dir() else {}))
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder, [run(block, folder) for block in BLOCKS]


def run(block: str, folder: Path) -> str:
    """A block in the copy, with the environment of these tests in the place of one that make would build."""
    ready, wrapper = folder / ".ready", folder / ".bin" / "make"
    ready.touch()
    wrapper.parent.mkdir(exist_ok=True)
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("make")} READY={ready} VENV={sys.prefix} "$@"\n')
    wrapper.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "ATTUNE_", "PYTEST_", "GIT_"))}
    env |= {"ATTUNE_TRACKING": "off", "PATH": f"{wrapper.parent}:{env['PATH']}"}
    done = subprocess.run(["bash", "-ec", block], cwd=folder, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{block}: {done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done.stdout


def test_the_page_has_the_whole_path():
    text = "\n".join(BLOCKS)
    assert all(f"make {name}" in text for name in ("init", "inspect", "plan", "repro", "sample", "package"))


def test_every_block_runs_and_says_what_came_of_it(said):
    folder, texts = said
    assert "source folder: 40 pairs" in texts[0]
    assert any(re.search(r"^dpo +[\d.]+ +[+-]", text, flags=re.MULTILINE) for text in texts)
    assert any(re.search(r"^kto +[\d.]+ +[+-]", text, flags=re.MULTILINE) for text in texts)
    for name in ("own", "thumbs"):
        assert (folder / "reports" / name / "report.html").exists()
    assert (folder / "reports/own/data.html").exists()


def test_the_runs_are_compared_on_prompts_that_no_training_saw(said):
    folder, _ = said
    own, thumbs = (
        Summary.from_json((folder / f"reports/{name}/summary.json").read_text()) for name in ("own", "thumbs")
    )
    assert set(own.methods) == {"base", "dpo"}
    assert set(thumbs.methods) == {"base", "kto"}
    assert own.protocol.n_prompts == 8
    assert thumbs.protocol.n_prompts == 12


def test_the_package_and_the_pictures_are_there(said):
    folder, _ = said
    package = folder / "packages/own/dpo"
    assert {"README.md", "dpo.safetensors", "diffusers"} <= {path.name for path in package.iterdir()}
    for profile in ("own", "thumbs"):
        (picture,) = (folder / "reports" / profile / "samples").glob("*.png")
        assert Image.open(picture).width > 300
