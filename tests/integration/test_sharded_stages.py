"""prepare, generate and evaluate on two real processes, killed, and after an output that DVC has in its cache."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest

import stages
from attune.files import digest
from attune.last_output import last_output
from attune.shards import Shards

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
MADE = ("data/short/prepared", "data/short/generated", "reports/short/scores", "reports/short/features")
ENV = {"PYTHONPATH": str(ROOT / "src"), "ATTUNE_TRACKING": "off", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
GENERATED, KEPT = "data/short/generated/base", ".checkpoints/generate-short-base"


def project(folder: Path) -> Path:
    """As the tests of stages have it, with more pairs and images to share."""
    changes = {"data__pair_prompts": 40, "data__train_prompts": 40, "data__images_per_prompt": 3}
    changes |= {"generate__prompts": 5, "generate__sampling__batch_size": 1}
    stages.write(folder, {"base": {"after": "data"}}, **changes)
    with stages.inside(folder):
        stages.write_plans()
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process makes."""
    folder = project(tmp_path_factory.mktemp("one"))
    with stages.inside(folder):
        stages.call("prepare")
        for name in ("align", "generate", "evaluate"):
            stages.call(name, run="base")
    return folder


def test_two_processes_make_what_one_makes(one, tmp_path):
    folder = project(tmp_path)
    for name in ("prepare", "align", "generate", "evaluate"):
        words = [] if name == "prepare" else ["--run", "base"]
        command = [sys.executable, "-m", f"attune.stages.{name}", *words]
        subprocess.run(command, cwd=folder, env=os.environ | ENV | {"ATTUNE_PROCESSES": "2"}, check=True, timeout=200)
    for path in MADE:
        assert digest(folder / path) == digest(one / path), path
    assert (folder / "data/short/quarantine.csv").read_text() == (one / "data/short/quarantine.csv").read_text()
    assert (folder / "reports/short/data.json").read_text() == (one / "reports/short/data.json").read_text()
    assert len(list((folder / "data/short/prepared/latents").iterdir())) > 1


def test_a_killed_stage_goes_on_with_the_next_batch(one, tmp_path, monkeypatch):
    """The launcher of two processes is killed: they end too, and one process goes on."""
    folder = tmp_path / "killed"
    shutil.copytree(one, folder, symlinks=True)
    shutil.rmtree(folder / GENERATED)
    command = [sys.executable, "-m", "attune.stages.generate", "--run", "base"]
    launcher = subprocess.Popen(command, cwd=folder, env=os.environ | ENV | {"ATTUNE_PROCESSES": "2"})
    wait_for(lambda: len(written(folder)) >= 3 or launcher.poll() is not None)
    workers = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers.stdout.split()))
    kept = written(folder)
    assert 3 <= len(kept) < 10
    assert not (folder / GENERATED).exists()
    write, again = Shards.write, []
    monkeypatch.setattr(Shards, "write", lambda self, name, *content: again.append(name) or write(self, name, *content))
    with stages.inside(folder):
        stages.call("generate", run="base")
    assert digest(folder / GENERATED) == digest(one / GENERATED)
    assert len(again) == 10 - len(kept)
    assert (folder / KEPT).exists()  # until the next stage starts, for by then DVC has stored the images
    with stages.inside(folder):
        stages.call("evaluate", run="base")
    assert not (folder / KEPT).exists()


def written(folder: Path) -> list[Path]:
    return [file for file in (folder / KEPT).glob("*.safetensors") if not file.name.startswith(".")]


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_files_of_the_last_output_are_found_where_dvc_keeps_them(tmp_path):
    env = os.environ | {"DVC_NO_ANALYTICS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    (tmp_path / "make.sh").write_text("mkdir -p out/deep; echo one > out/a.txt; echo two > out/deep/b.txt\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  a:\n    cmd: sh make.sh\n    deps: [make.sh]\n    outs: [out]\n")
    for words in (["init", "--no-scm", "-q"], ["repro", "-q"]):
        subprocess.run([sys.executable, "-m", "dvc", *words], cwd=tmp_path, env=env, check=True)
    shutil.rmtree(tmp_path / "out")
    with chdir(tmp_path):
        found = last_output(Path("out"))
        assert {name: file.read_text() for name, file in found.items()} == {"a.txt": "one\n", "deep/b.txt": "two\n"}
        assert last_output(Path("other")) == {}
        shutil.rmtree(".dvc/cache")
        assert last_output(Path("out")) == {}
