"""Runs the whole pipeline, what has changed of it, several stages at a time; then says how the runs compare.

DVC decides what has changed, runs each stage and keeps what it makes, as in `dvc repro`; with --jobs 1 it is `dvc
repro`. Words that are DVC's (targets, -f, --pull ...) are given to `dvc repro`, which runs alone and one by one. What
each stage writes is in .checkpoints/logs. Ctrl-C stops all; the same command goes on.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from attune.config.resolve import PARAMS, Settings, load, read_yaml
from attune.config.schema import ConfigError
from attune.costs import noted_seconds
from attune.files import write_atomically
from attune.paths import CHECKPOINTS, TIMES, Paths, project_root
from attune.pipeline.graph import Graph, widest
from attune.pipeline.logs import last_lines
from attune.pipeline.progress import FAILED, RAN, STOPPED, Progress, duration
from attune.pipeline.schedule import ALL, Run, one_by_one, side_by_side
from attune.pipeline.screen import screen
from attune.pipeline.workers import Workers, workers
from attune.planning import costs
from attune.planning.problems import machine
from attune.process_groups import Groups
from attune.stages.preloaded import serving
from attune.stages.repro_worker import BARS
from attune.text import printable

LARGEST_NAME = 20  # characters of a run's name in the table
WIDTH = 99  # characters of a line
LOGS = CHECKPOINTS / "logs"
WORKER = (sys.executable, "-m", "attune.stages.repro_worker")
LOCK_ORDER = CHECKPOINTS / "lock_order.json"
LAST_LINES = 100  # of the log of a stage that failed
SPLIT = ("prepare", "generate", "evaluate")
"""Stages that several processes can share: what they make has the same bytes by any number of them (shards.py)."""
WORTH_SPLITTING = 15  # s; what starting more processes takes is a third of it
STAGE_MEMORY = 1.0e9  # bytes of a stage's Python with its libraries
MEMORY_SHARE = 0.8  # of what is free


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--jobs", type=_count, help="stages at a time; default: 1 on a GPU, else by cores and memory")
    given, words = parser.parse_known_args()
    if words and (given.jobs or 1) > 1:
        sys.exit(f"--jobs {given.jobs}: {words[0]!r} is for `dvc repro`, which runs one stage at a time; leave one out")
    try:
        settings = load()
    except ConfigError as error:
        sys.exit(str(error))
    try:
        code = run_dvc(words) if words else run_all(settings, given.jobs)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # as of `make repro | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes at its end
        sys.exit("nobody reads the output any more, so the stages were stopped; `make repro` goes on from there")
    if code:
        sys.exit(code)
    reports = Paths(settings.profile).reports
    summary, report = reports / "summary.json", reports / "report.html"
    if summary.exists() and report.exists():
        sys.stdout.write(f"{table(summary.read_text(encoding='utf-8'))}report: {report}\n")


def run_dvc(words: list[str]) -> int:
    """Runs `dvc repro` with words of its own, on the terminal; the exit code."""
    groups = Groups()
    with groups.stoppable():
        code = groups.wait(subprocess.Popen([sys.executable, "-m", "dvc", "repro", *words], start_new_session=True))
    return 128 + groups.stopped if groups.stopped else code


def run_all(settings: Settings, jobs: int | None) -> int:
    """Runs the pipeline; the exit code.

    Args:
        jobs: stages at a time; None: as many as the machine can run.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    groups, began, is_redefined = Groups(), time.monotonic(), redefinition()
    with only_one_here() as lock, workers(WORKER, groups, LOGS / "workers.log", lock) as pool, screen() as shown:
        pool.start(1)
        jobs = jobs or default_jobs(settings)  # while the worker imports DVC
        found = pool.ask("graph")
        graph = Graph(tuple(found["order"]), {k: frozenset(v) for k, v in found["needs"].items()}) if found else None
        jobs = min(jobs, widest(graph)) if graph else 1
        progress = Progress(graph or Graph((), {}), jobs, noted_seconds())
        run = Run(progress, pool, shown, LOGS, lambda: bool(groups.stopped), is_redefined)
        if not groups.stopped:
            pool.start(jobs)
        if not groups.stopped and jobs == 1:
            with groups.stopped_on_error():
                one_by_one(run)
        elif not groups.stopped:
            with lock_in_order(pool, progress.graph), server(settings) as preloaded, groups.stopped_on_error():
                side_by_side(run, preloaded, lambda stage: processes_for(stage, progress.seconds(), jobs))
    note_other_seconds(progress)
    sys.stdout.writelines(
        f"{line}\n" for line in outcome(progress, run.code, bool(groups.stopped), time.monotonic() - began)
    )
    return 128 + groups.stopped if groups.stopped else run.code


@contextmanager
def only_one_here() -> Iterator[int]:
    """A lock of this checkout, of which it gives the file descriptor; waits for one that is running, or still ending.

    Workers inherit it: when one `attune repro` is killed, the next waits until its stages have saved and ended.
    """
    with (LOGS / "running").open("w") as opened, os.fdopen(fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 3)) as file:
        # not 0 to 2, as it would be where standard input is closed: workers have other things there
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write(
                "another `make repro` is running here, or its stages are ending: this one waits for that\n"
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def redefinition() -> Callable[[], bool]:
    """A function that says whether what DVC makes the stages of has changed since: by values, not by comments.

    Workers read it for each stage anew, while `dvc repro` reads it once.
    """
    files = (Path("dvc.yaml"), PARAMS)

    def texts() -> list[bytes]:
        return [file.read_bytes() if file.exists() else b"" for file in files]

    def values() -> list[dict[str, Any]] | None:
        try:
            return [read_yaml(file) for file in files]
        except ConfigError:
            return None

    before, values_before = texts(), values()
    return lambda: texts() != before and values() != values_before


def server(settings: Settings) -> AbstractContextManager[Mapping[str, str]]:
    """A server of stages whose libraries are imported, and the variables by which stages find it.

    None on a GPU: diffusers asks for it when it is imported, after which CUDA does not work in forks.
    """
    if has_gpu():
        return nullcontext({})
    return serving({"OMP_NUM_THREADS": str(settings.threads), **BARS, **os.environ}, LOGS / "preloaded.log")


def default_jobs(settings: Settings) -> int:
    """How many stages this machine can run at a time: on a GPU, or where a stage is split by the user, one."""
    env = os.environ
    if has_gpu() or env.get("ATTUNE_PROCESSES", "1") != "1" or env.get("ATTUNE_LAUNCH"):
        return 1
    given = env.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() and int(given) else settings.threads
    return max(1, min(cores() // threads, stages_in_memory(settings)))


def has_gpu() -> bool:
    """Whether stages use a GPU. Torch, which takes a second to import, is asked only where a driver is there."""
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
    if os.environ.get("ATTUNE_DEVICE") == "cpu" or (sys.platform == "linux" and not any(map(os.path.exists, drivers))):
        return False
    return machine().gpu_bytes > 0


def cores() -> int:
    """Cores that this process may use, without the second threads of a core."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def stages_in_memory(settings: Settings) -> int:
    """How many of the largest stage fit into the memory that is free."""
    import psutil

    rows = costs.rows(settings, {}, {}, {})
    largest = max(max(row.host or 0, (row.gpu or 0) + (row.activations or 0)) for row in rows)
    return int(MEMORY_SHARE * psutil.virtual_memory().available // (largest + STAGE_MEMORY))


def processes_for(stage: str, seconds: Mapping[str, float], jobs: int) -> dict[str, str]:
    """What lets a stage that runs alone use all cores; nothing for a training, whose bits depend on it."""
    own = os.environ.keys() & {"ATTUNE_PROCESSES", "ATTUNE_LAUNCH"}
    is_short = seconds.get(stage, WORTH_SPLITTING) < WORTH_SPLITTING
    if own or is_short or stage.partition("@")[0] not in SPLIT:
        return {}
    return {"ATTUNE_PROCESSES": str(jobs)}


@contextmanager
def lock_in_order(pool: Workers, graph: Graph) -> Iterator[None]:
    """Puts the entries that dvc.lock gets in the with-body into the order in which `dvc repro` would have added them.

    What was there before stays where it is; of a run that did not end, which left a note, what was there before that.
    """
    if not LOCK_ORDER.exists():
        write_atomically(LOCK_ORDER, json.dumps(locked_stages()).encode())
    before = set(json.loads(LOCK_ORDER.read_text())) & set(locked_stages())
    yield
    pool.start(1)
    pool.ask("sort", names=[stage for stage in graph.order if stage not in before])
    if set(graph.order) <= set(locked_stages()):
        LOCK_ORDER.unlink()


def locked_stages() -> list[str]:
    """The stages that dvc.lock has."""
    file = Path("dvc.lock")
    return list(read_yaml(file).get("stages", ())) if file.exists() else []


def note_other_seconds(progress: Progress) -> None:
    """Adds the times of stages that note none themselves, as `plan`."""
    noted = noted_seconds()
    ran = {stage: round(progress.ended[stage].seconds, 1) for stage in progress.that(RAN)}
    if ran.keys() - noted:
        write_atomically(project_root() / TIMES, json.dumps({**ran, **noted}).encode())


def outcome(progress: Progress, code: int, is_stopped: bool, seconds: float) -> Iterator[str]:
    """What the user is told at the end: of a failure all that the stage wrote, and what did not run."""
    failed, stopped, todo = progress.that(FAILED), progress.that(STOPPED), progress.not_run
    for name in failed or ([ALL] if code and not (is_stopped or progress.ended) else []):
        log = LOGS / f"{ALL if progress.jobs == 1 else name}.log"
        yield f"\n{name} failed; the end of {log}:"
        yield from (f"  {line}" for line in last_lines(log, LAST_LINES))
    if code or is_stopped:
        yield ""
        yield from [f"failed: {', '.join(failed)}"] if failed else []
        yield from [f"stopped: {', '.join(stopped)}"] if stopped else []
        yield from [f"not run: {', '.join(todo)}"] if todo else []
        yield "`make repro` goes on from there"
        return
    ran = len(progress.that(RAN))
    yield f"{ran} of {len(progress.ended)} stages ran, in {duration(seconds)}; their output is in {LOGS}"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 is wanted, not {text!r}")
    return int(text)


def table(text: str) -> str:
    """The report's first sentence, then a line for each run: mean, difference to the base, and whether it is hacked.

    Args:
        text: of summary.json.
    """
    from attune.evaluation.report.metrics import hacking_word
    from attune.evaluation.report.sentence import first_sentence
    from attune.evaluation.summary import Summary

    summary = Summary.from_json(text)
    headline = summary.headline
    lines = ["", *textwrap.wrap(printable(first_sentence(summary)), WIDTH), ""]
    lines += [f"{'run':{LARGEST_NAME}}  {headline:>10}  to {summary.base}, 95 % interval"]
    for name, method in summary.methods.items():
        entry = method.vs_base.get(headline)
        compared = ""
        if entry is not None:
            low, high = entry.difference_ci95
            word = hacking_word(method)
            hacking = f"; hacking: {word}" if word else ""
            compared = f"{entry.difference:+.4g} [{low:+.4g}, {high:+.4g}]  {entry.evidence}{hacking}"
        lines.append(f"{name:{LARGEST_NAME}.{LARGEST_NAME}}  {method.scores[headline].mean:10.4g}  {compared}".rstrip())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
