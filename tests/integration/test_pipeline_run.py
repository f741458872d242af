"""The run of a pipeline in a real store: how long it took, what it says; sending late or twice changes nothing."""

from __future__ import annotations

import json

import pytest

import stages
from attune import tracking
from attune.evaluation.report.short import description, headline_metrics
from attune.tracking import pipeline as pipelines
from attune.tracking import store as stores
from tracked import files_of, runs_in

pytestmark = pytest.mark.integration


@pytest.fixture
def here(tmp_path, monkeypatch):
    with stages.inside(tmp_path, tracking="on"):
        monkeypatch.setenv("DVC_EXP_NAME", "bold-move")
        yield tmp_path


def parent_in(root):
    (found,) = runs_in(f"sqlite:///{root}/mlflow.db", "tags.kind = 'pipeline'")
    return found


def stage(root, name: str, error: BaseException | None = None) -> None:
    with tracking.run(name, {}, tags={"profile": "x"}, root=root) as run:
        run.pipeline.summary({f"seconds/{name}": 1.5})
        if error is not None:
            raise error


def test_its_end_moves_on_with_its_stages_and_is_as_the_last(here):
    ends = []
    for name in ("prepare", "align@sft"):
        stage(here, name)
        ends.append((parent_in(here).info.status, parent_in(here).info.end_time))
    with pytest.raises(SystemExit):
        stage(here, "report", SystemExit("no such file"))
    parent = parent_in(here)
    runs = {run.info.run_name: run for run in runs_in(f"sqlite:///{here}/mlflow.db", "tags.kind = 'stage'")}
    assert ends == [("FINISHED", runs[name].info.end_time) for name in ("prepare", "align@sft")]
    assert (parent.info.status, parent.info.end_time) == ("FAILED", runs["report"].info.end_time)
    assert parent.info.start_time <= runs["prepare"].info.start_time
    assert {key: parent.data.metrics[key] for key in parent.data.metrics} == {
        f"seconds/{name}": 1.5 for name in ("prepare", "align_sft", "report")
    }


def test_a_stage_that_ran_beside_one_that_failed_does_not_make_up_for_it(here):
    with tracking.run("align@spo", {}, tags={"profile": "x"}, root=here), pytest.raises(SystemExit):
        stage(here, "align@dpo", SystemExit("a loss that is NaN"))
    beside = parent_in(here).info
    stage(here, "align@dpo")
    runs = {run.info.run_name: run for run in runs_in(f"sqlite:///{here}/mlflow.db", "tags.kind = 'stage'")}
    assert (beside.status, beside.end_time) == ("FAILED", runs["align@spo"].info.end_time)
    assert parent_in(here).info.status == "FINISHED", "one that began afterwards does"


def test_what_comes_late_does_not_move_it_back(here):
    stage(here, "prepare")
    store = stores.connect(stores.resolve_uri("default"), here)
    (late,) = runs_in(f"sqlite:///{here}/mlflow.db", "tags.kind = 'stage'")
    end = parent_in(here).info.end_time
    store.client.set_terminated(late.info.run_id, "KILLED", end_time=end - 1000)
    pipelines.extend(store, late.info.run_id)
    assert (parent_in(here).info.status, parent_in(here).info.end_time) == ("FINISHED", end)


def test_a_result_arrives_from_a_store_that_was_away(here):
    """The store cannot be opened until the replay; then twice, as after a lost answer."""
    (here / "mlflow.db").mkdir()
    (here / "report.html").write_text("<p>")
    with tracking.run("report", {}, tags={}, root=here) as run:
        run.pipeline.summary({"oracle/sft": 0.5})
        run.pipeline.describe("| run |", "sft +0.1 oracle")
        run.pipeline.artifact(here / "report.html")
    (here / "mlflow.db").rmdir()
    assert set(tracking.replay(here).values()) == {None}
    parent, uri = parent_in(here), f"sqlite:///{here}/mlflow.db"
    assert parent.data.metrics == {"oracle/sft": 0.5}
    assert (parent.info.run_name, parent.data.tags["mlflow.note.content"]) == ("bold-move", "| run |")
    assert files_of(uri, parent.info.run_id) == ["report.html"]
    store = stores.connect(stores.DEFAULT, here)
    record = {"op": "description", "time": 1, "text": "| run |", "headline": "an older result"}
    pipelines.describe(store, parent.info.run_id, record)
    tags = store.client.get_experiment(store.experiment).tags
    assert tags["mlflow.note.content"] == "sft +0.1 oracle (bold-move)", "a newer result stands there"
    store.client.set_experiment_tag(store.experiment, "mlflow.note.content", "of ours")
    store.client.delete_experiment_tag(store.experiment, pipelines.DESCRIBED)
    pipelines.describe(store, parent.info.run_id, {**record, "time": 2**50})
    assert store.client.get_experiment(store.experiment).tags["mlflow.note.content"] == "of ours"


def test_without_a_pipeline_nothing_is_written_to_one(tmp_path):
    with stages.inside(tmp_path, tracking="on"), tracking.run("report", {}, tags={}, root=tmp_path) as run:
        run.pipeline.summary({"x": 1.0})
        run.pipeline.describe("text", "headline")
        assert run.pipeline.run_id is None
    assert runs_in(f"sqlite:///{tmp_path}/mlflow.db", "tags.kind = 'pipeline'") == []


def test_the_description_is_a_table_that_json_and_metrics_agree_with():
    from attune.evaluation.summary import Summary

    summary = Summary.from_json((stages.ROOT / "reports/tiny/summary.json").read_text())
    text, headline = description(summary)
    metrics, scorer = headline_metrics(summary), summary.headline
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(summary.methods)
    assert all(f"{metrics[f'{scorer}/{name}']:.4g}" in text for name in summary.methods)
    best = max(summary.tuned, key=lambda name: metrics[f"{scorer} above base/{name}"])
    assert headline.startswith(f"{best} +")
    assert metrics["best"] == metrics[f"{scorer} above base/{best}"]
    assert json.dumps(metrics)
