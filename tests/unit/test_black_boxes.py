"""A project whose rewards have no gradient: trained by DDPO and evaluated by its stages, with a real service."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import score_server
import stages
from attune.evaluation.protocol import read_scores
from attune.rewards import http

RUNS = {"base": {"after": "data"}, "ddpo": {"method": "ddpo", "after": "data"}}
FUNCTION = "def light(images, prompts):\n    return images.mean((1, 2, 3)) / 255\n"
REPORTS, IMAGES = Path("reports/short"), Path("data/short/generated/base")


@pytest.fixture(scope="module")
def server():
    with score_server.serving() as server:
        yield server


@pytest.fixture(scope="module")
def made(tmp_path_factory, server):
    """A project after the evaluation of both runs; no test changes it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "mine.py").write_text(FUNCTION)
    scorers = {
        "oracle": {},
        "mine": {"scorer": "python", "function": "mine:light"},
        "size": {"scorer": "jpeg", "sign": "incompressibility"},
        "service": {"scorer": "http", "url": server.address, "version": "1", "batch_size": 5},
        "pickscore": {"path": "models/embedded/pickscore"},
    }
    rewards = {"mine": 1, "service": 0.5, "size": 0}
    stages.write(folder, RUNS, scorers=scorers, methods__ddpo__rewards=rewards, methods__ddpo__images_per_prompt=2)
    with stages.inside(folder):
        stages.write_plans()
        stages.call("prepare")
        stages.call("align", run="ddpo")
        trained_on = len(server.requests)
        stages.call("align", run="base")
        for run in RUNS:
            stages.call("generate", run=run)
            stages.call("evaluate", run=run)
    # two batches of two prompts, two images of each
    assert trained_on == 2
    assert sum(len(request["prompts"]) for request in server.requests[:trained_on]) == 8
    return folder


@pytest.fixture
def asked(server):
    """What the service is asked from now on."""
    before = len(server.requests)
    return lambda: server.requests[before:]


def test_scores_are_those_of_the_files(here):
    frame, protocol = read_scores(REPORTS / "scores/base.parquet")
    for row in frame.itertuples():
        pixels = np.asarray(Image.open(IMAGES / row.file))
        assert row.mine == pytest.approx(pixels.mean() / 255, rel=1e-5)
        assert row.service == pytest.approx(pixels[..., 0].mean() / 255 + len(row.prompt) / 1000, rel=1e-5)
        assert 0.3 < row.size < 3
    identity = {name: (weights, settings) for name, weights, settings in protocol.scorers}
    assert identity["service"] == ("built-in", "version=1")
    assert identity["size"][1] == "quality=95 sign=incompressibility"
    assert identity["mine"][1] == "function=mine:light"


def test_a_training_logs_its_rewards_and_names_what_it_was_trained_on(here):
    history, facts = pd.read_csv(REPORTS / "train/ddpo.csv"), json.loads((REPORTS / "train/ddpo.json").read_text())
    assert facts["trained_on"] == ["mine", "service"]
    assert len(history) == 2
    np.testing.assert_allclose(history.reward, history.reward_mine + 0.5 * history.reward_service, rtol=1e-4)
    assert (history.reward_size > 0.3).all()


def test_nothing_is_asked_again_until_the_version_changes(mine, asked):
    """Not by another evaluation, and not where the service has moved to."""
    profile = Path("params/short.yaml")
    text = profile.read_text()
    profile.write_text(text.replace("/score", "/score?moved=1").replace("batch_size: 5", "batch_size: 4"))
    stages.write_plans()
    stages.call("evaluate", run="base")
    assert asked() == []
    profile.write_text(text.replace("version: '1'", "version: '2'"))
    stages.write_plans()
    stages.call("evaluate", run="base")
    assert [len(request["prompts"]) for request in asked()] == [5, 3]
    assert {request["version"] for request in asked()} == {"2"}


def test_a_function_that_changes_scores_anew_and_it_alone(mine, asked):
    before, _ = read_scores(REPORTS / "scores/base.parquet")
    Path("mine.py").write_text(FUNCTION.replace("/ 255", "/ -255"))
    stages.write_plans()
    stages.call("evaluate", run="base")
    after, _ = read_scores(REPORTS / "scores/base.parquet")
    np.testing.assert_allclose(after.mine, -before.mine)
    pd.testing.assert_series_equal(after.service, before.service)
    assert asked() == []


@pytest.mark.parametrize("stage", ["align", "evaluate"])
def test_a_service_that_is_away_is_one_line(mine, monkeypatch, stage):
    monkeypatch.setattr(http, "FIRST_WAIT", 0.01)
    profile = Path("params/short.yaml")
    text = profile.read_text()
    start = text.index("url: http://127.0.0.1:")
    profile.write_text(
        text[:start] + "url: http://127.0.0.1:9/" + text[text.index("\n", start) :].replace("'1'", "'2'")
    )
    shutil.rmtree(".checkpoints", ignore_errors=True)
    stages.write_plans()
    with pytest.raises(SystemExit) as error:
        stages.call(stage, run="ddpo")
    said = str(error.value)
    assert said.startswith(f"{stage}@ddpo: url http://127.0.0.1:9/ (a scorer of kind http, in `scorers`): the service")
    assert "does not answer" in said
    assert "\n" not in said
