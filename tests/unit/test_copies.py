"""Copies of the checkout: what they have of it, and that a seed's copy is the checkout but for the seed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

import params
import stages
from attune.config.plan import plan_file
from attune.config.resolve import load, read_yaml
from attune.copies import copy_checkout, environment
from attune.paths import Paths
from attune.planning.local_files import Digests
from attune.planning.make import make
from attune.planning.seeds import settings_sha, work_sha
from attune.stages import seeds

RUNS = {"base": {"after": "data"}, "dpo": {"method": "dpo", "after": "data"}}


@pytest.fixture
def project(tmp_path):
    """A checkout with what git ignores: own data, results, a virtual environment; and a folder beside it."""
    root = tmp_path / "checkout"
    stages.write(root, RUNS)
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        (root / name).write_text((stages.ROOT / name).read_text())
    for file in (
        "src/attune/code.py",
        "src/attune/__pycache__/code.pyc",
        ".dvc/config",
        ".git/HEAD",
        ".venv/bin/python",
        ".checkpoints/seconds.json",
        "data/raw/mine/captions.json",
        "data/short/prepared/pairs.parquet",
        "models/mine/weights.safetensors",
        "models/short/dpo/run.json",
        "pictures/0.png",
        "plan/prepare.json",
        "reports/short/summary.json",
        "../elsewhere/1.png",
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("")
    return root


def test_a_copy_has_the_code_and_sees_local_files_and_no_results(project, tmp_path):
    home = project / ".checkpoints/seeds/short/seed1"
    copy_checkout(project, home, {"seed": 1}, cache=tmp_path / "cache")
    for name in ("data/raw/mine/captions.json", "models/mine/weights.safetensors", "pictures/0.png", "models/embedded"):
        assert (home / name).exists(), name
    for name in ("plan", "reports", "data/short", "models/short", ".git", ".venv", "src/attune/__pycache__"):
        assert not (home / name).exists(), name
    assert not (home / "src").is_symlink()
    assert f"dir = {tmp_path / 'cache'}" in (home / ".dvc/config.local").read_text()


def test_a_copy_brought_up_to_date_keeps_what_was_made_in_it(project, tmp_path):
    home = tmp_path / "copy"
    copy_checkout(project, home, {"seed": 1})
    for made in ("data/short/prepared/new.parquet", ".checkpoints/align@dpo/about.json", "dvc.lock"):
        (home / made).parent.mkdir(parents=True, exist_ok=True)
        (home / made).write_text("made")
    (project / "src/attune/code.py").write_text("changed")
    (project / "more").mkdir()
    copy_checkout(project, home, {"seed": 1})
    assert (home / "src/attune/code.py").read_text() == "changed"
    assert (home / "data/short/prepared/new.parquet").read_text() == "made"
    assert (home / ".checkpoints/align@dpo/about.json").read_text() == "made"
    assert (home / "dvc.lock").read_text() == "made"
    assert (home / "more").is_dir()
    assert not (project / "data/short/prepared/new.parquet").exists()


def test_the_settings_are_the_checkouts_but_for_the_seed(project, tmp_path):
    """params.local.yaml counts, a seed there too."""
    (project / "params.local.yaml").write_text("short: {seed: 7, threads: 3, methods: {dpo: {beta: 12}}}\n")
    copy_checkout(project, tmp_path / "copy", {"seed": 8})
    assert load(tmp_path / "copy") == replace(load(project), seed=8)
    assert load(project).threads == 3


def test_paths_out_of_the_checkout_are_the_same_in_the_copy(project):
    profile = read_yaml(project / "params/short.yaml")
    block = {"source": "folder", "path": "../elsewhere", "test_list": "pictures/tests.txt"}
    params.write(project, read_yaml(project / "params.yaml"), {**profile, "data": block})
    home = project / ".checkpoints/seeds/short/seed1"
    copy_checkout(project, home, {"seed": 1})
    data = read_yaml(home / "params/short.yaml")["data"]
    assert data == {**block, "path": str((project / "../elsewhere").resolve())}


def test_what_identifies_a_seeds_run(tmp_path):
    """The seed is no setting; a setting is one; both and the code make the work."""
    stages.write(tmp_path, RUNS)
    with stages.inside(tmp_path):
        settings, digests = load(), Digests(tmp_path / "digests.json")
        first, second = (make(replace(settings, seed=seed), digests) for seed in (0, 1))
        stages.write(tmp_path, RUNS, methods__dpo__beta=77)
        third = make(load(), digests)
    assert settings_sha(first) == settings_sha(second) != settings_sha(third)
    assert len({work_sha(plans) for plans in (first, second, third)}) == 3
    dpo = next(file for file in first if file.name == "align-dpo.json")
    edited = first | {dpo: first[dpo].model_copy(update={"code": {"attune.methods.dpo": "other"}})}
    assert settings_sha(edited) == settings_sha(first)
    assert work_sha(edited) != work_sha(first)


def test_other_seeds_are_inputs_of_the_report(tmp_path):
    """With the settings that they must have; the own seed's file is no input, as the report itself is newer."""
    stages.write(tmp_path, RUNS)
    with stages.inside(tmp_path):
        settings, digests, folder = load(), Digests(tmp_path / "digests.json"), Paths("short").seeds
        report = plan_file("report")
        folder.mkdir(parents=True)
        (folder / "seed0.json").write_text("own")
        alone = make(settings, digests)[report]
        (folder / "seed1.json").write_text("other")
        plans = make(settings, digests)
    assert (alone.files, alone.settings) == ({}, None)
    assert list(plans[report].files) == ["reports/short/seeds/seed1.json"]
    assert plans[report].settings == settings_sha(plans)


def test_a_repro_of_its_own_knows_nothing_of_the_stage_that_starts_it(monkeypatch):
    monkeypatch.setenv("DVC_ROOT", "/elsewhere")
    monkeypatch.setenv("DVC_EXP_NAME", "strong")
    found = environment(tracked=False)
    assert not {"DVC_ROOT", "DVC_EXP_NAME"} & set(found)
    assert found["ATTUNE_TRACKING"] == "off"
    assert found["PATH"].startswith(str(Path(sys.executable).parent))


def test_what_seeds_will_take_is_said(project, monkeypatch):
    (project / "data/short/prepared/pairs.parquet").write_bytes(bytes(3_000_000))
    with stages.inside(project):
        settings = load()
        assert seeds.needed(settings, 2, 1).startswith("2 to run, 1 at a time: time not known before a first run, 6")
        stages_of_all = ["prepare", "report", *(f"{s}@{r}" for s in ("align", "generate", "evaluate") for r in RUNS)]
        Path(".checkpoints/seconds.json").write_text(str(dict.fromkeys(stages_of_all, 900)).replace("'", '"'))
        assert "about 4.0 hours" in seeds.needed(settings, 2, 1)
        assert "about 2.0 hours" in seeds.needed(settings, 2, 2)


@pytest.mark.parametrize("given", ["0", "-1", "many", "1.5"])
def test_a_number_of_seeds_is_wanted(given, capsys):
    with pytest.raises(SystemExit):
        stages.call("seeds", "--n", given)
    assert f"a whole number from 1 is wanted, not '{given}'" in capsys.readouterr().err
