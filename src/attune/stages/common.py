"""What every stage shares: its plan, its MLflow run, several processes, and where its shards are kept."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from filelock import FileLock, Timeout

from attune import tracking
from attune.config.plan import PlanError, Session, StagePlan, read, run_of_stage
from attune.config.schema import ConfigError
from attune.costs import Cost, measured
from attune.files import values_sha, write_atomically
from attune.paths import CHECKPOINTS, TIMES, TRACKED_RUNS, project_root
from attune.planning.checkpoints import ABOUT, is_done, remove_done
from attune.stages.preloaded import hand_over
from attune.stop import end_with_parent, stoppable

if TYPE_CHECKING:  # imports torch, for which stages wait
    from attune.training.checkpoint import Checkpoint

LOG = logging.getLogger("attune.stages")
LESS_MEMORY = {
    "prepare": "sampling.batch_size, or model.resolution",
    "train_preference": "preference.batch_size, with accumulation as many times higher",
    "align": "batch_size of the run in methods, with accumulation as many times higher, or set gradient_checkpointing",
    "generate": "generate.sampling.batch_size",
    "evaluate": "the number of other programs on this machine, or score with fewer scorers",
}
"""What a stage's need of memory depends on."""

TRACKED_AS = "tracked.json"  # in a checkpoint's folder: the tracking run

P = TypeVar("P", bound=StagePlan)


class Kept(Protocol):
    """What an interrupted stage goes on from: a training's checkpoint, or a folder of shards."""

    @property
    def folder(self) -> Path: ...

    @property
    def is_resumed(self) -> bool:
        """Whether there was something to go on from."""
        ...


@dataclass(frozen=True)
class ShardFolder:
    """The folder in which a stage keeps shards until it has ended."""

    folder: Path
    is_resumed: bool


@contextmanager
def shard_folder(name: str, plan: StagePlan) -> Iterator[ShardFolder]:
    """A stage's folder for shards, held under a lock by the main process.

    Shards are named by their content, so those of other settings do no harm, and are found when settings come back.
    When the with-body has succeeded the folder is marked as done; the next stage removes it, for by then DVC has
    stored what was made of it.

    Args:
        name: of stage, profile and run, say `generate-sd15-spo`.
    """
    folder = project_root() / CHECKPOINTS / name
    if not is_main_process():
        yield ShardFolder(folder, is_resumed=False)
        return
    with held(folder.with_suffix(".lock"), name):
        resumed = folder.exists() and not is_done(folder)
        work, parts = values_sha(plan.model_dump(mode="json")), sorted(plan.parts.values())
        about = {"stage": name, "profile": plan.profile, "plan": work, "parts": parts}
        write_atomically(folder / ABOUT, json.dumps(about).encode() + b"\n")
        yield ShardFolder(folder, resumed)
        (folder / TRACKED_AS).unlink(missing_ok=True)
        write_atomically(folder / ABOUT, json.dumps(about | {"done": True}).encode() + b"\n")


@contextmanager
def held(file: Path, name: str) -> Iterator[None]:
    """A lock of the main process, for which it waits; nothing in the others, which wait for the main one anyway."""
    if not is_main_process():
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        LOG.warning("another process is running %s and holds %s: this one waits for its end", name, file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def stage(
    name: str, plan: StagePlan, settings: Mapping[str, Any], kept: Kept | None = None, **tags: str
) -> Iterator[tracking.Run]:
    """Opens a stage: starts its tracking run, and measures what it costs.

    SIGTERM and Ctrl-C end it with a line; a training saves before that. So do a setting that turns out to be wrong, and
    a lack of memory, with what to lower.

    Args:
        name: say `align@spo`.
        settings: what is logged as the run's parameters, every default filled in.
        kept: what an interrupted stage left, from which it goes on: in the same tracking run, at the same account.
        tags: what the run is to be found by, besides the profile.
    """
    session, resumed = read(Session, "session"), kept is not None and kept.is_resumed
    work = values_sha(plan.model_dump(mode="json"))
    if is_main_process():
        remove_done(project_root())
    where: dict[str, Any] = {"uri": session.tracking, "tools": session.tools}
    where |= {"tags": {"profile": plan.profile, **tags}, "resume": tracked_before(kept, work)}
    try:
        with (
            stoppable(name),
            measured(plan.profile, name, work, resumed=resumed, rank=rank()) as cost,
            tracking.run(name, settings, **where) as run,
        ):
            if kept is not None and run.handle is not None:
                write_atomically(kept.folder / TRACKED_AS, json.dumps({**run.handle, "plan": work}).encode())
            yield run
            log_cost(run, name, spent := cost())
    except ConfigError as error:  # what only shows in the work: a service that is away, a function that does not run
        sys.exit(f"{name}: {error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error).splitlines() or ["MemoryError"])[0]
        sys.exit(f"{name}: out of memory ({said}): lower {LESS_MEMORY.get(name.partition('@')[0], 'batch_size')}")
    if is_main_process():
        note_seconds(name, spent.seconds)


def tracked_before(kept: Kept | None, work: str) -> dict[str, Any] | None:
    """The tracking run of an earlier part of the same work, as `Run.handle` gave it; None if there was none."""
    if kept is None:
        return None
    try:
        known = json.loads((kept.folder / TRACKED_AS).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict) or known.pop("plan", work) != work:
        return None  # its settings were others
    return known


def log_cost(run: tracking.Run, name: str, cost: Cost) -> None:
    """Logs what a stage cost as metrics of its run, and its seconds on the run of the pipeline."""
    numbers = {key: value for key, value in asdict(cost).items() if isinstance(value, int | float)}
    gigabytes = {f"{key}_gb": value / 1e9 for key, value in numbers.items() if "memory" in key}
    numbers = {key: value for key, value in numbers.items() if "memory" not in key} | gigabytes
    run.log({f"stage_cost/{key}": float(value) for key, value in numbers.items()}, 0)  # a bar, and no curve
    run.pipeline.summary({f"seconds/{name.replace('@', ' ')}": cost.seconds})


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking, of the GPU or of the machine; torch has no class of its own for the latter."""
    texts = ("can't allocate memory", "out of memory", "can't start new thread", "realloc of size")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def checkpoint_of(name: str, plan: StagePlan, inputs: Sequence[Path]) -> AbstractContextManager[Checkpoint]:
    """The checkpoint of a training. It is opened around the stage, so that it is removed after everything else.

    Args:
        inputs: outputs of other stages that it reads.
    """
    from attune.training.checkpoint import resumable

    seconds = read(Session, "session").checkpoint_seconds
    return resumable(project_root(), name, plan, inputs, every_seconds=seconds, writes=is_main_process())


def planned(kind: type[P], stage: str) -> P:
    """The plan of a stage, or of the run it works for; one line and no traceback if there is none.

    Sets the number of CPU threads too, which torch reads when it is imported.
    """
    hand_over()
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    try:
        plan = read(kind, stage, run_of_stage() if "run" in kind.model_fields else None)
        use_threads(read(Session, "session").threads)
        return plan
    except PlanError as error:
        sys.exit(str(error))


def use_threads(threads: int) -> None:
    """Sets the number of CPU threads, which torch reads when it is imported; the environment's own wins."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def launch(module: str) -> None:
    """Becomes several processes that work together, where the environment asks for them (docs/several_gpus.md).

    ATTUNE_PROCESSES=2 starts so many on this machine; ATTUNE_LAUNCH is any launcher's command line, which is given
    `-m <module>`. Does nothing in a process that a launcher has started, which RANK tells. The run is passed on in the
    environment, as DVC does: torchrun would take `--run` for an abbreviation of its own `--run-path`.
    """
    env = os.environ
    if "RANK" in env:  # launchers start workers in sessions of their own, which would wait for each other for hours
        end_with_parent()
    processes, launcher = env.get("ATTUNE_PROCESSES", ""), shlex.split(env.get("ATTUNE_LAUNCH", ""))
    if "RANK" in env or (processes in ("", "1") and not launcher):
        return
    if env.get("ATTUNE_LAUNCHED"):
        sys.exit(
            f"ATTUNE_LAUNCH: {launcher[0]!r} has started a single process without RANK in its environment; {_HINT}"
        )
    if not launcher and not (processes.isdecimal() and int(processes) > 0):
        sys.exit(f"ATTUNE_PROCESSES: a number of processes is wanted, not {processes!r}")
    if not launcher:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    env["ATTUNE_LAUNCHED"] = "1"
    if "--run" in sys.argv:
        env["DVC_STAGE"] = f"{module.rpartition('.')[2]}@{run_of_stage()}"
    try:
        os.execvp(launcher[0], [*launcher, "-m", module])
    except OSError as error:
        sys.exit(f"ATTUNE_LAUNCH: {launcher[0]}: {error.strerror}")


_HINT = "`accelerate launch --cpu` does so whatever number it is given, and ATTUNE_PROCESSES is the way instead"


def is_main_process() -> bool:
    """Whether this process is the one that writes; the only one, unless several work together."""
    return rank() == 0


def rank() -> int:
    """Which of the processes that work together this one is; 0 for the only one."""
    return int(os.environ.get("RANK", "0"))


def remember_run(name: str, run_id: str | None) -> None:
    """Notes which tracking run trained a model, so that evaluation can put its scores on the same row."""
    if run_id:
        TRACKED_RUNS.mkdir(parents=True, exist_ok=True)
        (TRACKED_RUNS / name).write_text(run_id + "\n")


def note_seconds(stage: str, seconds: float) -> None:
    """Notes how long a stage took, for the next plan's table; nothing depends on it."""
    file = project_root() / TIMES
    with FileLock(file.with_suffix(".lock")):  # stages may run side by side
        try:
            known = json.loads(file.read_text())
        except (OSError, ValueError):
            known = {}
        write_atomically(file, json.dumps({**known, stage: round(seconds, 1)}).encode())
