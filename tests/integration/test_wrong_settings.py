"""A mistake in the parameter files is told before DVC removes anything, by `dvc repro` and by `attune repro`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import stages

pytestmark = pytest.mark.integration

RUNS = {"base": {"after": "data"}, "dpo": {"method": "dpo", "after": "data"}}
CODE = ("src", "dvc.yaml", ".dvcignore")
PROFILE, PARAMS = "params/short.yaml", "params.yaml"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A checkout in which every output is there."""
    folder = stages.write(tmp_path_factory.mktemp("checkout"), RUNS)
    for name in CODE:
        source = stages.ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    with stages.inside(folder):
        stages.write_plans()
    for file in ("models/short/dpo/run.json", "models/short/base/run.json", "data/short/prepared/pairs.parquet"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("made in hours")
    return folder


def files(checkout: Path) -> dict[str, bytes]:
    """All that stages have made, with its content."""
    made = [file for name in ("plan", "models/short", "data", "reports") for file in (checkout / name).rglob("*")]
    return {str(file.relative_to(checkout)): file.read_bytes() for file in made if file.is_file()}


def mistaken(checkout: Path, name: str, old: str, new: str) -> bytes:
    """Writes the mistake; the text without it."""
    before = (checkout / name).read_bytes()
    text = before.decode()
    assert old in text
    (checkout / name).write_text(new if not old else text.replace(old, new, 1))
    return before


def dvc_repro(checkout: Path) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith((*stages.PREFIXES, "PYTHONPATH"))}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "DVC_SITE_CACHE_DIR": f"{checkout}.site"}
    words = [sys.executable, "-m", "dvc", "repro"]
    done = subprocess.run(words, cwd=checkout, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode, done.stdout
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        (PROFILE, "beta: 1000", "betta: 1000", ["params/short.yaml:methods.dpo.betta", "known keys"]),
        (PROFILE, "seed: 0", "sead: 0", ["params/short.yaml:sead", "did you mean seed?"]),
        (PARAMS, "runs:", "profiles: {}\nruns:", ["profiles: ", "did you mean profile?"]),
        (PARAMS, "profile: short", "profile: shrot", ["params/shrot.yaml"]),
        (PROFILE, "seed: 0", "seed: [0", ["params/short.yaml", "line"]),
        (PARAMS, "method: dpo", "method: dpo\n    aftr: data", ["runs.dpo.aftr", "did you mean after?"]),
    ],
)
def test_dvc_repro_removes_nothing(checkout, name, old, new, said):
    made = files(checkout)
    before = mistaken(checkout, name, old, new)
    try:
        told = dvc_repro(checkout)
    finally:
        (checkout / name).write_bytes(before)
    assert all(part in told for part in said), told
    assert files(checkout) == made
    assert len(made) > 10


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        (PROFILE, "beta: 1000", "betta: 1000", r"^params/short.yaml:methods.dpo.betta: .*known keys"),
        (PROFILE, "batches: 3", "batchs: 3", r"(?s)params/short.yaml:[a-z.]+.batchs: .*did you mean batches\?"),
        (PROFILE, "seed: 0", "sead: 0", r"(?s)params/short.yaml:sead: .*did you mean seed\?"),
        (PROFILE, "seed: 0", "seed: 0\nseed: 1", "^params/short.yaml is not valid YAML: line 2.*duplicate key seed"),
        (PROFILE, "seed: 0", "\tseed: 0", "^params/short.yaml is not valid YAML: line 1"),
        (PROFILE, "seed: 0", "seed: [0", "^params/short.yaml is not valid YAML: line"),
        (PROFILE, "", "", "^params/short.yaml must be a mapping"),
        (PARAMS, "runs:", "profiles: {}\nruns:", r"^profiles: .*did you mean profile\?"),
        (
            PARAMS,
            "    after: data",
            "    aftr: data",
            r"(?s)^runs.base.after: .*\nruns.base.aftr: .*did you mean after\?",
        ),
        (PARAMS, "profile: short", "profile: shrot", r"^profile: there is no params/shrot.yaml; there are: .*short"),
        (PARAMS, "profile: short", "\tprofile: short", "^params.yaml is not valid YAML"),
        (PARAMS, "", "", "^params.yaml must be a mapping"),
    ],
)
def test_attune_repro_tells_it_before_dvc_starts(checkout, name, old, new, said):
    made = files(checkout)
    before = mistaken(checkout, name, old, new)
    try:
        with stages.inside(checkout), pytest.raises(SystemExit, match=said):
            stages.call("repro")
    finally:
        (checkout / name).write_bytes(before)
    assert files(checkout) == made
    assert not (checkout / ".checkpoints/logs").exists()


@pytest.mark.parametrize("name", [PROFILE, PARAMS])
def test_a_parameter_file_that_is_missing_is_named(checkout, name):
    made, before = files(checkout), (checkout / name).read_bytes()
    (checkout / name).unlink()
    try:
        with stages.inside(checkout), pytest.raises(SystemExit, match=name):
            stages.call("repro")
    finally:
        (checkout / name).write_bytes(before)
    assert files(checkout) == made
