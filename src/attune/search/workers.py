"""The workers: processes that take trials of a study, and what becomes of a trial whose process dies.

A dead process tells nobody. The host's own are known by process id and time of birth; those of another host by a sign
of life that every running trial gives each minute. A lost trial is told FAIL, and waits to be done once more.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
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

from attune.search.study import RETRY_OF, Plan, SearchError, ask, create, done, exclusive, is_wanted, join, patiently
from attune.tracking.labels import HOST, lives

LOG = logging.getLogger("attune.search")
BEAT_SECONDS = 60.0
SILENT_SECONDS = 600.0  # then a trial of another host counts as dead
POLL_SECONDS = 2.0
FUTILE = 3  # workers that may end between trials, for no good reason, before the search is given up
# what a trial may come to by its settings (RuntimeError: out of memory, not finite); all else is a mistake
OF_THE_TRIAL = (RuntimeError, ArithmeticError, MemoryError)

Objective = Callable[[optuna.Trial], Sequence[float]]
"""Values of a trial, one per objective; may raise TrialPruned. Sent to the workers, so it must be picklable."""


def run(
    plan: Plan,
    objective: Objective,
    slots: Sequence[str | None],
    *,
    deadline: float = float("inf"),
    bury: Callable[[], None] = lambda: None,
) -> optuna.Study:
    """Works on a study with one process per slot until no trial is wanted, or the deadline has passed.

    Args:
        slots: the GPU of each worker, as in CUDA_VISIBLE_DEVICES; None = whatever there is.
        deadline: time.time() after which no trial starts.
        bury: called after trials were lost, for whoever else keeps a record of them.

    Raises:
        SearchError: a worker met a mistake that would meet every trial.
    """
    study, futile, begun = create(plan), 0, time.time()
    bar = tqdm(total=plan.trials, desc=plan.study, unit="trial")
    os.environ.setdefault("TQDM_DISABLE", "1")  # in the workers: bars of several processes overwrite each other
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    errors = context.SimpleQueue()
    workers: dict[int, Any] = {}
    try:
        while True:
            lost = _reaped(plan, study, bury)
            codes = _codes_of_the_ended(workers)
            if not errors.empty():
                raise SearchError(errors.get())
            futile += 0 if lost else sum(code != 0 for code in codes)
            if futile > FUTILE:
                raise SearchError(f"workers end before they have done anything, with exit codes {codes}")
            trials = patiently(study.get_trials, deepcopy=False)
            _show(bar, plan, trials)
            if time.time() < deadline and is_wanted(plan, trials):
                for slot in set(range(len(slots))) - workers.keys():
                    values = (plan, objective, slots[slot], (begun, deadline), errors)
                    workers[slot] = context.Process(target=work, args=values, name=f"worker {slot}")
                    workers[slot].start()
            elif not workers:
                return study
            wait([worker.sentinel for worker in workers.values()], timeout=POLL_SECONDS)
    finally:
        bar.close()
        _stop(workers.values())
        _reaped(plan, study, bury)


def _show(bar: tqdm, plan: Plan, trials: Sequence[FrozenTrial]) -> None:
    """Moves the bar to how many trials are done, with the best score so far beside it."""
    over = done(trials)
    if over == bar.n:
        return
    full = [trial.values[0] for trial in trials if trial.state == TrialState.COMPLETE]
    bar.set_postfix({f"best {plan.objectives[0]}": f"{max(full):.4g}"} if full else {}, refresh=False)
    bar.update(over - bar.n)


def _reaped(plan: Plan, study: optuna.Study, bury: Callable[[], None]) -> list[int]:
    lost = patiently(reap, plan, study)
    if lost:
        LOG.warning("trials that died with their process: %s", ", ".join(map(str, lost)))
        bury()
    return lost


def _codes_of_the_ended(workers: dict[int, Any]) -> list[int]:
    """Takes the processes that are over out of `workers`; their exit codes."""
    ended = [slot for slot, worker in workers.items() if not worker.is_alive()]
    return [workers.pop(slot).exitcode for slot in ended]


def _stop(workers: Iterable[Any]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join()


def work(plan: Plan, objective: Objective, gpu: str | None, session: tuple[float, float], errors: Any) -> None:
    """What a worker process does: one trial after the other, while any is wanted.

    Args:
        session: time.time() at its start, and after which no trial starts.
    """
    begun, deadline = session
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    threading.Thread(target=_follow, args=(multiprocessing.parent_process(),), daemon=True).start()
    try:
        study = patiently(join, plan)
        while time.time() < deadline and (trial := patiently(ask, plan, study, claim(), begun)):
            attempt(study, trial, objective)
            gc.collect()  # what a failed trial's traceback held on to
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        errors.put(f"{type(error).__name__}: {error}")
        raise


def _follow(parent: Any) -> None:
    """Dies with the process that started this one: nobody would take care of what it does."""
    parent.join()
    os._exit(1)


def attempt(study: optuna.Study, trial: optuna.Trial, objective: Objective) -> None:
    """Runs a trial and tells the study how it ended; one that is interrupted stays RUNNING, to be reaped.

    A trial that another host has taken for dead is done again there, and dropped here.

    Raises:
        Exception: a mistake that is not of this trial alone, after the trial was told FAIL.
    """
    begun, values = time.time(), None
    try:
        with beating(trial):
            values, state = objective(trial), TrialState.COMPLETE
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except UpdateFinishedTrialError:
        LOG.warning("trial %d: another host took it for dead; it is dropped here", trial.number)
        return
    except Exception as error:
        state = TrialState.FAIL
        _note(trial, "error", f"{type(error).__name__}: {error}"[:500])
        LOG.warning("trial %d failed: %s: %s", trial.number, type(error).__name__, error)
        if not isinstance(error, OF_THE_TRIAL):
            patiently(study.tell, trial, state=state, skip_if_finished=True)
            raise
    _note(trial, "seconds", round(time.time() - begun, 1))
    patiently(study.tell, trial, values, state=state, skip_if_finished=True)


def _note(trial: optuna.Trial, key: str, value: Any) -> None:
    with suppress(UpdateFinishedTrialError):  # reaped by a host that heard nothing of it
        patiently(trial.set_user_attr, key, value)


def claim() -> dict[str, Any]:
    """By what a trial's process is known, here and elsewhere."""
    me = psutil.Process()
    return {"host": HOST, "pid": me.pid, "born": me.create_time(), "seen": time.time()}


@contextmanager
def beating(trial: optuna.Trial) -> Iterator[None]:
    """Gives a sign of life each minute for as long as the body runs."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(Exception):  # the trial may just have ended; a storage that is away now may be back later
                trial.set_user_attr("seen", time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def reap(plan: Plan, study: optuna.Study) -> list[int]:
    """Tells FAIL to trials whose process has died, has them done once more, and returns their numbers."""
    with exclusive(plan):
        trials = study.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        dead = [trial for trial in trials if trial.state == TrialState.RUNNING and is_dead(trial)]
        for trial in dead:
            if trial.number not in retried and RETRY_OF not in trial.user_attrs:  # first of all, lest it be forgotten
                params = trial.system_attrs.get("fixed_params", {}) | trial.params
                study.enqueue_trial(params, user_attrs={RETRY_OF: trial.number})
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    return [trial.number for trial in dead]


def is_dead(trial: FrozenTrial) -> bool:
    """Whether the process of a running trial is gone.

    One without a claim is: claims are made under the lock that whoever asks this holds.
    """
    known = trial.user_attrs
    if "seen" not in known:
        return True
    if known["host"] != HOST:
        return time.time() - known["seen"] > SILENT_SECONDS
    return not lives(known["pid"], known["born"])
