"""The graph of stages as a value, what is read from logs, and how many stages run at a time."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

import stages
from attune.config.resolve import load
from attune.pipeline.graph import Graph, estimates, first_of, longest_paths, time_left, widest
from attune.pipeline.logs import Bar, Log, last_bar, plain
from attune.pipeline.progress import CACHED, FAILED, RAN, UNCHANGED, Progress
from attune.pipeline.screen import headline, screen
from attune.stages import repro

RUNS = {"base": {"after": "data"}}
NEEDS = {
    "plan": (),
    "prepare": ("plan",),
    "spm": ("prepare",),
    "dpo": ("prepare",),
    "spo": ("spm", "prepare"),
    "report": ("dpo", "spo"),
}
GRAPH = Graph(tuple(NEEDS), {stage: frozenset(needs) for stage, needs in NEEDS.items()})
SECONDS = {"plan": 2, "prepare": 40, "spm": 50, "dpo": 60, "spo": 70, "report": 5}


def test_what_needs_nothing_that_is_missing_is_ready():
    assert GRAPH.ready((), ()) == ["plan"]
    assert GRAPH.ready({"plan", "prepare"}, {"plan", "prepare", "spm"}) == ["dpo"]
    assert GRAPH.ready({"plan", "prepare", "spm"}, {"plan", "prepare", "spm", "dpo"}) == ["spo"]
    assert widest(GRAPH) == 2


def test_the_longest_path_goes_first():
    lengths = longest_paths(GRAPH, SECONDS)
    assert lengths == {"plan": 167, "prepare": 165, "spm": 125, "dpo": 65, "spo": 75, "report": 5}
    assert first_of(["dpo", "spm"], lengths) == "spm"
    assert first_of([], lengths) is None
    unknown = longest_paths(GRAPH, {})
    assert unknown["spm"] == 3 > unknown["dpo"] == 2, "of unknown times the number of stages counts"


def test_the_time_left_is_that_of_the_lanes():
    """By hand: prepare 40, then spm 50 and spo 70 beside dpo 60, then report 5."""
    assert time_left(GRAPH, SECONDS, {"plan"}, {}, 2) == 40 + 50 + 70 + 5
    assert time_left(GRAPH, SECONDS, {"plan"}, {}, 1) == 40 + 50 + 60 + 70 + 5
    assert time_left(GRAPH, SECONDS, {"plan", "prepare", "spm"}, {"dpo": 20, "spo": 100}, 2) == 40 + 5
    assert time_left(GRAPH, SECONDS, set(GRAPH.order), {}, 2) == 0
    assert time_left(GRAPH, {"plan": 2, "dpo": 60}, set(), {}, 2) == 62


def test_a_time_that_is_not_known_is_that_of_its_kind():
    known = {"generate@base": 10.0, "generate@dpo": 20.0, "align@dpo": 60.0}
    assert estimates(["generate@spo", "generate@base", "report"], known) == {"generate@spo": 15, "generate@base": 10}


def test_the_whole_goes_by_what_dvc_says():
    progress = Progress(GRAPH, 2, dict(SECONDS))
    for stage, line, how in (
        ("plan", "Running stage 'plan':", RAN),
        ("prepare", "Stage 'prepare' didn't change, skipping", UNCHANGED),
        ("spm", "Stage 'spm' is cached - skipping run, checking out outputs", CACHED),
    ):
        progress.start(stage)
        assert progress.hear(line) == stage
        assert progress.how[stage] == how
        progress.end(stage, how)
    assert progress.hear("a line of a stage about 'prepare'") is None
    assert progress.done == {"plan", "prepare", "spm"}
    assert progress.known["prepare"] == 40, "a stage that was skipped says nothing about its time"
    assert progress.known["plan"] < 1
    assert progress.left() == "about 75 s left"


def test_the_headline_says_which_stages_run_and_what_is_left():
    progress = Progress(GRAPH, 2, dict(SECONDS))
    assert headline(progress) == "0 of 6 stages have ended; about 3 min left"
    assert headline(Progress(GRAPH, 2, {"dpo": 60.0})) == "0 of 6 stages have ended; at least 60 s left"
    assert headline(Progress(GRAPH, 2, {})) == "0 of 6 stages have ended"
    for stage in ("plan", "prepare"):
        progress.start(stage)
        progress.end(stage, UNCHANGED)
    progress.start("spm")
    assert headline(progress) == "stage 3 of 6; about 2 min left"
    progress.start("dpo")
    assert headline(progress) == "stages 3 and 4 of 6; about 2 min left"
    progress.end("dpo", FAILED)
    assert headline(progress) == "stage 4 of 6; failed: dpo"


def test_a_log_is_lines_and_a_bar(tmp_path):
    file = tmp_path / "log"
    file.write_bytes("Running stage 'x':\n\rx:  0%|   | 0/9 [00:00<?, ?batch/s]\rx: 33%|█".encode()[:-1])
    log = Log(file)
    assert log.new_lines() == ["Running stage 'x':"]
    assert log.bar == Bar("x", "0/9", 0)
    with file.open("ab") as more:
        more.write(
            "█".encode()[-1:]
            + b"#   | 3/9 [00:01<00:02,  3.0batch/s, loss=0.69]attune: a warning\n\x1b[31mred\x1b[0m\tx"
        )
    assert log.new_lines() == ["attune: a warning"]
    assert log.bar == Bar("x", "3/9", 33)
    with file.open("ab") as more:
        more.write(b"\x07\n")
    assert log.new_lines() == ["red    x\\x07"]


@pytest.mark.parametrize(
    ("text", "bar"),
    [
        ("\rbase: oracle: 100%|##| 1/1 [00:00<00:00,  4.50batch/s]", Bar("base: oracle", "1/1", 100)),
        ("prepare: 60row [00:10,  5.83row/s]\x1b[A", Bar("prepare", "60row", None)),
        (" 10%|#         | 1/10 [00:00<?]", Bar("", "1/10", 10)),
        ("loss: 12 [see a: b]", None),
    ],
)
def test_bars_of_tqdm_are_read_and_not_shown(text, bar):
    assert last_bar(text) == bar
    assert list(plain(text)) == ([] if bar else [text])


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Settings, on a machine of eight cores without a GPU."""
    monkeypatch.setattr(repro, "cores", lambda: 8)
    with stages.inside(stages.write(tmp_path, RUNS)):
        monkeypatch.setenv("ATTUNE_DEVICE", "cpu")
        monkeypatch.delenv("OMP_NUM_THREADS")
        yield load()


def test_a_log_that_was_removed_has_no_lines(tmp_path):
    log = Log(tmp_path / "a.log")
    assert log.new_lines() == []
    log.file.write_text("one\n")
    assert log.new_lines() == ["one"]


def test_a_long_line_without_a_bar_is_read_at_once():
    line = ",".join(f'"k{number}":{number}' for number in range(6000))
    began = time.monotonic()
    assert list(plain(line)) == [line]
    assert time.monotonic() - began < 2


def test_what_is_no_terminal_gets_lines_alone(tmp_path, monkeypatch):
    """Also where FORCE_COLOR is set, as in CI; a character that it cannot hold is written as its number."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with (tmp_path / "output").open("w", encoding="ascii") as output:
        monkeypatch.setattr("sys.stdout", output)
        with screen() as shown:
            shown.say("a | 50 % → ready")
            shown.show(Progress(GRAPH, 2, {}), {})
    assert (tmp_path / "output").read_text() == "a | 50 % \\u2192 ready\n"


def test_as_many_stages_run_as_cores_and_memory_allow(machine, monkeypatch):
    assert repro.default_jobs(machine) == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert repro.default_jobs(machine) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert repro.default_jobs(machine) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=int(4.5e9)))
    assert repro.default_jobs(machine) == 3


@pytest.mark.parametrize(("name", "value"), [("ATTUNE_PROCESSES", "2"), ("ATTUNE_LAUNCH", "accelerate launch")])
def test_processes_of_the_users_own_are_left_alone(machine, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert repro.default_jobs(machine) == 1
    assert repro.processes_for("prepare", {"prepare": 40}, 4) == {}


def test_a_stage_alone_is_split_where_its_bytes_stay_and_it_is_worth_it(machine):
    assert repro.processes_for("prepare", {}, 4) == {"ATTUNE_PROCESSES": "4"}
    assert repro.processes_for("generate@dpo", {"generate@dpo": 100}, 2) == {"ATTUNE_PROCESSES": "2"}
    assert repro.processes_for("generate@dpo", {"generate@dpo": 5}, 2) == {}
    assert repro.processes_for("align@dpo", {"align@dpo": 1000}, 2) == {}
    assert repro.processes_for("train_preference", {"train_preference": 1000}, 2) == {}


def test_a_gpu_is_filled_by_one_stage(machine, monkeypatch):
    monkeypatch.setattr(repro, "has_gpu", lambda: True)
    assert repro.default_jobs(machine) == 1


def test_on_a_gpu_stages_are_no_forks(machine, monkeypatch):
    """CUDA would not work in them; elsewhere the libraries find what they read from the environment when imported."""
    monkeypatch.setattr(repro, "serving", lambda environment, errors: nullcontext(environment))
    with repro.server(machine) as given:
        assert given["TQDM_MININTERVAL"] == "0.5"
        assert given["OMP_NUM_THREADS"]
    monkeypatch.setattr(repro, "has_gpu", lambda: True)
    with repro.server(machine) as given:
        assert given == {}


def test_the_lock_is_no_standard_stream(machine):
    """Where standard input is closed it would be, and workers, which have a pipe there, would not inherit it."""
    repro.LOGS.mkdir(parents=True, exist_ok=True)
    kept = os.dup(0)
    os.close(0)
    try:
        with repro.only_one_here() as lock:
            assert lock > 2
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_stages_are_redefined_by_values_and_not_by_comments(machine):
    Path("dvc.yaml").write_text("stages: {}\n")
    before, is_redefined = repro.PARAMS.read_text(), repro.redefinition()
    assert not is_redefined()
    repro.PARAMS.write_text(f"# later\n{before}")
    assert not is_redefined()
    for text in (before.replace("profile: ", "profile: other_"), "profile: [", ""):
        repro.PARAMS.write_text(text)
        assert is_redefined()


def test_words_of_dvc_and_more_jobs_do_not_go_together(machine):
    with pytest.raises(SystemExit, match="--jobs 2: '-f' is for `dvc repro`, which runs one stage at a time"):
        stages.call("repro", "--jobs", "2", "-f")


def test_times_of_stages_that_note_none_are_noted(machine):
    progress = Progress(GRAPH, 2, {})
    for stage in ("spm", "dpo"):
        progress.start(stage)
        progress.end(stage, RAN)
    repro.TIMES.parent.mkdir(exist_ok=True)
    repro.TIMES.write_text('{"dpo": 61.5, "old": 3.0}')
    repro.note_other_seconds(progress)
    assert json.loads(repro.TIMES.read_text()) == {"spm": 0.0, "dpo": 61.5, "old": 3.0}
