"""The benchmark of speed compares what is the same, measures both sides, and shows all that it has measured."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
NAMES = [path.stem for path in FOLDER.glob("*.py")]
CPU = torch.device("cpu")
ROLLS_OR_SCORES = ("SPO rollout", "HPSv2", "PickScore", "generation")
TRAINS = ("DPO", "DPO, second UNet", "SPO update", "SPO", "SPM", "AlignProp")


@pytest.fixture(scope="module")
def benchmark():
    """Imports a benchmark as `python benchmarks/speed.py` does; packages share their names, so all are forgotten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def rows(benchmark):
    return benchmark("speed_rows")


def tiny_rows(rows, work):
    return [row for row in rows.ROWS if row.work == work and row.base == "tiny"]


@pytest.mark.parametrize("work", [*TRAINS, *ROLLS_OR_SCORES])
def test_reference_and_attune_compute_the_same(rows, work):
    """Losses, scores, images or chosen steps; and of a training step what becomes of every weight."""
    for row in tiny_rows(rows, work):
        found = rows.differences(rows.WORKS[work], row.small(CPU))
        assert ("changes of weights" in found) == (work in TRAINS)


def test_a_pipeline_of_random_weights_is_read_by_both_sides(benchmark, rows, tmp_path):
    """As rows of SD 1.5 have one, in bfloat16, but small."""
    benchmark("shapes").write_pipeline("sd15", tmp_path, torch.float32, small=True)
    row = next(row for row in rows.ROWS if row.name.startswith("sd15 generation with a LoRA"))
    place = replace(row.place(tmp_path, CPU), dtype="float32", resolution=64)
    assert list(rows.differences(rows.WORKS[row.work], place)) == ["images"]


def test_every_work_is_compared_and_has_a_row_of_each_model(rows):
    assert set(rows.WORKS) == {*TRAINS, *ROLLS_OR_SCORES}
    assert {(row.work, row.base) for row in rows.ROWS} == {
        (work, base) for work in rows.WORKS for base in ("tiny", "sd15")
    }
    assert len({row.name for row in rows.ROWS}) == len(rows.ROWS)


def test_a_gradient_through_fewer_steps_is_a_difference(rows):
    """The losses are the same, so that the weights tell it."""
    work = rows.WORKS["AlignProp"]
    longer = replace(work, ours=lambda place: work.ours(replace(place, options=place.options | {"k": 2})))
    with pytest.raises(AssertionError, match="the weights change differently"):
        rows.differences(longer, tiny_rows(rows, "AlignProp")[0].small(CPU))


def test_a_row_that_is_measured_joins_the_report(benchmark, tmp_path, monkeypatch, capsys):
    """By the command; the rows that were there stay."""
    out, row = tmp_path / "speed", tiny_rows(benchmark("speed_rows"), "HPSv2")[0]
    before = {"machine": {"device": "a CPU"}, "date": "2026-01-01", "commit": "abc", "device": "cpu"}
    failed = before | {"reference_is": "authors", "error": "MemoryError: 9 | <b>"}
    benchmark("speed_report").write({"sd15 SPO": failed}, out, [])
    words = ["--rows", row.name, "--repeats", "2", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["speed.py", *words])
    benchmark("speed").main()
    found = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert list(found) == [row.name, "sd15 SPO"]
    measured = found[row.name]
    assert measured["ratio"]["min"] <= measured["ratio"]["median"] <= measured["ratio"]["max"]
    assert (measured["n"], measured["date"] > before["date"]) == (2, True)
    assert min(measured["reference_s"], measured["ours_s"]) > 0
    page = out.with_suffix(".md").read_text()
    assert f"| {row.name} | package, a list of images |" in page
    assert "MemoryError: 9 \\| &lt;b>" in page
    assert f"| {row.name} |" in capsys.readouterr().out


def test_memory_is_that_of_a_process_of_its_own(benchmark, rows):
    row = tiny_rows(rows, "PickScore")[0]
    args, words = Namespace(device="cpu", threads=1), ["--row", row.name, "--folder", str(row.small(CPU).folder)]
    found = benchmark("speed").in_a_process(["--side", "ours", *words], args)
    assert list(found) == ["ours_GiB"]
    assert 0.1 < found["ours_GiB"] < 100


def test_what_ends_a_process_is_said(benchmark, monkeypatch):
    args = Namespace(device="cpu", threads=1)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert benchmark("speed").in_a_process([], args) == {"error": "ended with 1"}


def test_a_row_of_different_sides_is_a_line_of_the_report(benchmark, rows, monkeypatch):
    speed, row, work = benchmark("speed"), tiny_rows(rows, "generation")[-1], rows.WORKS["generation"]
    without = replace(work, ours=lambda place: work.ours(replace(place, options=place.options | {"lora": False})))
    monkeypatch.setitem(rows.WORKS, "generation", without)
    found = speed.measured_here(row, row.small(CPU).folder, Namespace(device="cpu"), 1)
    assert found["error"].startswith("AssertionError: reference and attune do not compute the same: images differ by")


def test_a_slower_row_is_said_to_be_slower(benchmark):
    report, rows = benchmark("speed_report"), benchmark("speed_rows")
    times = {"reference_s": 1.0, "ours_s": 2.0, "n": 1, "ratio": rows.ratios([(1.0, 2.0)])}
    about = {"machine": {}, "date": "2026-01-01", "commit": "abc", "device": "cuda", "reference_is": "authors"}
    page = report.as_markdown({"sd15 SPO": times | about | {"differences": {"loss": 0.0}}})
    assert "attune is slower in 1 of 1 rows: sd15 SPO." in page
    assert "| **0.50** [0.50, 0.50] | 1 |" in page
    faster, slower = (rows.ratios([pair]) for pair in ((3.0, 2.0), (1.0, 2.0)))
    assert not report.is_slower({"ratio": faster, "ratio_processor": faster})
    assert report.is_slower({"ratio": faster, "ratio_processor": slower})


def test_a_row_that_does_not_exist_is_an_error(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--rows", "sd9"])
    with pytest.raises(SystemExit, match="no row's name has 'sd9' in it"):
        benchmark("speed").main()
