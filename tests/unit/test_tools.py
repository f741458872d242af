"""TensorBoard and Weights & Biases, where they are installed: what they hold of a run, and that they stop nothing."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest

import stages
from attune import tracking
from attune.config.profile import Params
from attune.config.schema import ConfigError, check
from attune.tracking import views

PARAMS = {"profile": "x", "runs": {"base": {"after": "data"}}}
GREY = np.full((8, 8, 3), 0.5)
SETTINGS = {"methods": {"sft": {"lr": 0.001}}}


@pytest.fixture
def here(tmp_path):
    with stages.inside(tmp_path, tracking="on"):
        yield tmp_path


def train(root, steps: range, resume=None, **tools):
    with tracking.run("align", SETTINGS, tags={}, uri=None, root=root, tools=tools, resume=resume) as run:
        run.image("images/samples", GREY, steps.start)
        for step in steps:
            run.log({"loss": 1 / (step + 1)}, step)
        run.summary({"score": 2.0})
        return run.handle


def test_tensorboard_has_curves_images_and_parameters_once(here):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    handle = train(here, range(0, 5), tensorboard=True)
    train(here, range(3, 8), resume=handle, tensorboard=True)
    (folder,) = (here / ".checkpoints/tensorboard/align").iterdir()
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(s, pytest.approx(1 / (s + 1))) for s in range(8)]
    assert [e.step for e in events.Images("images/samples")] == [0, 3]
    assert "parameters/text_summary" in events.Tags()["tensors"]


def test_wandb_has_curves_and_parameters(here, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(here))
    train(here, range(5), wandb="attune")
    wandb.teardown()  # as at the process's end: its own process writes the rest
    (file,) = (here / ".checkpoints/wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for word in (b"loss", b"score", b"lr", b"images/samples"):
        assert word in content


def test_a_tool_that_fails_is_told_once_and_left_alone(here, caplog, monkeypatch):
    """A file lies where TensorBoard wants its folder, or it is not there at all."""
    caplog.set_level(logging.WARNING, "attune.tracking")
    (here / ".checkpoints").mkdir()
    (here / ".checkpoints/tensorboard").write_text("")
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(here, range(5), tensorboard=True, wandb="attune")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert [line.partition(" ")[0] for line in said] == ["tensorboard", "wandb"]


def test_a_tool_that_fails_on_the_way_is_left_alone(caplog):
    class Full:
        calls = 0

        def log(self, metrics, step):
            self.calls += 1
            raise OSError("no space left")

    full = Full()
    view = views.View("tensorboard", lambda: full)
    for step in range(3):
        view.log({"loss": 1.0}, step)
    view.close()
    assert full.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "tensorboard shows no more of this run, which goes on: OSError: no space left"
    ]


def test_no_tool_is_opened_where_tracking_is_off_or_by_another_process(here, monkeypatch):
    for key, value in (("ATTUNE_TRACKING", "off"), ("RANK", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(key, value)
            assert train(here, range(2), tensorboard=True, wandb="attune") is None
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("given", ["default", None, "http://host:5000"])
def test_tracking_is_a_store_or_a_block(given):
    short = check(Params, PARAMS | {"tracking": given})
    block = check(Params, PARAMS | {"tracking": {"mlflow": given}})
    assert short.tracked == block.tracked
    assert (short.tracked.mlflow, short.tracked.tools) == (given, {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mlflow": "here"}, "tracking.mlflow: Value error, must be default, null, or begin with one of http://"),
        ({"tensorbord": True}, "did you mean tensorboard?"),
        ({"wandb": ""}, "tracking.wandb: String should have at least 1 character"),
        (7, "tracking: Input should be a valid string (given 7)"),
    ],
)
def test_a_mistake_in_tracking_is_told_once(given, said):
    with pytest.raises(ConfigError) as caught:
        check(Params, PARAMS | {"tracking": given})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("tensorboard", True), ("wandb", "project")])
def test_a_package_that_is_missing_is_an_error_of_the_plan(key, value, monkeypatch):
    monkeypatch.setattr("attune.config.profile.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"the package {key} is not installed: pip install {key}"):
        check(Params, PARAMS | {"tracking": {key: value}})
