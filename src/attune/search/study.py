"""The study: one set of trials that any number of processes and hosts share.

Optuna counts trials when they end, so several workers start too many, and its GridSampler gives one grid point to two
workers. Here a worker claims a trial under a lock, and only while the budget allows one more: ADR 8 has the figures.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import optuna
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import InterfaceError, OperationalError

from attune.files import sqlite_url, values_sha
from attune.search.space import Distribution
from attune.search.storage import FAULTS, SCHEMES, fault

LOG = logging.getLogger("attune.search")
RANDOM_TRIALS = 6  # before tpe and gp use the scores so far: half of a search of twelve
FULL_TRIALS = 4  # before median stops a trial
LOCK_SECONDS = 600
OUTAGE = (StorageInternalError, OperationalError, InterfaceError)  # raised while a database is away
PAUSES = (1.0, 4.0, 15.0, 40.0)  # s, between the attempts of a call to it
HEARTBEAT = "heartbeat"  # user attribute of a running trial: time.time() of the last sign of life
RETRY_OF = "retry_of"  # user attribute of a trial: the number of the one whose worker was killed

P = ParamSpec("P")
R = TypeVar("R")
optuna.logging.set_verbosity(optuna.logging.WARNING)


class SearchError(RuntimeError):
    """The search cannot go on; the message says why."""


@dataclass(frozen=True)
class StudySpec:
    """What every worker of a study must know; it is sent to other processes."""

    name: str
    storage: str = field(repr=False)  # sqlite:///..., postgresql+psycopg://..., or a journal file; may hold a password
    space: Mapping[str, Distribution]
    n_trials: int  # over all sessions and hosts
    objectives: tuple[str, ...] = ("score",)  # all are maximized
    grid_points: tuple[dict[str, Any], ...] = ()
    sampler: str = "tpe"
    pruner: str = "none"
    resource: tuple[int, int] = (1, 1)  # steps of the first and the last report of a trial, for hyperband
    seed: int = 0


def storage_url(storage: str | None, name: str, root: Path) -> str:
    """The storage's address with absolute paths, as workers may start in another folder; None is a journal file.

    Raises:
        SearchError: unknown kind of address. The message does not quote it, as it may hold a password.
    """
    if storage is None:
        return str(root / ".checkpoints" / "search" / f"{name}.journal")
    if not storage.startswith(SCHEMES):
        raise SearchError(f"the storage's address must begin with {' or '.join(SCHEMES)}")
    file = storage.removeprefix("sqlite:///")
    return storage if file == storage else sqlite_url(root / file)


@contextmanager
def told(spec: StudySpec) -> Iterator[None]:
    """Turns an error of the storage into a SearchError, which names it and the way out."""
    try:
        yield
    except FAULTS as error:
        if (said := fault(spec.storage, error)) is None:
            raise
        raise SearchError(said) from None  # the cause may quote an address with a password


@contextmanager
def study_lock(spec: StudySpec) -> Iterator[None]:
    """A lock that one process at a time holds; released by the system, or by PostgreSQL, if that process dies."""
    if not spec.storage.startswith("postgresql"):
        file = Path(f"{spec.storage.removeprefix('sqlite:///')}.asking")
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file, timeout=LOCK_SECONDS):
            yield
        return
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import NullPool

    with create_engine(spec.storage, poolclass=NullPool).connect() as connection:  # the lock ends with the connection
        connection.execute(text(f"set lock_timeout = '{LOCK_SECONDS}s'"))
        connection.execute(text("select pg_advisory_lock(:key)"), {"key": int(values_sha("attune.search"), 16)})
        yield


def open_study(spec: StudySpec) -> optuna.Study:
    """The study; the first process creates it and enqueues the points of a grid."""
    with told(spec), study_lock(spec):  # Optuna's tables, too, can be created by one process only
        study = optuna.create_study(
            study_name=spec.name,
            storage=connect(spec.storage),
            pruner=pruner(spec),
            directions=["maximize"] * len(spec.objectives),
            load_if_exists=True,
        )
        with warnings.catch_warnings(action="ignore"):  # the function is experimental
            study.set_metric_names(list(spec.objectives))  # for optuna-dashboard
        # Every time, as a killed process may not have enqueued all. Not more than the budget: points that never get
        # their turn would be started before the retry of a killed trial.
        for point in spec.grid_points[: spec.n_trials]:
            study.enqueue_trial(point, skip_if_exists=True)
    return study


def connect(storage: str) -> BaseStorage:
    """Optuna's storage at an address."""
    if storage.startswith("postgresql"):
        return RDBStorage(storage, engine_kwargs={"pool_pre_ping": True})
    if storage.startswith("sqlite"):
        return RDBStorage(storage, engine_kwargs={"connect_args": {"timeout": 60}})
    # Optuna's own lock is a file: if its process is killed, the others wait 30 s for it
    lock = FileLock(f"{storage}.writing", timeout=LOCK_SECONDS)
    return JournalStorage(JournalFileBackend(storage, lock_obj=lock))  # type: ignore[arg-type]  # has what is called


def retry_on_outage(call: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
    """Calls, and again after a pause where the database is away, for up to a minute.

    Only for calls that may be repeated: the first one may have succeeded and only its answer been lost.
    """
    for pause in PAUSES:
        try:
            return call(*args, **options)
        except OUTAGE as error:
            LOG.warning("the study's storage is away (%s), again in %g s", type(error).__name__, pause)
            time.sleep(pause)
    return call(*args, **options)


def claim_trial(
    spec: StudySpec, study: optuna.Study, owner: dict[str, Any], session_start: float = 0.0
) -> optuna.Trial | None:
    """The next trial, with `owner` as user attributes; None if the budget is used up.

    The sampler's random numbers come from the seed and the trial's number: with one worker a search repeats exactly,
    and two workers never draw the same numbers.

    Raises:
        SearchError: the first trials of the session have all failed.
    """
    with study_lock(spec):
        trials = study.get_trials(deepcopy=False)
        check_failures(spec, trials, session_start)
        if not has_budget(spec, trials):
            return None
        study.sampler = sampler(spec, len(trials))
        trial = study.ask(dict(spec.space))
        for key, value in owner.items():
            trial.set_user_attr(key, value)
    return trial


def has_budget(spec: StudySpec, trials: Sequence[FrozenTrial]) -> bool:
    """Whether another trial may start. One that failed by itself counts; a killed one and its retry count once."""
    waiting = any(trial.state == TrialState.WAITING for trial in trials)
    return started(trials) < spec.n_trials and (waiting or not spec.grid_points)


def started(trials: Sequence[FrozenTrial]) -> int:
    """How many trials of the budget have started; a killed trial and its retry are one."""
    retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    waiting = sum(trial.state == TrialState.WAITING for trial in trials)
    killed = sum(trial.state == TrialState.FAIL and trial.number in retried for trial in trials)
    return len(trials) - waiting - killed


def finished(trials: Sequence[FrozenTrial]) -> int:
    """How many of the started trials have ended."""
    return started(trials) - sum(trial.state == TrialState.RUNNING for trial in trials)


def pending(spec: StudySpec, trials: Sequence[FrozenTrial]) -> str:
    """What is not finished yet, as a sentence; empty if everything is."""
    ended = finished(trials)
    running = started(trials) - ended
    if not running and not has_budget(spec, trials):
        return ""
    elsewhere = f", {running} at work in another session" if running else ""
    return f"{ended} of {spec.n_trials} trials are done{elsewhere}; the same command goes on"


def check_failures(spec: StudySpec, trials: Sequence[FrozenTrial], session_start: float) -> None:
    """Raises SearchError if a session's first three trials have failed and none before has ended well."""
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    own = [trial.user_attrs for trial in trials if trial.user_attrs.get(HEARTBEAT, 0.0) >= session_start]
    errors = [known["error"] for known in own if "error" in known]
    if not ended and len(errors) >= 3:
        raise SearchError(
            f"the first {len(errors)} trials have all failed; the last: {errors[-1]}. "
            f"The same command goes on; {how_to_reset(spec)}"
        )


def how_to_reset(spec: StudySpec) -> str:
    """How to delete the trials so far, as half a sentence."""
    if spec.storage.startswith(SCHEMES):
        return f"for a fresh start delete study {spec.name} in its database"
    is_whole = Path(spec.storage).stem == spec.name  # the full-length rerun shares the file of its search
    return f"for a fresh start delete {'' if is_whole else f'study {spec.name} in '}{spec.storage}"


def sampler(spec: StudySpec, number: int) -> optuna.samplers.BaseSampler:
    """What draws the parameters of trial `number`."""
    seed = int(values_sha([spec.seed, number]), 16) % 2**32
    if spec.sampler == "tpe":
        # constant_liar: running trials count as poor ones, or parallel workers would draw nearly the same parameters
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS, constant_liar=True)
    if spec.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
    if spec.sampler == "nsgaii":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, spec.n_trials // 4))
    return optuna.samplers.RandomSampler(seed=seed)  # never asked: all points of a grid are enqueued


def pruner(spec: StudySpec) -> optuna.pruners.BasePruner:
    """What stops a trial that scores worse than others did."""
    first, last = spec.resource
    if spec.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=FULL_TRIALS, n_min_trials=2)
    if spec.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=first, max_resource=max(first, last))
    if spec.pruner == "wilcoxon":
        with warnings.catch_warnings(action="ignore"):  # the class is experimental
            return optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=6)
    return optuna.pruners.NopPruner()
