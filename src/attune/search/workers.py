"""The workers: processes that run trials of a study, and the retry of a trial whose process was killed.

A killed process of this host is recognized by process id and start time, at once; one of another host by the trial's
heartbeat. Its trial becomes FAIL and is enqueued once more. Why not Optuna's own heartbeat and retry: ADR 8.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from typing import Any

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from attune.search.storage import fault
from attune.search.study import (
    HEARTBEAT,
    RETRY_OF,
    SearchError,
    StudySpec,
    claim_trial,
    finished,
    has_budget,
    open_study,
    retry_on_outage,
    study_lock,
    told,
)
from attune.tracking.labels import HOST, is_alive

LOG = logging.getLogger("attune.search")
HEARTBEAT_SECONDS = 60.0
GRACE_SECONDS = 600.0  # without a heartbeat, after which a trial of another host counts as killed
POLL_SECONDS = 2.0
MAX_CRASHES = 3  # of workers outside of a trial, before the search is given up
# Errors that a trial's settings can cause (RuntimeError: out of memory, not finite); others would meet every trial.
TRIAL_ERRORS = (RuntimeError, ArithmeticError, MemoryError)

Objective = Callable[[optuna.Trial], Sequence[float]]
"""Values of a trial, one per objective; may raise TrialPruned. Sent to the workers, so it must be picklable."""


def run_workers(
    spec: StudySpec,
    objective: Objective,
    gpus: Sequence[str | None],
    *,
    deadline: float = float("inf"),
    mark_killed: Callable[[], None] = lambda: None,
) -> optuna.Study:
    """Works on a study with one process per entry of `gpus` until the budget is used up or the deadline has passed.

    Args:
        gpus: CUDA_VISIBLE_DEVICES of each worker; None leaves it as it is.
        deadline: time.time() after which no trial starts.
        mark_killed: called after trials of killed processes were found, to mark them in the tracking store.

    Raises:
        SearchError: a worker met an error that would meet every trial.
    """
    study, crashes, start = open_study(spec), 0, time.time()
    bar = tqdm(total=spec.n_trials, desc=spec.name, unit="trial")
    os.environ.setdefault("TQDM_DISABLE", "1")  # in the workers: bars of several processes overwrite each other
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    errors = context.SimpleQueue()
    workers: dict[int, Any] = {}
    try:
        while True:
            killed = _reap(spec, study, mark_killed)
            codes = [workers.pop(slot).exitcode for slot, process in list(workers.items()) if not process.is_alive()]
            if not errors.empty():
                raise SearchError(errors.get())
            crashes += 0 if killed else sum(code != 0 for code in codes)
            if crashes > MAX_CRASHES:
                raise SearchError(f"workers end before they have done anything, with exit codes {codes}")
            trials = retry_on_outage(study.get_trials, deepcopy=False)
            _update_bar(bar, spec, trials)
            if time.time() < deadline and has_budget(spec, trials):
                for slot in set(range(len(gpus))) - workers.keys():
                    args = (spec, objective, gpus[slot], start, deadline, errors)
                    workers[slot] = context.Process(target=work, args=args, name=f"worker {slot}")
                    workers[slot].start()
            elif not workers:
                return study
            wait([worker.sentinel for worker in workers.values()], timeout=POLL_SECONDS)
    finally:
        bar.close()
        _terminate(workers.values())
        with told(spec):
            _reap(spec, study, mark_killed)


def _update_bar(bar: tqdm, spec: StudySpec, trials: Sequence[FrozenTrial]) -> None:
    """Moves the bar to the number of finished trials, and shows the best score beside it."""
    ended = finished(trials)
    if ended == bar.n:
        return
    scores = [trial.values[0] for trial in trials if trial.state == TrialState.COMPLETE]
    bar.set_postfix({f"best {spec.objectives[0]}": f"{max(scores):.4g}"} if scores else {}, refresh=False)
    bar.update(ended - bar.n)


def _reap(spec: StudySpec, study: optuna.Study, mark_killed: Callable[[], None]) -> list[int]:
    killed = retry_on_outage(reap, spec, study)
    if killed:
        LOG.warning("trials whose process was killed: %s", ", ".join(map(str, killed)))
        mark_killed()
    return killed


def _terminate(workers: Iterable[Any]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join()


def work(
    spec: StudySpec, objective: Objective, gpu: str | None, session_start: float, deadline: float, errors: Any
) -> None:
    """The main function of a worker process: one trial after the other, while there is budget.

    Args:
        deadline: time.time() after which no trial starts.
        errors: gets a line about an error that would meet every trial.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    threading.Thread(target=_exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    try:
        study = retry_on_outage(open_study, spec)
        while time.time() < deadline and (
            trial := retry_on_outage(claim_trial, spec, study, ownership(), session_start)
        ):
            run_trial(study, trial, objective)
            gc.collect()  # the traceback of a failed trial may hold tensors
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        said = str(error) if isinstance(error, SearchError) else fault(spec.storage, error)
        errors.put(said or f"{type(error).__name__}: {error}")
        if said is None:
            raise
        sys.exit(1)  # the message says it all


def _exit_with(parent: Any) -> None:
    """Ends this process when its parent ends, for no other process would reap its trials."""
    parent.join()
    os._exit(1)


def run_trial(study: optuna.Study, trial: optuna.Trial, objective: Objective) -> None:
    """Runs a trial and reports its result to the study. An interrupted trial stays RUNNING until `reap` finds it.

    A trial that another host has taken for killed is retried there, and its result here is dropped.

    Raises:
        Exception: one that would meet every trial; the study has this one as FAIL before.
    """
    start, values, fatal = time.time(), None, None
    attrs: dict[str, Any] = {}
    try:
        with heartbeat(trial):
            values, state = objective(trial), TrialState.COMPLETE
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except UpdateFinishedTrialError:
        LOG.warning("trial %d: another host took it for killed; it is dropped here", trial.number)
        return
    except Exception as error:
        state, attrs["error"] = TrialState.FAIL, f"{type(error).__name__}: {error}"[:500]
        fatal = None if isinstance(error, TRIAL_ERRORS) else error
        LOG.warning("trial %d failed: %s: %s", trial.number, type(error).__name__, error)
    attrs["seconds"] = round(time.time() - start, 1)
    with suppress(UpdateFinishedTrialError):  # another host took the trial for killed
        for key, value in attrs.items():
            retry_on_outage(trial.set_user_attr, key, value)
    retry_on_outage(study.tell, trial, values, state=state, skip_if_finished=True)
    if fatal is not None:
        raise fatal


def ownership() -> dict[str, Any]:
    """User attributes by which `is_dead` recognizes this process; `owner` is set last, so it is never there alone."""
    me = psutil.Process()
    return {HEARTBEAT: time.time(), "owner": {"host": HOST, "pid": me.pid, "born": me.create_time()}}


@contextmanager
def heartbeat(trial: optuna.Trial) -> Iterator[None]:
    """Updates the trial's heartbeat each minute while the body runs."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(Exception):  # the trial may just have ended; a storage that is away may be back next time
                trial.set_user_attr(HEARTBEAT, time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def reap(spec: StudySpec, study: optuna.Study) -> list[int]:
    """Sets trials whose process was killed to FAIL, enqueues each once more, and returns their numbers."""
    with study_lock(spec):
        trials = study.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        dead = [trial for trial in trials if trial.state == TrialState.RUNNING and is_dead(trial)]
        for trial in dead:
            # enqueued before it is set to FAIL: if this process is killed in between, the next one finds the trial
            if trial.number not in retried and RETRY_OF not in trial.user_attrs:
                params = trial.system_attrs.get("fixed_params", {}) | trial.params
                study.enqueue_trial(params, user_attrs={RETRY_OF: trial.number})
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    return [trial.number for trial in dead]


def is_dead(trial: FrozenTrial) -> bool:
    """Whether the process of a running trial has ended.

    A trial without an owner is dead: the owner is set under the lock that the caller holds now.
    """
    owner = trial.user_attrs.get("owner")
    if owner is None:
        return True
    if owner["host"] != HOST:
        return time.time() - trial.user_attrs[HEARTBEAT] > GRACE_SECONDS
    return not is_alive(owner["pid"], owner["born"])
