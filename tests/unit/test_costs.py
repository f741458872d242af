"""What a stage costs: measured of this process, added up over parts and processes, and told from what is another's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import attune.costs
import stages
from attune.costs import Cost, Reading, between, measured, one_after_another, pause, read_costs, side_by_side

SRC = Path(__file__).parents[2] / "src"
FIRST = Cost(10.0, 8.0, "GPU", 1, 500, 100, 2.0, 70)
SECOND = Cost(5.0, 4.0, "GPU", 1, 400, None, None, 90)


@pytest.fixture
def here(tmp_path):
    with stages.inside(tmp_path):
        yield tmp_path


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def work(stage: str, plan: str, samples: int, **more) -> None:
    with measured("tiny", stage, plan, **{"resumed": False} | more):
        attune.costs.count_denoised(samples)


def test_a_stage_is_measured(here):
    with measured("tiny", "align@spo", "p", resumed=False) as cost:
        busy(0.3)
        attune.costs.count_denoised(6)
        attune.costs.count_denoised(4)
        so_far = cost()
    found = read_costs("tiny")["align@spo"]
    assert found.seconds >= so_far.seconds >= 0.3
    assert 0.25 < found.cpu_seconds < 5
    assert (found.denoiser_samples, found.processes, found.energy_wh) == (10, 1, None)
    assert found.peak_memory > 1e7
    assert found.device not in ("", "GPU")


def test_parts_of_one_plan_are_added_up_and_others_forgotten(here):
    work("align@spo", "p", 10)
    work("align@spo", "p", 5, resumed=True)
    assert read_costs("tiny")["align@spo"].denoiser_samples == 15
    assert read_costs("tiny", {"align@spo": "another plan"}) == {}
    assert read_costs("tiny", {}) == {}
    work("align@spo", "another", 3, resumed=True)
    assert read_costs("tiny")["align@spo"].denoiser_samples == 3
    work("align@spo", "another", 3)
    assert read_costs("tiny")["align@spo"].denoiser_samples == 3


def test_every_process_has_a_file_and_a_stage_is_all_of_them(here):
    for rank, samples in ((1, 7), (0, 5)):
        work("align@spo", "p", samples, rank=rank)
    work("generate@spo", "p", 0)
    found = read_costs("tiny")
    assert set(found) == {"align@spo", "generate@spo"}
    assert (found["align@spo"].denoiser_samples, found["align@spo"].processes) == (12, 2)
    assert found["generate@spo"].denoiser_samples is None
    work("align@spo", "newer", 5)
    assert read_costs("tiny")["align@spo"].denoiser_samples == 5, "the other process's file is of an older plan"


def test_nothing_is_read_of_what_is_not_there_or_not_ours(here):
    assert read_costs("tiny") == {}
    folder = here / ".checkpoints/costs/tiny"
    folder.mkdir(parents=True)
    texts = {"a": "{", "b": "[]", "c": json.dumps({"plan": "p", "parts": [{"seconds": 1}]}), "d": '{"plan": "p"}'}
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    assert read_costs("tiny") == {}


def test_how_parts_and_processes_add_up():
    assert one_after_another(FIRST, SECOND) == Cost(15.0, 12.0, "GPU", 1, 500, 100, 2.0, 90)
    assert side_by_side(FIRST, SECOND) == Cost(10.0, 12.0, "GPU", 2, 900, 100, 2.0, 160)
    assert one_after_another(SECOND, SECOND).denoiser_samples is None


def test_energy_is_of_the_card_that_is_used():
    """Joules since the drivers were loaded, of two cards; the second is ours, for an hour at 100 W."""
    first = Reading(0, 0, 0, "cpu", 5, None, {"GPU-a": 10.0, "GPU-b": 20.0})
    last = Reading(3600, 1, 9, "H100", 6, ("GPU-b", 7), {"GPU-a": 99.0, "GPU-b": 360_020.0})
    assert between(first, last) == Cost(3600, 1, "H100", 1, 6, 9, 100.0, 7)
    uncounted = Reading(3600, 1, 9, "H100", 6, ("GPU-c", 7), last.joules)
    assert between(first, uncounted).energy_wh is None


def test_a_kill_leaves_what_was_noted(here):
    body = "import time; from attune import costs\n"
    body += "with costs.measured('tiny', 'align@spo', 'p', resumed=False): costs.count_denoised(8); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", body], env={**os.environ, "PYTHONPATH": str(SRC)}) as process:
        deadline = time.monotonic() + 60
        while "align@spo" not in read_costs("tiny"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert read_costs("tiny")["align@spo"].denoiser_samples == 8
    work("align@spo", "p", 2, resumed=True)
    found = read_costs("tiny")["align@spo"]
    assert (found.denoiser_samples, found.seconds >= 1) == (10, True)


def test_a_full_disk_costs_the_note_and_not_the_work(here):
    (here / ".checkpoints").write_text("a file where the folder should be")
    with measured("tiny", "align@spo", "p", resumed=False) as cost:
        assert cost().seconds >= 0


def test_short_stages_have_points_and_a_day_has_some_thousands():
    now, points = 0.0, 0
    while now < 86_400:
        now, points = now + pause(now), points + 1
    assert pause(0) == 1
    assert 2000 < points < 5000
