"""Runs DVC's stages, several at a time, each as soon as what it needs is done; or `dvc repro` as it is, watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from attune.pipeline.graph import first_of, longest_paths
from attune.pipeline.logs import Bar, Log
from attune.pipeline.progress import FAILED, RAN, STOPPED, UNCHANGED, Progress, duration
from attune.pipeline.screen import Screen
from attune.pipeline.workers import LOST, Worker, Workers

POLL = 0.2  # s
NOISE = (
    "To track the changes with git",
    "git add ",
    "To enable auto staging",
    "dvc config core.autostage",
    "Use `dvc ",
    "Waiting to acquire lock",
)
DIED = 1  # exit code, where the worker has not lived to tell DVC's
REDEFINED = "dvc.yaml or params.yaml has changed while this ran: no other stage is begun, as it would be a mixture"
ALL = "repro"  # the task that is all stages


@dataclass
class Task:
    """What a worker is doing: a stage, or ALL of them, and their log."""

    name: str
    log: Log


@dataclass
class Run:
    """A pipeline that is being run, and what is written about it."""

    progress: Progress
    workers: Workers
    screen: Screen
    logs: Path  # folder
    is_stopped: Callable[[], bool]  # whether the user has asked to stop
    is_redefined: Callable[[], bool]  # whether the stages are no longer those of the graph
    tasks: dict[Worker, Task] = field(default_factory=dict)
    code: int = 0  # of the first command of DVC that failed

    def give(self, name: str, words: list[str], env: Mapping[str, str]) -> None:
        """Lets an idle worker run a command of DVC."""
        log = self.logs / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)  # a `.dvc` file in a folder is a stage, too
        log.unlink(missing_ok=True)
        log.touch()
        worker = self.workers.give("dvc", words=words, log=str(log.resolve()), env=dict(env))
        self.tasks[worker] = Task(name, Log(log))

    def wait(self, hear: Callable[[Task, str], str]) -> list[tuple[Task, int]]:
        """Shows what has been written meanwhile, and gives the tasks that have ended, with DVC's exit codes.

        Args:
            hear: takes a line of a task in, and says which stage it is of.
        """
        ended: list[tuple[Task, int]] = []
        bars: dict[str, Bar | None] = {}
        for worker, answer in self.workers.answers(POLL):
            task = self.tasks.pop(worker)
            if answer is LOST:
                self.screen.say(
                    f"{task.name} | the process that ran DVC for it is gone (exit code {worker.returncode})"
                )
            ended.append((task, answer.get("code", DIED)))
        for task in (*self.tasks.values(), *(task for task, _ in ended)):
            for line in task.log.new_lines():
                stage = hear(task, line)
                if not line.strip().startswith(NOISE):
                    self.screen.say(f"{stage} | {line}")
            bars |= dict.fromkeys(self.progress.began if task.name == ALL else [task.name], task.log.bar)
        self.screen.show(self.progress, bars)
        return ended

    @property
    def place(self) -> str:
        """How many stages have ended, of how many."""
        return f"{len(self.progress.ended)} of {len(self.progress.graph.order)}"

    def end(self, stage: str, code: int = 0) -> None:
        """Notes and says how a stage has ended."""
        how = STOPPED if code and self.is_stopped() else FAILED if code else self.progress.how.get(stage, RAN)
        ended = self.progress.end(stage, how)
        took = "" if how == UNCHANGED else f", {duration(ended.seconds)}"
        left = "" if code or self.code else self.progress.left()
        self.screen.say(f"[{self.place}] {stage}: {how}{took}" + (f"; {left}" if left else ""))


def side_by_side(run: Run, env: Mapping[str, str], alone: Callable[[str], Mapping[str, str]]) -> None:
    """Runs every stage, those with the longest paths first. After a failure none is begun, and those that run end.

    Args:
        env: what is put into the environment of every stage.
        alone: what is added for a stage that has nothing beside it.
    """

    def hear(task: Task, line: str) -> str:
        run.progress.hear(line)
        return task.name

    while True:
        if not run.code and run.progress.not_run and run.is_redefined():
            run.screen.say(REDEFINED)
            run.code = DIED
        if not (run.code or run.is_stopped()):
            run.workers.start(run.progress.jobs)  # again, if one has died
        if not run.tasks and run.progress.ended:
            _skip_unchanged(run)
        while stage := _next(run):
            others = len(run.progress.began) + len(_ready(run.progress)) - 1
            run.progress.start(stage)
            more = {} if others else alone(stage)
            run.give(stage, ["--wait-for-lock", "repro", "--single-item", stage], {**env, **more})
        if not run.tasks:
            break
        for task, code in run.wait(hear):
            run.end(task.name, code)
            run.code = run.code or code
    if run.progress.not_run and not (run.code or run.is_stopped()):
        run.screen.say(f"the processes that run DVC are gone; {run.logs / 'workers.log'} may say why")
        run.code = DIED


def _skip_unchanged(run: Run) -> None:
    """Ends the stages that DVC would skip: asked once for all, it need not be asked for each."""
    if run.code or run.is_stopped() or len(run.progress.not_run) < 2:
        return
    unchanged = run.workers.ask("unchanged", done=sorted(run.progress.done)).get("stages", ())
    for stage in unchanged:
        run.progress.start(stage)
        run.progress.end(stage, UNCHANGED)
    if unchanged:
        run.screen.say(f"[{run.place}] unchanged: {', '.join(unchanged)}")


def one_by_one(run: Run) -> None:
    """Runs `dvc repro` as it is, and goes by what it says."""

    def hear(task: Task, line: str) -> str:
        stage = run.progress.hear(line)
        current = next(iter(run.progress.began), None)
        if stage is None or stage == current:
            return current or task.name
        if current is not None:
            run.end(current)
        run.progress.start(stage)
        if run.progress.how[stage] == UNCHANGED:
            run.end(stage)
        return stage

    run.give(ALL, ["repro"], {})
    while run.tasks:
        for _, code in run.wait(hear):
            run.code = code
    for stage in list(run.progress.began):
        run.end(stage, run.code)


def _ready(progress: Progress) -> list[str]:
    return progress.graph.ready(progress.done, {*progress.ended, *progress.began})


def _next(run: Run) -> str | None:
    """The stage to begin now, if there is one and a worker for it."""
    if run.code or run.is_stopped() or not run.workers.has_idle():
        return None
    return first_of(_ready(run.progress), longest_paths(run.progress.graph, run.progress.seconds()))
