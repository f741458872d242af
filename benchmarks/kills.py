"""Stages stopped again and again at random moments: is what they leave the same, and how much work is lost?

Every training of the profile `short`, prepare, generate and evaluate, in a copy of the repository. A stage is run to
its end once; then it is started and killed (`kill -9`, or with --signal TERM told to stop) as often as asked, and run
to its end again. Its outputs are removed before every start, as DVC does. Prints a table and writes it as JSON.

    PYTHONPATH=src python benchmarks/kills.py --kills 20 --jobs 2 --out /tmp/kills.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from copies import copy_repository, rewrite

from attune.files import digest

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["attune.finetune", "attune.evaluation.scoring", "attune.spm.objective", "diffusers"])
RUNS = {
    "base": {"after": "data"},
    "sft": {"method": "sft", "after": "data"},
    "dpo": {"method": "dpo", "after": "data"},
    "kto": {"method": "kto", "after": "data"},
    "mapo": {"method": "mapo", "after": "data"},
    "spin_1": {"method": "spin", "after": "data"},
    "spin_2": {"method": "spin", "after": "spin_1"},
    "alignprop": {"method": "alignprop", "after": "data"},
    "spo": {"method": "spo", "after": "preference"},
}
LONGER = {"preference": 6, "sft": 20, "dpo": 20, "kto": 20, "mapo": 20, "spin_1": 6, "spin_2": 6}
LONGER |= {"alignprop": 5, "spo": 5}
VALIDATION = {"scorer": "aesthetic", "prompts": 4, "every": 5, "patience": 4}
VALIDATION |= {"sampling": {"steps": 4, "eta": 0, "guidance_scale": 2, "batch_size": 4}}


@dataclass
class Stage:
    """A stage, what it writes, and what became of it."""

    name: str
    outputs: tuple[str, ...]
    seconds: float = 0.0  # of an undisturbed run
    kills: int = 0
    resumed: int = 0  # starts that found a checkpoint
    lost: list[float] = field(default_factory=list)  # seconds of work, per kill
    codes: list[int] = field(default_factory=list)
    stopping: list[float] = field(default_factory=list)  # seconds from a signal to the end
    identical: bool = False


def stages() -> list[Stage]:
    """In the order in which they need each other."""
    prepare = Stage("prepare", ("data/short/prepared", "data/short/quarantine.csv", "models/short/data"))
    preference = Stage("train_preference", ("models/short/preference", "reports/short/train/preference.json"))
    trained = [
        Stage(f"align@{run}", (f"models/short/{run}", *(f"reports/short/train/{run}.{end}" for end in ("csv", "json"))))
        for run in RUNS
    ]
    generate = Stage("generate@dpo", ("data/short/generated/dpo",))
    evaluate = Stage("evaluate@dpo", ("reports/short/scores/dpo.parquet", "reports/short/features/dpo.npy"))
    return [prepare, preference, *trained, generate, evaluate]


def set_up(home: Path) -> None:
    copy_repository(home, {}, {"profile": "short", "runs": RUNS, "tracking": None})
    changes = {f"methods.{run}.batches": n for run, n in LONGER.items() if run != "preference"}
    changes |= {"preference.batches": LONGER["preference"], "methods.dpo.accumulation": 2}
    changes |= {"methods.sft.validation": VALIDATION, "methods.kto.warmup": 3, "methods.kto.schedule": "linear"}
    rewrite(home / "params/short.yaml", changes)
    run(home, "plan")


def start(home: Path, name: str) -> multiprocessing.Process:
    """A stage in a process of its own, forked from one that has imported the libraries already, which takes seconds."""
    process = FORKS.Process(target=work, args=(home, name))
    process.start()
    return process


def work(home: Path, name: str) -> None:
    """The stage; what it says goes to a file."""
    os.chdir(home)
    log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stage, _, run = name.partition("@")
    sys.argv = [stage, *(["--run", run] if run else [])]
    importlib.import_module(f"attune.stages.{stage}").main()


def run(home: Path, name: str) -> float:
    """Runs a stage to its end; returns the seconds it took."""
    began = time.monotonic()
    process = start(home, name)
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{name} ended with {process.exitcode}: see {home / 'log'}")
    return time.monotonic() - began


def clear(home: Path, stage: Stage) -> None:
    for output in stage.outputs:
        path = home / output
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def digests(home: Path, stage: Stage) -> dict[str, str]:
    return {output: digest(home / output) for output in stage.outputs}


def saved(home: Path, stage: Stage) -> Path | None:
    """The state of the stage's training, if one was saved."""
    training = stage.name.replace("align@", "align-short-").replace("train_preference", "train_preference-short")
    return next((home / ".checkpoints").glob(f"{training}-*/state.pt"), None)


def disturb(home: Path, stage: Stage, kills: int, number: signal.Signals, rng: random.Random) -> None:
    """Kills a stage so many times, lets it end, compares, and prints a line."""
    clear(home, stage)
    stage.seconds = run(home, stage.name)
    expected = digests(home, stage)
    clear(home, stage)
    while stage.kills < kills:
        stage.resumed += saved(home, stage) is not None
        process, began = start(home, stage.name), time.time()
        process.join(rng.uniform(0.1, 1.0) * stage.seconds)
        if process.is_alive():
            os.kill(process.pid, number)  # stages start no processes of their own
            told = time.time()
            process.join()
            stage.codes.append(process.exitcode)
            stage.kills += 1
            stage.stopping.append(time.time() - told)
            state = saved(home, stage)
            stage.lost.append(told - max(began, min(told, state.stat().st_mtime) if state else began))
        clear(home, stage)
    run(home, stage.name)
    stage.identical = digests(home, stage) == expected and saved(home, stage) is None
    lost, stopping = sorted(stage.lost), sorted(stage.stopping)
    print(
        f"{stage.name:18} {stage.seconds:5.1f} s  kills {stage.kills:3}  resumed {stage.resumed:3}  "
        f"lost s: median {lost[len(lost) // 2]:4.1f}, most {lost[-1]:4.1f}  stops in {stopping[-1]:4.1f} s  "
        f"codes {sorted(set(stage.codes))}  {'identical' if stage.identical else 'DIFFERENT'}",
        flush=True,
    )


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "ATTUNE_TRACKING": "off", "TQDM_DISABLE": "1"}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--seconds", type=float, default=0, help="checkpoint_seconds; 0 saves after every batch")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    number = signal.Signals[f"SIG{given.signal}"]
    home = Path(tempfile.mkdtemp(prefix="kills-")) / "copy"
    set_up(home)
    rewrite(home / "params/short.yaml", {"checkpoint_seconds": given.seconds})
    run(home, "plan")
    everything = stages()
    for stage in everything:
        run(home, stage.name)
    chosen = [stage for stage in everything if stage.name != "align@base"]
    first, others = chosen[0], chosen[1:]
    disturb(home, first, given.kills, number, random.Random(first.name))  # the others read what it writes
    apart = [stage for stage in others if stage.name not in ("train_preference", "align@spin_1", "generate@dpo")]
    reads = [stage for stage in others if stage not in apart]
    for stage in reads:
        disturb(home, stage, given.kills, number, random.Random(stage.name))
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda stage: disturb(home, stage, given.kills, number, random.Random(stage.name)), apart))
    if given.out:
        given.out.write_text(json.dumps([asdict(stage) for stage in chosen], indent=1) + "\n")
    if not all(stage.identical for stage in chosen):
        sys.exit(f"not identical; kept for a look: {home}")
    shutil.rmtree(home.parent)


if __name__ == "__main__":
    main()
