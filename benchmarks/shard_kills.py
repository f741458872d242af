"""prepare, generate and evaluate killed again and again, on one process and on two: is what they leave the same?

In a copy of the repository (profile `short`, with more images). A stage is run to its end once; then it is started and
killed (`kill -9`, all its processes or one of them, in turns) at random moments as often as asked, its outputs removed
before every start as DVC does; then it is run to its end. No shard that is there may be written again, so what a kill
costs is the shards in work: one per process. Prints a line per stage and writes them as JSON.

    PYTHONPATH=src python benchmarks/shard_kills.py --kills 20 --out /tmp/shard_kills.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from copies import copy_repository, rewrite

from attune.files import digest

RUNS = {"base": {"after": "data"}}
CHANGES = {
    "data.pair_prompts": 64,
    "data.validation_prompts": 8,
    "data.test_prompts": 256,
    "data.images_per_prompt": 4,
    "data.train_prompts": 80,
    "sampling.batch_size": 16,
    "generate.prompts": 256,
    "generate.sampling.batch_size": 4,
    "methods": {},
    "search": {},
}
OUTPUTS = {
    "prepare": ("data/short/prepared", "data/short/quarantine.csv", "models/short/data"),
    "generate": ("data/short/generated/base",),
    "evaluate": ("reports/short/scores/base.parquet", "reports/short/features/base.npy"),
}
FROM = 0.4  # of an undisturbed run, before which a stage starts up
KEPT = {"prepare": "prepare-short", "generate": "generate-short-base", "evaluate": "scores/short/base"}


@dataclass
class Result:
    """What became of a stage."""

    stage: str
    processes: int
    seconds: float  # of an undisturbed run
    shards: int = 0
    kills: int = 0
    in_work: int = 0  # kills after which there were more shards than before
    written_again: int = 0
    after_the_end: int = 0  # kills when all was done and the shards were being removed, or had been
    last_seconds: float = 0.0  # of the run that ended
    identical: bool = False
    shards_at_kill: list[int] = field(default_factory=list)


def start(home: Path, stage: str, processes: int) -> subprocess.Popen[bytes]:
    words = ["--run", "base"] if stage in ("align", "generate", "evaluate") else []
    env = os.environ | {"PYTHONPATH": "src", "ATTUNE_PROCESSES": str(processes), "ATTUNE_TRACKING": "off"}
    with (home / "log").open("ab") as log:
        command = [sys.executable, "-m", f"attune.stages.{stage}", *words]
        return subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=log, start_new_session=True)


def run(home: Path, stage: str, processes: int) -> float:
    began, process = time.monotonic(), start(home, stage, processes)
    if process.wait():
        raise RuntimeError(f"{stage} ended with {process.returncode}: see {home / 'log'}")
    return time.monotonic() - began


def clear(home: Path, stage: str) -> None:
    for path in (home / output for output in OUTPUTS[stage]):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def digests(home: Path, stage: str) -> dict[str, str]:
    return {output: digest(home / output) for output in OUTPUTS[stage]}


def shards(home: Path, stage: str) -> dict[str, int]:
    """The shards that are there, and when each was written."""
    folder = home / ".checkpoints" / KEPT[stage]
    found = {}
    for path in folder.rglob("*.safetensors"):
        if not path.name.startswith("."):
            found[str(path.relative_to(folder))] = path.stat().st_mtime_ns
    return found


def kill(process: subprocess.Popen[bytes], whole: bool, rng: random.Random) -> None:
    """Kills all processes of a stage, or one of those that work, upon which the launcher ends the others."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    workers = [int(line) for line in children.stdout.split()]  # of the launcher; each has a session of its own
    for pid in [process.pid, *workers] if whole or not workers else [rng.choice(workers)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.05)


def disturb(home: Path, stage: str, processes: int, kills: int, expected: dict[str, str]) -> Result:
    rng = random.Random(f"{stage}{processes}")
    shutil.rmtree(home / ".checkpoints" / KEPT[stage], ignore_errors=True)
    clear(home, stage)
    result = Result(stage, processes, run(home, stage, processes))
    same = digests(home, stage) == expected
    shutil.rmtree(home / ".checkpoints" / KEPT[stage], ignore_errors=True)
    clear(home, stage)
    known: dict[str, int] = {}
    while result.kills < kills:
        process = start(home, stage, processes)
        try:
            if process.wait(rng.uniform(FROM, 1.0) * result.seconds):
                raise RuntimeError(f"{stage} ended with {process.returncode}: see {home / 'log'}")
            shutil.rmtree(home / ".checkpoints" / KEPT[stage], ignore_errors=True)  # it ended: from the beginning
            known = {}
        except subprocess.TimeoutExpired:
            kill(process, result.kills % 2 == 0, rng)
            result.kills += 1
            found = shards(home, stage)
            result.written_again += sum(found.get(name, when) != when for name, when in known.items())
            result.after_the_end += any(name not in found for name in known)
            result.in_work += len(found) > len(known)
            result.shards_at_kill.append(len(found))
            known = found
        if not (home / ".checkpoints" / KEPT[stage]).exists():
            known = {}
        clear(home, stage)
    result.last_seconds = run(home, stage, processes)
    result.shards = max(len(shards(home, stage)), *result.shards_at_kill)
    result.identical = same and digests(home, stage) == expected
    print(
        f"{stage:9} {processes} processes  {result.seconds:5.1f} s  kills {result.kills}, {result.in_work} amid work  "
        f"shards at kills {result.shards_at_kill}  written again {result.written_again}  "
        f"after the end {result.after_the_end}  "
        f"{'identical' if result.identical else 'DIFFERENT'}",
        flush=True,
    )
    return result


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", nargs="+", default=list(OUTPUTS), choices=list(OUTPUTS), help="to disturb")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="shard-kills-")) / "copy"
    copy_repository(home, {}, {"profile": "short", "runs": RUNS, "tracking": None})
    rewrite(home / "params/short.yaml", CHANGES)
    run(home, "plan", 1)
    results = []
    for stage in OUTPUTS:
        run(home, stage, 1)
        expected = digests(home, stage)
        if stage in given.stages:
            results += [disturb(home, stage, n, given.kills, expected) for n in given.processes]
        if stage == "prepare":
            run(home, "align", 1)
    if given.out:
        given.out.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    if not all(result.identical and not result.written_again for result in results):
        sys.exit(f"not identical; kept for a look: {home}")
    shutil.rmtree(home.parent)


if __name__ == "__main__":
    main()
