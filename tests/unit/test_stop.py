"""SIGTERM and Ctrl-C: a training saves after the batch it is in; everything else ends at once. Codes 143 and 130."""

import gc
import os
import signal
import subprocess
import sys

import pytest

import tiny
from attune.stop import Stopped, handling, stop_requests, stoppable
from attune.training.checkpoint import Checkpoint
from attune.training.early_stopping import EarlyStopping
from attune.training.loop import Callbacks
from trainables import Line, at_batch, equal, method


def signalled(trained, at, signum):
    """Lets a signal come during batch number `at` of a training."""
    at_batch(trained, at, lambda: os.kill(os.getpid(), signum))


def code_of(function, *args, **kwargs):
    """The exit code with which a function stops the process."""
    try:
        function(*args, **kwargs)
    except Stopped as stopped:
        return stopped.code
    return None


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_that_is_told_to_stop_goes_on_where_it_stopped(
    new_policy, data, tmp_path, signum, code, accumulation
):
    """The interval would not save for a minute. A group of two batches is finished before it is saved."""
    policy, asked = new_policy(), {"batches": 5, "accumulation": accumulation}
    history = tiny.run(method("dpo", policy, **asked), data)
    stopped = method("dpo", new_policy(), **asked)
    signalled(stopped, 2, signum)
    assert code_of(tiny.run, stopped, data, checkpoint=Checkpoint(tmp_path, "align@x", "key")) == code
    gc.collect()  # the ended process's lock
    again, drawn = new_policy(), []
    resumed = method("dpo", again, **asked)
    batches = tiny.batches(data, resumed)

    def counted(b, shard):
        drawn.append(b)
        return batches(b, shard)

    assert tiny.run(resumed, data, batches=counted, checkpoint=Checkpoint(tmp_path, "align@x", "key")) == history
    assert equal(policy.parameters(), again.parameters())
    assert drawn == ([3, 4] if accumulation == 1 else [4])


def test_a_training_that_keeps_nothing_stops_at_once():
    """A trial of a search: finishing the batch would only delay the end."""
    line = Line([1.0], [1.0])
    signalled(line, 0, signal.SIGTERM)
    assert code_of(stoppable("sweep")(line.train), 2) == 143
    assert line.w == 0


def test_the_curve_of_a_resumed_training_is_logged_from_its_beginning(tmp_path):
    line = Line([1.0], [2.0], [3.0])
    signalled(line, 1, signal.SIGTERM)
    assert code_of(line.train, 3, {"checkpoint": Checkpoint(tmp_path, "a", "k")}) == 143
    gc.collect()
    logged = []
    log = Callbacks(log=lambda metrics, step: logged.append((step, metrics["x"], sorted(metrics))))
    again = Line([1.0], [2.0], [3.0])
    again.train(3, {"checkpoint": Checkpoint(tmp_path, "a", "k"), "callbacks": log})
    names = ["grad_norm", "loss", "lr", "x"]
    assert logged == [(1, 1.0, names), (2, 2.0, names), (3, 3.0, names)]


def test_a_second_signal_stops_at_once():
    def stop(signum, frame):
        raise Stopped(signum)

    with handling(stop), stop_requests() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request() == signal.SIGTERM
        assert code_of(os.kill, os.getpid(), signal.SIGINT) == 130


def test_outside_of_a_training_the_body_ends_with_its_clean_up_and_a_line(caplog):
    done = []

    @stoppable("generate@base")
    def body():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("went on")
        finally:
            done.append("cleaned up")

    assert code_of(body) == 143
    assert done == ["cleaned up"]
    assert [record.getMessage() for record in caplog.records] == ["generate@base: stopped by SIGTERM"]


def test_an_ignored_signal_stays_ignored():
    """nohup and shells without job control ignore SIGINT for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable("x"):
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


SLEEPER = """
import time
from attune.stop import stoppable
with stoppable("report"):
    print("running", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_code_is_what_a_shell_expects(signum, code):
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout.readline() == "running\n"
        process.send_signal(signum)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert errors == f"report: stopped by {signal.Signals(signum).name}\n"


def test_a_request_during_the_last_validation_is_not_forgotten(tmp_path):
    """All batches are done and saved; the score is, too, so that it is not taken again."""
    line, checkpoint, taken = Line([1.0]), Checkpoint(tmp_path, "a", "k"), []

    def score():
        taken.append(1)
        if len(taken) == 2:  # after the last batch
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    options = {"checkpoint": checkpoint, "early_stopping": EarlyStopping(score, every=10)}
    assert code_of(line.train, 1, options) == 143
    del options, checkpoint
    gc.collect()
    again = {"checkpoint": Checkpoint(tmp_path, "a", "k"), "early_stopping": EarlyStopping(score, every=10)}
    _, scores = Line([1.0]).train(1, again)
    assert len(scores) == len(taken) == 2
