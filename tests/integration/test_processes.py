"""Several real processes train what one trains: the same curves and weights; one writes, and a dead one ends all."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

import params
import processes
import tiny
from attune.distributed import Shard
from attune.methods import sft

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENV = {key: value for key, value in os.environ.items() if not key.startswith(("ATTUNE_", "DVC_", "MLFLOW_"))}
ENV |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENV |= {"ATTUNE_TRACKING": "off"}


def run(*words: str, cwd: Path = ROOT, fails: bool = False, **env: str) -> str:
    """A command's stdout and stderr."""
    done = subprocess.run(words, cwd=cwd, env=ENV | env, capture_output=True, text=True, timeout=580)
    said = done.stdout + done.stderr
    assert (done.returncode != 0) is fails, said[-6000:]
    return said


def in_two(what: str, folder: Path, fails: bool = False) -> tuple[str, list[Any]]:
    """What two processes print and leave behind."""
    said = run(*TORCHRUN, "tests/processes.py", what, str(folder), fails=fails)
    return said, [torch.load(file, weights_only=True) for file in sorted(folder.glob("?.pt"))]


# ---------------------------------------------------------------- the same training


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, processes.End]:
    """In a process of its own, too, with the same number of threads."""
    folder = tmp_path_factory.mktemp("one")
    run(sys.executable, "tests/processes.py", "ends", str(folder))
    return torch.load(folder / "0.pt", weights_only=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, processes.End]]:
    return in_two("ends", tmp_path_factory.mktemp("two"))[1]


def distance(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor) -> float:
    """How far two trainings end apart, as a share of the way they went."""
    return ((a - b).norm() / (a - start).norm()).item()


@pytest.mark.parametrize("case", processes.CASES)
def test_two_processes_train_what_one_trains(one, two, case):
    """Apart by rounding of float32 (6e-8), which the betas of 500 and the short way of a few steps make larger.

    Losses and gradient norms within 2e-4, weights within 1e-3 of the way they went, mostly a tenth of that
    (docs/several_gpus.md). Of the preference model's weights 2e-2, because AdamW makes a whole step even of a
    gradient that is nothing but rounding.
    """
    alone, (first, second) = one[case], (rank[case] for rank in two)
    assert first["history"] == second["history"]
    assert torch.equal(first["after"], second["after"])
    assert len(first["history"]) == len(alone["history"]) >= 2
    for ours, expected in zip(first["history"], alone["history"], strict=True):
        assert ours.keys() == expected.keys()
        assert ours == pytest.approx(expected, rel=2e-4, abs=1e-4)
    assert (alone["after"] - alone["before"]).abs().max() > 1e-5
    bound = 2e-2 if case.startswith("spm") else 1e-3
    assert distance(alone["after"], first["after"], alone["before"]) < bound


# ---------------------------------------------------------------- what may go wrong


def batches_done(folder: Path) -> int:
    """Of a checkpoint, whole or in pieces."""
    if (folder / "pieces.json").exists():
        return json.loads((folder / "pieces.json").read_text())["progress"]["batch"]
    return torch.load(folder / "state.pt", weights_only=True)["progress"]["batch"]


@pytest.mark.parametrize("task", ["killed", "killed, every weight"])
def test_a_killed_process_ends_the_other_and_one_process_goes_on(tmp_path, task):
    """kill -9 before batch 3 of 4; a single process resumes what two began, also where each had a piece."""
    began, every_weight = time.monotonic(), "every weight" in task
    said, left = in_two(task, tmp_path, fails=True)
    assert left == []
    assert time.monotonic() - began < 180  # most of it to import torch, on a busy machine
    assert "process 0 of the 2 that work together cannot go on: " in said
    assert "Started again, the work goes on from what was saved last." in said
    assert (tmp_path / "align-dpo-key/pieces.json").exists() == every_weight
    assert batches_done(tmp_path / "align-dpo-key") == 3
    go_on = partial(processes.interrupted, every_weight=every_weight)
    resumed, whole = go_on(tmp_path), go_on(tmp_path / "another")
    gc.collect()
    assert [row["batch"] for row in resumed["history"]] == [0, 1, 2, 3]
    for ours, expected in zip(resumed["history"], whole["history"], strict=True):
        assert ours == pytest.approx(expected, rel=2e-4, abs=1e-4)
    assert distance(whole["after"], resumed["after"], whole["before"]) < 1e-2


def test_an_error_of_one_process_is_the_error_of_all(tmp_path):
    _, (first, second) = in_two("errors", tmp_path)
    assert first["not finite"] == second["not finite"]
    where = first["not finite"].removeprefix("loss is nan at step 2: ")
    assert where == "process 1: the data, x_0 of row 0 of the minibatch, is not finite"
    assert first["ended"] == "KeyError: 'pruned'"
    assert second["ended"] == "EndedElsewhereError: the first process has ended the work: KeyError: 'pruned'"
    assert (first["scores computed"], second["scores computed"]) == ("3", "3")


# ---------------------------------------------------------------- the stages


class Project:
    """A folder in which stages run: the short profile and its plans, the embedded models, prepared data."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "models").mkdir()
        (folder / "models/embedded").symlink_to(ROOT / "models/embedded")
        self.write(batches=3)
        self.stage("prepare")

    def write(self, batches: int, **changes: Any) -> None:
        """The parameter files with that many batches of sft and other changes of it, and the plans."""
        values, profile = params.shipped("short")
        changed = {f"methods__sft__{key}": value for key, value in {"batches": batches, **changes}.items()}
        params.write(self.folder, values, params.changed(profile, **changed))
        self.stage("plan")

    def stage(self, *words: str, **env: str) -> str:
        return run(sys.executable, "-m", f"attune.stages.{words[0]}", *words[1:], cwd=self.folder, **env)

    def left(self, name: str) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
        """The curve and the weights that a training left behind, which are removed."""
        reports, model = self.folder / "reports/short/train", self.folder / "models/short" / name
        curve = pd.read_csv(reports / f"{name}.csv")
        (file,) = model.rglob("*.safetensors")
        tensors = load_file(file)
        shutil.rmtree(reports)
        shutil.rmtree(model)
        return curve, tensors


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize(
    ("name", "command"), [("sft", ("align", "--run", "sft")), ("preference", ("train_preference",))]
)
def test_a_stage_becomes_two_processes_and_leaves_what_it_leaves_alone(project, name, command):
    project.stage(*command)
    curve, weights = project.left(name)
    said = project.stage(*command, ATTUNE_PROCESSES="2")
    again, same = project.left(name)
    assert said.count(f"0/{curve.batch.max() + 1} [") == 1, "one progress bar"
    pd.testing.assert_frame_equal(again, curve, rtol=1e-4, atol=1e-5)
    assert same.keys() == weights.keys()
    apart = sum((same[key] - value).square().sum() for key, value in weights.items()).sqrt()
    assert apart / sum(value.square().sum() for value in weights.values()).sqrt() < 1e-4
    left = {file.name for file in (project.folder / ".checkpoints").iterdir()}
    assert left <= {"costs", "digests.json", "seconds.json", "seconds.lock", "prepare-short.lock"}


def test_full_fine_tuning_in_pieces_leaves_what_one_process_leaves(project):
    """With a validation score and sample images, of which each process computes its part."""
    sampling = {"steps": 2, "eta": 0.0, "guidance_scale": 1.0, "batch_size": 2}
    validation = {"scorer": "oracle", "prompts": 5, "sampling": sampling, "every": 2, "patience": 3}
    project.write(batches=2, lora=None, lr=1e-4, validation=validation)
    command, facts = ("align", "--run", "sft"), project.folder / "reports/short/train/sft.json"
    found = []
    for env in ({}, {"ATTUNE_PROCESSES": "2"}):
        project.stage(*command, **env)
        scores = [row["score"] for row in json.loads(facts.read_text())["validation"]["scores"]]
        found.append((scores, *project.left("sft")))
    (scores, curve, weights), (again, same_curve, same) = found
    assert len(scores) == 2
    assert again == pytest.approx(scores, abs=1e-3)
    pd.testing.assert_frame_equal(same_curve, curve, rtol=1e-4, atol=1e-5)
    assert same.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(same[key], value, rtol=1e-3, atol=2e-4)


def test_a_stage_that_loses_a_process_ends_in_seconds_and_says_so(project):
    project.write(batches=100_000)
    command = [sys.executable, "-m", "attune.stages.align", "--run", "sft"]
    with subprocess.Popen(
        command, cwd=project.folder, env=ENV | {"ATTUNE_PROCESSES": "2"}, stderr=subprocess.PIPE, text=True
    ) as stage:
        assert "batch/s" in next(line for line in iter(lambda: stage.stderr.read(200), "") if "batch/s" in line)
        ranks = [child for child in psutil.Process(stage.pid).children() if "attune.stages.align" in child.cmdline()]
        (second,) = (child for child in ranks if child.environ()["RANK"] == "1")
        second.kill()
        began = time.monotonic()
        said = stage.stderr.read()
        stage.wait()
        took = time.monotonic() - began
    project.write(batches=3)
    assert len(ranks) == 2
    assert stage.returncode != 0
    assert took < 30, f"{took:.0f} s"
    assert "process 0 of the 2 that work together cannot go on: " in said
    assert not (project.folder / "models/short/sft").exists()


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"ATTUNE_PROCESSES": "two"}, "ATTUNE_PROCESSES: a number of processes is wanted, not 'two'"),
        ({"ATTUNE_LAUNCH": "no-such-launcher --fast"}, "ATTUNE_LAUNCH: no-such-launcher: No such file or directory"),
        ({"ATTUNE_LAUNCH": "accelerate launch --cpu --num_processes 2"}, "has started a single process"),
    ],
)
def test_a_launcher_that_does_not_launch_is_an_error(project, env, said):
    env = env | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "attune.stages.align", "--run", "sft"]
    assert said in run(*command, cwd=project.folder, fails=True, **env)


def test_processes_that_nobody_coordinates_are_an_error(policy, data):
    """Two were started, as RANK and WORLD_SIZE say, but accelerate runs one: each would train alone and write."""
    policy.shard = Shard(0, 2)
    trained = sft.Method(sft.Config(lora=None, lr=1e-3, batches=1, batch_size=2), policy)
    with pytest.raises(RuntimeError, match="2 processes were started to train together, but accelerate knows of 1"):
        tiny.run(trained, data)
