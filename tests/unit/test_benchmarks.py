"""Benchmarks run by hand and seldom: each is imported here, and its settings are built, so that a rename is noticed."""

from __future__ import annotations

import importlib
import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attune.config.plan import plan_file
from attune.config.plugins import available
from attune.config.resolve import load
from attune.planning.problems import Machine, problems
from attune.training.loop import train

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
SPEED = {
    f"speed_{name}" for name in ("alignprop", "dpo", "generation", "report", "rows", "scorers", "sides", "spm", "spo")
}
SHARED = {
    "copies",
    "plans",
    "shapes",
    "random_bases",
    "measuring",
    "gpu_rows",
    "gpu_checks",
    "plain",
    *SPEED,
}  # imported; no programs


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark as `python benchmarks/<name>.py` does: its folder is on the path, and it is run at the root.

    Their names are those of packages too, so all are forgotten afterwards.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHARED])
def test_every_benchmark_is_imported_and_says_what_it_does(benchmark, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        benchmark(name).main()
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_ablations_of_spo_are_settings_without_a_problem(benchmark, tmp_path, monkeypatch):
    copies, ablations, made = benchmark("copies"), benchmark("spo_ablations"), {}

    def copied(home, values, runs, **rest):
        copies.copy_repository(home, values, {"runs": runs})
        made[home.name] = load(home)

    monkeypatch.setattr(ablations, "repro_in_copy", copied)
    monkeypatch.setattr(ablations, "compared", lambda seed, row, work: {})
    assert len(ablations.run_seed(3, tmp_path)) == len(ablations.ROWS)
    assert {copy for copy, _ in ablations.ROWS.values()} == {name.removesuffix("3") for name in made}
    laptop = Machine(gpus=0, gpu_bytes=0, ram_bytes=16 * 10**9, free_disk_bytes=10**11)
    for settings in made.values():
        assert settings.seed == 3
        assert problems(settings, 0, laptop) == []
    for copy, run in ablations.ROWS.values():
        assert made[f"{copy}3"].method_of(run) == "spo"
    assert made["timed3"].methods["spo_chosen"].continuation == "chosen"
    assert not made["untimed3"].preference.step_aware
    assert made["plain3"].preference.batches == 0


def test_a_seed_is_set_in_the_copy_alone(benchmark, tmp_path):
    copies = benchmark("copies")
    copies.copy_repository(tmp_path, {"seed": 5})
    assert load(tmp_path) == replace(load(ROOT), seed=5)


def test_the_plan_of_an_alignprop_run_too_long(benchmark):
    plans, overoptimisation = benchmark("plans"), benchmark("overoptimisation")
    planned = plans.plans_of(overoptimisation.with_batches(load(), 7))
    run = planned[plan_file("align", "alignprop")]
    assert (run.method.name, run.method.config.batches) == ("alignprop", 7)
    known = planned[plan_file("evaluate", "alignprop")].scorers
    assert set(known) >= {overoptimisation.TRAINED, *overoptimisation.VALIDATION}


def test_the_searches_of_a_run_are_plans(benchmark):
    plans, search = benchmark("plans"), benchmark("search")
    settings = load()
    found = search.searches(settings.search["dpo"])
    assert list(found) == ["short", "tpe", "grid"]
    assert [len(searched.choices) for searched in found["grid"].space.values()] == [4, 3]
    for config in found.values():
        plan = plans.plans_of(replace(settings, search={"dpo": config}))[plan_file("sweep", "dpo")]
        assert plan.run.method.name == "dpo"
        assert set(plan.objectives) == set(config.objectives)
    run = plans.plans_of(settings)[plan_file("align", "dpo")]
    assert plans.with_method_settings(run, {**run.method.settings, "beta": 3}).method.config.beta == 3


@pytest.mark.parametrize(("base", "bytes_per_latent"), [("sd15", 194_000), ("sd35m", 447_000)])
def test_what_autograd_keeps_is_what_the_docs_say(benchmark, base, bytes_per_latent):
    """docs/full_size.md: of an image, in bfloat16, without checkpointing."""
    found = benchmark("saved_activations").counted(base, checkpointing=False)
    assert found["bytes_per_latent"] == pytest.approx(bytes_per_latent, rel=0.005)


@pytest.mark.parametrize("method", ["dpo", "spo"])
def test_a_step_of_random_data_is_trained(benchmark, method, policy):
    shapes = benchmark("true_shapes")
    args = Namespace(batch=2, steps=1, checkpointing=False, compile=False)
    objective, batches = shapes.build(method, policy, args)
    history, _ = train(objective, policy, batches, seed=0)
    assert len(history) == 2
    assert history[0]["loss"] == pytest.approx(math.log(2))


def test_the_measurement_of_a_gpu_runs_on_small_models(benchmark, tmp_path, monkeypatch):
    """All of it but the contract tests, which this suite runs anyway; every kind of work once."""
    words = ["--device", "cpu", "--tiny", "--minutes", "9", "--row-seconds", "0", "--skip", "contract"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--out", str(tmp_path / "gpu")])
    benchmark("gpu").main()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {line["method"] for line in report["parity"]} == set(available("methods"))
    assert all(line["loss"] == line["gradient"] == 0 for line in report["parity"])
    assert {line["work"] for line in report["rows"]} == set(benchmark("gpu_rows").WORKS)
    assert {line["base"] for line in report["rows"]} == {"vit-h", *benchmark("shapes").BACKBONES}
    assert all(line["rate"] > 0 and line["flops"] > 0 and line["peak_GiB"] > 0 for line in report["rows"])
    assert [check["passed"] for check in report["checks"]] == [True]
    assert "| sd15 | DPO LoRA |" in (tmp_path / "gpu.md").read_text()


def test_a_row_that_fails_is_a_line_of_the_report(benchmark):
    gpu, rows = benchmark("gpu"), benchmark("gpu_rows")
    place = rows.Place(torch.device("cpu"), small=True)
    line = gpu.measured_row(rows.Row("DPO LoRA", "sd9 | <b>", 1), place, 1.0, 1e9)
    assert line["error"] == "KeyError: 'sd9 \\| &lt;b>'"
    report = {"machine": {}, "ceiling": 1e12, "parity": [], "rows": [line], "not_reached": ["x"], "checks": []}
    assert "KeyError" in gpu.as_markdown(report)


def test_dpo_is_compared_with_a_plain_loop(benchmark, tmp_path):
    memory, shapes = benchmark("dpo_memory"), benchmark("shapes")
    shapes.write_pipeline("sd15", tmp_path, torch.float32, small=True)
    assert memory.compare(tmp_path)["loss"] < 1e-5
    losses = [memory.train(side, tmp_path, 64, "float32")["losses"] for side in ("diffusers", "attune")]
    assert losses[0] == losses[1]


def test_the_large_scorers_have_valid_settings(benchmark, tmp_path):
    for name, scorer in benchmark("true_shapes_scorers").scorers(tmp_path, str(tmp_path)).items():
        assert (scorer.name, bool(scorer.config.path)) == (name, True)
