"""The study: one set of trials that any number of processes and hosts share, each trial given out once.

Optuna counts trials after they end, so several workers overshoot, and a grid's cells are drawn by more than one. Here
a trial is given out under a lock that all workers of a storage share, and only if one is still wanted.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import InterfaceError, OperationalError

from attune.files import values_sha

LOG = logging.getLogger("attune.search")
RANDOM_TRIALS = 6  # before tpe and gp learn from the others: half of a sweep of twelve
FULL_TRIALS = 4  # before median stops one
LOCK_SECONDS = 600
OUTAGE = (StorageInternalError, OperationalError, InterfaceError)  # what a database that is away looks like
PAUSES = (1.0, 4.0, 15.0, 40.0)  # s, from one attempt at it to the next
ADDRESSES = ("sqlite:///", "postgresql+psycopg://")
RETRY_OF = "retry_of"  # user attribute of a trial: the number of the one that died with its worker

optuna.logging.set_verbosity(optuna.logging.WARNING)


P, R = ParamSpec("P"), TypeVar("R")


class SearchError(RuntimeError):
    """The search cannot go on; the message says why."""


@dataclass(frozen=True)
class Plan:
    """What every worker of a study must know; a value that can be sent to another process."""

    study: str
    storage: str = field(repr=False)  # sqlite:///..., postgresql+psycopg://..., or a journal file; may hold a password
    space: dict[str, BaseDistribution]
    trials: int  # wanted in all
    objectives: tuple[str, ...] = ("score",)  # all are raised
    cells: tuple[dict[str, Any], ...] = ()  # of a grid
    sampler: str = "tpe"
    pruner: str = "none"
    resource: tuple[int, int] = (1, 1)  # steps of the first and the last report of a trial, for hyperband
    seed: int = 0


def located(storage: str | None, name: str, root: Path) -> str:
    """The storage's address, whatever folder a worker starts in.

    Raises:
        SearchError: it is none that is known; it is not quoted, for it may hold a password.
    """
    if storage is None:
        return str(root / ".checkpoints" / "search" / f"{name}.journal")
    if not storage.startswith(ADDRESSES):
        raise SearchError(f"the storage's address must begin with {' or '.join(ADDRESSES)}")
    file = storage.removeprefix("sqlite:///")
    return storage if file == storage else f"sqlite:///{root / file}"


@contextmanager
def exclusive(plan: Plan) -> Iterator[None]:
    """Holds what only one process of the study may do at a time; given back if the process dies."""
    if not plan.storage.startswith("postgresql"):
        file = Path(f"{plan.storage.removeprefix('sqlite:///')}.asking")
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file, timeout=LOCK_SECONDS):
            yield
        return
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import NullPool

    with create_engine(plan.storage, poolclass=NullPool).connect() as connection:  # the lock ends with the connection
        connection.execute(text(f"set lock_timeout = '{LOCK_SECONDS}s'"))
        connection.execute(text("select pg_advisory_lock(:key)"), {"key": int(values_sha("attune.search"), 16)})
        yield


def create(plan: Plan) -> optuna.Study:
    """The study, made if this is the first process to ask for it, with a grid's cells waiting in it."""
    with exclusive(plan):
        study = optuna.create_study(
            study_name=plan.study,
            storage=connect(plan.storage),
            directions=["maximize"] * len(plan.objectives),
            load_if_exists=True,
        )
        with warnings.catch_warnings(action="ignore"):  # that Optuna may change the function
            study.set_metric_names(list(plan.objectives))  # for optuna-dashboard
        # again, in case the last attempt did not get through all; no more than wanted, or they would go before a retry
        for cell in plan.cells[: plan.trials]:
            study.enqueue_trial(cell, skip_if_exists=True)
    return study


def join(plan: Plan) -> optuna.Study:
    """The study that another process made, with this plan's pruner."""
    return optuna.load_study(study_name=plan.study, storage=connect(plan.storage), pruner=pruner(plan))


def connect(storage: str) -> BaseStorage:
    """Optuna's storage at an address."""
    if storage.startswith("postgresql"):
        return RDBStorage(storage, engine_kwargs={"pool_pre_ping": True})
    if storage.startswith("sqlite"):
        return RDBStorage(storage, engine_kwargs={"connect_args": {"timeout": 60}})
    # Optuna's own lock is a file that a killed process leaves behind, and for which the others wait half a minute
    return JournalStorage(JournalFileBackend(storage, lock_obj=FileLock(f"{storage}.writing", timeout=LOCK_SECONDS)))


def patiently(call: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
    """Calls it, and again after a while where the database is away; an outage of a minute ends no search.

    For calls that may be made twice, as the first may have come through and only its answer been lost.
    """
    for pause in PAUSES:
        try:
            return call(*args, **options)
        except OUTAGE as error:
            LOG.warning("the study's storage is away (%s), again in %g s", type(error).__name__, pause)
            time.sleep(pause)
    return call(*args, **options)


def ask(plan: Plan, study: optuna.Study, claim: dict[str, Any], begun: float = 0.0) -> optuna.Trial | None:
    """The next trial, marked with `claim`; None if no more are wanted.

    Trial n's random numbers come from the seed and n: one worker's sweep repeats exactly, and two never draw alike.

    Args:
        begun: time.time() at the session's start.

    Raises:
        SearchError: the session's first trials have all failed.
    """
    with exclusive(plan):
        trials = study.get_trials(deepcopy=False)
        check_any_works(plan, trials, begun)
        if not is_wanted(plan, trials):
            return None
        study.sampler = sampler(plan, len(trials))
        trial = study.ask(plan.space)
        for key, value in claim.items():
            trial.set_user_attr(key, value)
    return trial


def is_wanted(plan: Plan, trials: Sequence[FrozenTrial]) -> bool:
    """Whether another trial may start. One that failed of itself has had its turn, one that died is retried."""
    waiting = any(trial.state == TrialState.WAITING for trial in trials)
    return turns(trials) < plan.trials and (waiting or not plan.cells)


def turns(trials: Sequence[FrozenTrial]) -> int:
    """How many trials were given out, without those that died and were put up again."""
    retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    waiting = sum(trial.state == TrialState.WAITING for trial in trials)
    lost = sum(trial.state == TrialState.FAIL and trial.number in retried for trial in trials)
    return len(trials) - waiting - lost


def done(trials: Sequence[FrozenTrial]) -> int:
    """How many of the turns are over."""
    return turns(trials) - sum(trial.state == TrialState.RUNNING for trial in trials)


def remaining(plan: Plan, trials: Sequence[FrozenTrial]) -> str:
    """What of a study is not done yet, in words; empty if all is."""
    over = done(trials)
    running = turns(trials) - over
    if not running and not is_wanted(plan, trials):
        return ""
    elsewhere = f", {running} at work in another session" if running else ""
    return f"{over} of {plan.trials} trials are done{elsewhere}; the same command goes on"


def check_any_works(plan: Plan, trials: Sequence[FrozenTrial], begun: float) -> None:
    """Stops a session whose first three trials have failed: what is wrong is wrong with all of them."""
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    own = [trial.user_attrs for trial in trials if trial.user_attrs.get("seen", 0.0) >= begun]
    errors = [known["error"] for known in own if "error" in known]
    if not ended and len(errors) >= 3:
        raise SearchError(
            f"the first {len(errors)} trials have all failed; the last: {errors[-1]}. "
            f"The same command goes on; {fresh_start(plan)}"
        )


def fresh_start(plan: Plan) -> str:
    """How to forget the trials so far, in words."""
    if plan.storage.startswith(ADDRESSES):
        return f"for a fresh start delete study {plan.study} in its database"
    whole = Path(plan.storage).stem == plan.study  # the last round shares the file of its search
    return f"for a fresh start delete {'' if whole else f'study {plan.study} in '}{plan.storage}"


def sampler(plan: Plan, number: int) -> optuna.samplers.BaseSampler:
    """What draws the parameters of trial `number`."""
    seed = int(values_sha([plan.seed, number]), 16) % 2**32
    if plan.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
    if plan.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
    if plan.sampler == "nsgaii":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, plan.trials // 4))
    return optuna.samplers.RandomSampler(seed=seed)  # a grid's cells are waiting: nothing is left to draw


def pruner(plan: Plan) -> optuna.pruners.BasePruner:
    """What stops a trial that does worse than others did."""
    first, last = plan.resource
    if plan.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=FULL_TRIALS, n_min_trials=2)
    if plan.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=first, max_resource=max(first, last))
    if plan.pruner == "wilcoxon":
        with warnings.catch_warnings(action="ignore"):  # that Optuna may change the class
            return optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=6)
    return optuna.pruners.NopPruner()
