"""A large output of DVC in the tracking store: a note and no copy, whose commands bring the output back."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attune import tracking
from attune.tracking import reference
from attune.tracking import store as stores

pytestmark = pytest.mark.integration

MODEL = Path("models/tiny/full")
STAGES = """
stages:
  align:
    foreach: [full]
    do:
      cmd: mkdir -p models/tiny/${item}/unet && cd models/tiny/${item} && echo weights > unet/w && echo {} > run.json
      outs: ["models/tiny/${item}"]
"""


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A repository with git and DVC in which a stage has made a model, and a tracking store."""
    before, environment, folder = Path.cwd(), dict(os.environ), tmp_path_factory.mktemp("my project")
    for key in [key for key in os.environ if key.startswith(("DVC_", "MLFLOW_", "ATTUNE_", "GIT_"))]:
        del os.environ[key]
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.chdir(folder)
    run("git", "init", "--quiet")
    run("dvc", "init", "--quiet")
    run("dvc", "config", "core.analytics", "false")
    Path("dvc.yaml").write_text(STAGES)
    run("dvc", "repro", "--quiet")
    run("git", "add", ".")
    run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "A model")
    stores.prepare()
    stores.connect(stores.DEFAULT, folder)
    yield folder
    os.chdir(before)
    os.environ.clear()
    os.environ.update(environment)


def tracked(root: Path, path: Path, **options: bool):
    """The store's run of a training that has logged a path, and the names of its artifacts."""
    from mlflow import MlflowClient

    with tracking.run("align", {}, tags={}, root=root) as logged:
        logged.artifact(path, **options)
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    found = client.get_run(logged.run_id)
    return client, found, [item.path for item in client.list_artifacts(logged.run_id)]


def test_a_large_output_is_named_with_the_commands_that_bring_it_back(project, monkeypatch):
    monkeypatch.setattr(reference, "COPIED_BYTES", 10)
    client, found, artifacts = tracked(project, MODEL, dvc_keeps_it=True)
    assert artifacts == ["full.reference.json"]
    note = json.loads(Path(client.download_artifacts(found.info.run_id, artifacts[0])).read_text())
    assert (note["path"], note["bytes"]) == (str(MODEL), 11)
    assert f"path: {MODEL}\n      hash: md5\n      md5: {note['md5']}" in Path("dvc.lock").read_text()
    assert found.data.tags["artifact.full"] == f"{MODEL}, 0 MB, md5 {note['md5']}; dvc checkout {MODEL}"
    checkout, commits, elsewhere = note["how to get it"].values()
    commit, _, subject = run(*shlex.split(commits)).strip().partition(" ")
    assert subject == "A model"
    shutil.rmtree(MODEL)
    run(*shlex.split(checkout))
    assert (MODEL / "unet/w").read_text() == "weights\n"
    elsewhere = elsewhere.replace("<address of the repository>", f"'{project}'").replace("<commit>", commit)
    run(*shlex.split(elsewhere), "--out", "copy")
    assert reference.dvc_md5(Path("copy")) == note["md5"]


def test_a_small_output_is_copied_and_so_is_what_dvc_does_not_keep(project, monkeypatch):
    assert tracked(project, MODEL, dvc_keeps_it=True)[2] == ["full"]
    monkeypatch.setattr(reference, "COPIED_BYTES", 1)
    assert tracked(project, MODEL / "unet/w")[2] == ["w"]
    file = reference.large_output(MODEL / "unet/w")
    assert (file.path, file.bytes) == (f"{MODEL}/unet/w", 8)


def test_100_megabytes_are_copied_and_a_byte_more_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Path("weights").open("wb") as file:
        file.truncate(100_000_000)
    assert reference.large_output(Path("weights")) is None
    with Path("weights").open("ab") as file:
        file.write(b"x")
    assert reference.large_output(Path("weights")).bytes == 100_000_001
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        reference.large_output(Path("gone"))
