"""Stages with tracking on, by their own `main`: what a real MLflow store holds of each, and what the champion is."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import stages
from attune import tracking
from attune.config.plan import EvaluatePlan, PreparePlan, RunPlan, SearchPlan, read
from attune.config.resolve import read_yaml
from attune.costs import read_costs
from attune.evaluation.protocol import read_scores, write_scores
from attune.files import digest
from attune.stages.sweep import sweep_plan
from attune.tracking import registry
from tracked import files_of, points_of, runs_in, without_system

pytestmark = pytest.mark.integration

RUNS = {"base": {"after": "data"}, "sft": {"method": "sft", "after": "data"}, "dpo": {"method": "dpo", "after": "data"}}
SEARCH = {
    "space": {"lr": {"low": 1e-5, "high": 1e-1, "log": True}, "batch_size": {"low": 1, "high": 3}},
    "objectives": ["hpsv2"],
    "prompts": 3,
    "trials": 3,
    "workers": 1,
    "pruner": "none",
    "fixed": {"batches": 1},
}
VALIDATION = {"scorer": "hpsv2", "prompts": 2, "every": 2, "sampling": stages.PROFILE["sampling"]}
CHANGES = {"search": {"sft": SEARCH}, "methods__sft__validation": VALIDATION}
REPORTS = Path("reports/short")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project after all of its stages, each tracked; tests only add to it."""
    folder = stages.write(tmp_path_factory.mktemp("tracked"), RUNS, **CHANGES)
    with stages.inside(folder, tracking="on"):
        stages.call("plan")
        stages.call("prepare")
        stages.call("train_preference")
        for run in RUNS:
            for stage in ("align", "generate", "evaluate"):
                stages.call(stage, run=run)
        stages.call("report")
    return folder


@pytest.fixture
def here(made):
    with stages.inside(made, tracking="on"):
        yield f"sqlite:///{made}/mlflow.db"


def the_run(uri, name):
    (found,) = [run for run in runs_in(uri) if run.info.run_name == name]
    return found


def test_every_stage_is_a_run_that_has_finished(here):
    found = {run.info.run_name: run for run in runs_in(here) if run.data.tags["kind"] == "stage"}
    names = {f"{stage}@{run}" for stage in ("align", "generate", "evaluate") for run in RUNS}
    assert set(found) == names | {"prepare", "train_preference", "report"}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert {run.data.tags["profile"] for run in found.values()} == {"short"}
    assert {name for name, run in found.items() if run.data.tags.get("tuned") == "true"} == {"align@sft", "align@dpo"}
    assert (found["align@sft"].data.tags["method"], found["align@base"].data.tags["uses"]) == ("sft", "none")


def test_a_training_has_every_setting_and_each_step_once(here):
    run = the_run(here, "align@sft")
    config = read(RunPlan, "align", "sft").method.config
    wanted = {"lr": "0.0003", "batches": "3", "batch_size": "4", "lora.rank": "8", "lora.targets": "all"}
    wanted |= {"validation.scorer": "hpsv2", "seed": "0", "model.backbone": "sd", "max_grad_norm": "1"}
    assert {key: run.data.params.get(key) for key in wanted} == wanted
    assert set(type(config).model_fields) - {"lora", "validation"} <= set(run.data.params)
    curve = pd.read_csv(REPORTS / "train/sft.csv")
    for name in ("loss", "grad_norm", "lr"):
        points = points_of(here, run.info.run_id, name)
        assert [step for step, _ in points] == curve.step.tolist() == [1, 2, 3]
        assert [value for _, value in points] == pytest.approx(curve[name].tolist(), rel=1e-5)
    scores = json.loads((REPORTS / "train/sft.json").read_text())["validation"]["scores"]
    points = points_of(here, run.info.run_id, "validation/hpsv2")
    assert points == [(row["step"], pytest.approx(row["score"])) for row in scores]
    assert [step for step, _ in points] == [0, 2, 3]


def test_every_setting_of_every_stage_is_a_parameter_defaults_too(here):
    """Of the method's Config, of the base model, of sampling, data and scorers: a parameter for each field."""
    plans = {f"align@{run}": read(RunPlan, "align", run) for run in ("sft", "dpo")}
    for name, plan in plans.items():
        given = the_run(here, name).data.params
        expected = {f"model.{field}" for field in type(plan.model).model_fields}
        expected |= fields_of(plan.method.config)
        assert expected <= set(given), name
        values = tracking.table_columns({"methods": {plan.run: plan.method.config.model_dump(mode="json")}})
        assert {key: given[key] for key in values} == values
    sampling = {"steps", "eta", "guidance_scale", "batch_size"}
    given = {
        name: set(the_run(here, name).data.params) for name in ("prepare", "generate@sft", "evaluate@sft", "report")
    }
    assert {f"sampling.{key}" for key in sampling} <= given["prepare"]
    source = read(PreparePlan, "prepare").source.config
    assert {f"data.{key}" for key in type(source).model_fields} <= given["prepare"]
    assert {f"generate.sampling.{key}" for key in sampling} <= given["generate@sft"]
    for scorer, plugin in read(EvaluatePlan, "evaluate", "sft").scorers.items():
        assert {f"scorers.{scorer}.{key}" for key in type(plugin.config).model_fields} <= given["evaluate@sft"]
    assert {key.partition(".")[0] for key in given["report"]} == {"seed", "runs", "trained_on", "selected_by"}


def fields_of(config, prefix: str = "") -> set[str]:
    """A parameter's name for each field of a Config, and of the blocks in it that are set."""
    found = {name: getattr(config, name) for name in type(config).model_fields}
    blocks = {name: block for name, block in found.items() if hasattr(type(block), "model_fields")}
    inner = [fields_of(block, f"{prefix}{name}.") for name, block in blocks.items()]
    return {prefix + name for name in found if name not in blocks}.union(*inner)


def test_a_training_has_its_data_its_model_and_its_samples(here):
    run = the_run(here, "align@sft")
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == "training liked images"
    assert json.loads(given.dataset.profile) == {"num_rows": 4}
    assert given.dataset.digest == digest(Path("data/short/prepared/pairs.parquet"))
    assert {tag.value for tag in given.tags} == {"training"}
    assert "sft/pytorch_lora_weights.safetensors" in files_of(here, run.info.run_id, "sft")
    images = [name for name in files_of(here, run.info.run_id, "images") if name.endswith(".png")]
    assert len(images) == 4  # five grids are wanted of three batches: one after each, and one before them
    steps = {name.split("+step+")[1].split("+")[0] for name in images}
    assert steps == {"0", "1", "2", "3"}, "the UI's slider opens at step 0"


def test_evaluate_notes_its_means_on_the_row_of_the_training(here):
    for run in ("sft", "dpo"):
        frame, _ = read_scores(REPORTS / f"scores/{run}.parquet")
        own, training = the_run(here, f"evaluate@{run}"), the_run(here, f"align@{run}")
        for scorer in ("oracle", "pickscore", "hpsv2", "aesthetic"):
            assert own.data.metrics[scorer] == pytest.approx(frame[scorer].mean())
            assert training.data.metrics[scorer] == pytest.approx(frame[scorer].mean())
    assert Path(".checkpoints/runs/sft").read_text().strip()
    assert "hpsv2" not in the_run(here, "align@base").data.metrics


def test_the_other_stages_log_what_they_made(here):
    counts = json.loads((REPORTS / "data.json").read_text())
    assert without_system(the_run(here, "prepare").data.metrics) == counts
    assert without_system(the_run(here, "generate@sft").data.metrics) == {"images": 8}
    summary = json.loads((REPORTS / "summary.json").read_text())
    report = the_run(here, "report")
    means = {f"{run}/{s}": at["mean"] for run, m in summary["methods"].items() for s, at in m["scores"].items()}
    assert without_system(report.data.metrics) == pytest.approx(means)
    assert "report.md" in files_of(here, report.info.run_id)
    assert {name for name in files_of(here, report.info.run_id, "figures")} >= {"figures/samples.png"}


def test_every_stage_says_what_it_cost_and_used(here):
    """The ledger as metrics, and the machine's use by MLflow's names: two points where it takes seconds."""
    costs = read_costs("short")
    for run in runs_in(here):
        name = run.info.run_name
        cost = costs[name]
        assert run.data.metrics["stage_cost/seconds"] == pytest.approx(cost.seconds, abs=2)
        assert run.data.metrics.get("stage_cost/denoiser_samples") == cost.denoiser_samples
        assert cost.peak_memory > 0
        first = run.data._metric_objs[0].key  # the UI's page of comparison opens on it
        assert not first.startswith("system/"), name
        for key in ("cpu_utilization_percentage", "system_memory_usage_megabytes"):
            points = points_of(here, run.info.run_id, f"system/{key}")
            assert len(points) >= (2 if cost.seconds > 2 else 1), name  # a point has whole seconds
    assert {name: costs[name].denoiser_samples for name in ("generate@sft", "evaluate@sft", "align@base")} == {
        "generate@sft": 4 * 2 * 2 * 2,  # prompts, images of each, steps, with and without the prompt
        "evaluate@sft": None,
        "align@base": None,
    }


def test_a_replay_of_nothing_is_no_error(here, caplog):
    with caplog.at_level(logging.INFO, "attune.replay"), pytest.raises(SystemExit) as end:
        stages.call("replay")
    assert end.value.code == 0
    assert "0 runs sent, 0 wait" in caplog.text


def test_a_replay_sends_what_a_store_that_was_away_has_not_got(tmp_path):
    """Nothing listens on port 9: the points stay on disk; they go to the store that is there once it is named."""
    from attune import tracking

    with stages.inside(tmp_path, tracking="on"):
        with tracking.run("late", {"a": 1}, tags={"profile": "x"}, uri="http://127.0.0.1:9", root=tmp_path) as run:
            run.log({"loss": 0.5}, 1)
        with pytest.raises(SystemExit) as end:
            stages.call("replay")
        assert end.value.code == 1
        (records,) = tmp_path.glob(".checkpoints/tracking/*/records.jsonl")
        text, uri = records.read_text(), f"sqlite:///{tmp_path}/here.db"
        with tracking.run("other", {"a": 1}, tags={"profile": "x"}, uri=uri, root=tmp_path):
            pass  # another store, which must not be sent what this one is to have
        assert records.exists()
        assert "late" not in {run.info.run_name for run in runs_in(uri)}
        records.write_text(text.replace("http://127.0.0.1:9", uri))
        with pytest.raises(SystemExit) as end:
            stages.call("replay")
        assert end.value.code == 0
        assert not list(tmp_path.glob(".checkpoints/tracking/*/records.jsonl"))
    assert points_of(uri, the_run(uri, "late").info.run_id, "loss") == [(1, 0.5)]


# ---------------------------------------------------------------- sweep


@pytest.fixture(scope="module")
def searched(made):
    with stages.inside(made, tracking="on"):
        stages.call("sweep", run="sft")
        return pd.read_csv(REPORTS / "sweeps/sft/trials.csv")


def test_a_sweep_tries_values_inside_the_space_and_scores_them(searched, here):
    assert searched.state.tolist() == ["complete"] * 3
    assert searched.lr.between(1e-5, 1e-1).all()
    assert searched.lr.nunique() == 3
    assert set(searched.batch_size) <= {1, 2, 3}
    assert (searched.prompts == 3).all()
    assert searched.hpsv2.map(math.isfinite).all()


def test_the_trials_are_runs_below_the_sweeps(searched, here):
    (parent,) = [run for run in runs_in(here) if run.data.tags["kind"] == "sweep"]
    trials = [run for run in runs_in(here) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert parent.info.run_name == "sweep sft"
    assert parent.data.metrics["best/hpsv2"] == pytest.approx(searched.hpsv2.max(), abs=1e-6)
    assert {float(run.data.params["lr"]): run.data.metrics["hpsv2"] for run in trials} == pytest.approx(
        dict(zip(searched.lr, searched.hpsv2, strict=True)), abs=1e-6
    )
    assert {run.data.params["batches"] for run in trials} == {"1"}
    assert {run.data.tags["trial.state"] for run in trials} == {"complete"}
    assert sorted(run.data.tags["trial"] for run in trials) == ["0", "1", "2"]
    for run in trials:
        assert [step for step, _ in points_of(here, run.info.run_id, "loss")] == [1]
    assert {"best_params.yaml", "trials.csv"} <= set(files_of(here, parent.info.run_id))


def test_the_best_is_applied_and_is_a_selection(searched, here, made):
    """One file changes, in two values; the plan then says that the run was selected by the objective."""
    best = searched.loc[searched.hpsv2.idxmax()]
    before = read_yaml(Path("params/short.yaml"))
    text = Path("params/short.yaml").read_text()
    stages.call("sweep", "--apply", run="sft")
    after = read_yaml(Path("params/short.yaml"))
    Path("params/short.yaml").write_text(text)
    assert after["methods"]["sft"] == before["methods"]["sft"] | {
        "lr": best.lr,
        "batch_size": int(best.batch_size),
    }
    assert {key: value for key, value in after.items() if key != "methods"} == {
        key: value for key, value in before.items() if key != "methods"
    }


def test_a_finished_search_is_not_repeated_and_its_plan_is_the_profiles(searched, here):
    stages.call("sweep", run="sft")
    again = pd.read_csv(REPORTS / "sweeps/sft/trials.csv")
    pd.testing.assert_frame_equal(again, searched)
    plan = sweep_plan(read(SearchPlan, "sweep", "sft"))
    assert (plan.run, plan.method, plan.seed, plan.threads) == ("sft", "sft", 0, 1)
    assert plan.sampling.steps == 2
    assert list(plan.objectives) == ["hpsv2"]


# ---------------------------------------------------------------- champion


def scored(gains):
    """Score tables of the runs, the base's shifted by these gains per prompt; then the report."""
    base, protocol = read_scores(REPORTS / "scores/base.parquet")
    for run, gain in gains.items():
        shift = np.repeat(np.asarray(gain, dtype=float) * np.ones(4), 2)
        write_scores(REPORTS / f"scores/{run}.parquet", base.assign(oracle=base.oracle + shift), protocol)
    stages.call("report")


def holds(uri, root, alias):
    found = registry.get_by_alias("attune-short", alias, uri, root)
    return found and found.tags["run"]


def test_the_champion_of_a_report(here, made, caplog, monkeypatch):
    """None is better; then dpo is the first; sft's mean is higher, but one prompt carries it; then all prompts do.

    No test of four prompts can pass 0.05, so here every level does, and interval and win rate decide.
    """
    monkeypatch.setattr("attune.evaluation.summary.ALPHA", 1.01)
    caplog.set_level(logging.INFO, "attune.champion")
    scored({"sft": -0.1, "dpo": 0.0})
    stages.call("champion")
    assert "nothing to register" in caplog.text
    assert holds(here, made, "champion") is None
    scored({"sft": -0.1, "dpo": [0.1, 0.1, 0.1, 0.1]})
    stages.call("champion")
    assert holds(here, made, "champion") == "dpo"
    scored({"sft": [0.02, 0.02, 0.02, 0.9], "dpo": 0.1})
    stages.call("champion")
    assert (holds(here, made, "champion"), holds(here, made, "challenger")) == ("dpo", "sft")
    assert "does not beat version 1 (dpo) beyond doubt" in caplog.text
    version = registry.get_by_alias("attune-short", "challenger", here, made)
    assert (version.tags["headline"], version.tags["difference"]) == ("oracle", "0.24")
