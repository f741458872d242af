"""Runs the whole pipeline for several seeds and compares them: `make seeds N=3` (docs/seeds.md).

The first seed is the profile's own and is run in the checkout, each other one in a copy below .checkpoints/seeds. What
is there and still current is not run again. Ctrl-C stops all; the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from attune.config.resolve import Settings, load
from attune.config.schema import ConfigError
from attune.copies import copy_checkout, dvc_cache, environment, start_repro
from attune.costs import noted_seconds
from attune.files import write_atomically
from attune.paths import CHECKPOINTS, Paths, project_root
from attune.planning import costs
from attune.planning.local_files import Digests
from attune.planning.make import make, needs_preference_model
from attune.planning.seeds import settings_sha, work_sha
from attune.process_groups import Groups
from attune.stages.plan import say

LAST_LINES = 3  # of a log, shown where a seed failed


@dataclass(frozen=True)
class Seed:
    """A seed of the profile: where it is run, and what identifies its run."""

    number: int
    home: Path
    log: Path
    settings: str
    work: str


def repro(seed: Seed, tracked: bool, groups: Groups) -> int | None:
    """The exit code of the seed's `dvc repro`; None if it was not begun because all are to stop."""
    if groups.stopped:
        return None
    return groups.wait(start_repro(seed.home, seed.log, environment(tracked)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=_count, default=3, help="how many seeds, the profile's own and those after it")
    parser.add_argument("--jobs", type=_count, default=1, help="seeds at a time, on one machine; default: 1")
    given = parser.parse_args()
    try:
        settings = load()
    except ConfigError as error:
        sys.exit(str(error))
    lock = FileLock(project_root() / Paths(settings.profile).seed_copy(settings.seed).with_name("running.lock"))
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        with lock.acquire(timeout=0):
            compare(settings, given.n, given.jobs)
    except Timeout:
        sys.exit(f"another `make seeds` of profile {settings.profile} is running here: wait for it, or stop it first")


def compare(settings: Settings, n: int, jobs: int) -> None:
    """Runs the seeds that are not current, makes the report again, and prints what all of them say together."""
    paths, seeds = Paths(settings.profile), planned(settings, n)
    todo = [seed for seed in seeds if not is_current(seed, paths)]
    for seed in seeds:
        if seed not in todo:
            say(f"seed {seed.number}: {paths.seed(seed.number)} is current")
    if todo:
        say(needed(settings, len(todo), min(jobs, len(todo))))
        run(todo, seeds, settings, jobs)
        again = subprocess.call([sys.executable, "-m", "dvc", "repro"], env=environment())
        if again:
            sys.exit(f"the seeds are done, but the report was not made again (`dvc repro` ended with {again})")
    say(table([seed.number for seed in seeds], paths))


def planned(settings: Settings, n: int) -> list[Seed]:
    """The profile's seed and those after it."""
    root, paths, found = project_root(), Paths(settings.profile), []
    digests = Digests(root / CHECKPOINTS / "digests.json")
    for number in range(settings.seed, settings.seed + n):
        plans, copy = make(replace(settings, seed=number), digests), root / paths.seed_copy(number)
        home = root if number == settings.seed else copy
        found.append(Seed(number, home, copy.with_suffix(".log"), settings_sha(plans), work_sha(plans)))
    digests.save()
    return found


def is_current(seed: Seed, paths: Paths) -> bool:
    """Whether the seed's summary is there and is of the settings, the local files and the code as they are."""
    from attune.evaluation.seeds import SeedRun

    try:
        return SeedRun.read(paths.seed(seed.number)).work == seed.work
    except ValueError:  # there is none, or an older version wrote it
        return False


def needed(settings: Settings, n: int, jobs: int) -> str:
    """What n seeds will take, of time as far as it is known from the last run, and of disk."""
    stages = ["prepare", *(["train_preference"] if needs_preference_model(settings) else []), "report"]
    stages += [f"{stage}@{run}" for stage in ("align", "generate", "evaluate") for run in settings.runs]
    seconds = noted_seconds()
    time_needed = "time not known before a first run"
    if all(stage in seconds for stage in stages):
        hours = sum(seconds[stage] for stage in stages) * math.ceil(n / jobs) / 3600
        time_needed = f"about {hours:.1f} hours" if hours >= 1 else f"about {max(1, round(60 * hours))} minutes"
    paths = Paths(settings.profile)
    made = sum(f.stat().st_size for folder in (paths.data, Path("models", paths.profile)) for f in _files(folder))
    estimated = sum(row.disk or 0 for row in costs.rows(settings, {}, {}, {}))
    free = shutil.disk_usage(project_root()).free
    disk = f"{costs.size(n * (made or estimated))} of disk ({costs.size(free)} free)"
    return f"{n} to run, {jobs} at a time: {time_needed}, {disk}"


def run(todo: Sequence[Seed], seeds: Sequence[Seed], settings: Settings, jobs: int) -> None:
    """Runs seeds, so many at a time, and keeps their summaries; exits where one failed or all were stopped."""
    groups, cache = Groups(), dvc_cache(project_root())

    def one(seed: Seed) -> bool:
        own, began = seed.number == settings.seed, time.monotonic()
        if not own:
            copy_checkout(project_root(), seed.home, {"seed": seed.number}, cache=cache)
        code = repro(seed, tracked=own, groups=groups)
        if code == 0:
            place = f"{seeds.index(seed) + 1} of {len(seeds)}"
            say(f"seed {seed.number} ({place}): {keep(seed, settings, time.monotonic() - began)}")
        elif not groups.stopped:
            written = seed.log.read_text(errors="replace").replace("\r", "\n")  # a progress bar writes over itself
            said = [line.strip() for line in written.splitlines() if line.strip()][-LAST_LINES:]
            say("\n".join([f"seed {seed.number} failed, {seed.log}:", *(f"  {line}" for line in said)]))
        return code == 0

    with groups.stoppable(), ThreadPoolExecutor(jobs) as pool:
        done = sum(pool.map(one, todo))
    if groups.stopped:
        say(f"stopped; {done} of {len(todo)} done. `make seeds N={len(seeds)}` goes on where trainings have saved")
        sys.exit(128 + groups.stopped)
    if done < len(todo):
        sys.exit(f"{len(todo) - done} of {len(todo)} seeds failed; `make seeds N={len(seeds)}` goes on from there")


def keep(seed: Seed, settings: Settings, seconds: float) -> str:
    """Writes the seed's summary into the checkout's reports, and returns a line about it."""
    from attune.evaluation.seeds import SeedRun
    from attune.evaluation.summary import Summary

    paths = Paths(settings.profile)
    summary = Summary.from_json((seed.home / paths.reports / "summary.json").read_text(encoding="utf-8"))
    made = SeedRun(seed.number, seed.settings, seed.work, round(seconds, 1), summary)
    write_atomically(project_root() / paths.seed(seed.number), made.to_json().encode())
    gains = [f"{name} {m.vs_base[summary.headline].difference:+.4g}" for name, m in summary.tuned.items()]
    mean = summary.methods[summary.base].scores[summary.headline].mean
    return f"{seconds:.0f} s; {summary.headline}: {', '.join([f'{summary.base} {mean:.4g}', *gains])}"


def table(seeds: Sequence[int], paths: Paths) -> str:
    """Every run's gain over the base by the headline scorer, over seeds."""
    from attune.evaluation.seeds import SeedRun, across_seeds

    summaries = {seed: SeedRun.read(paths.seed(seed)).summary for seed in seeds}
    found, headline = across_seeds(summaries), next(iter(summaries.values())).headline
    columns = f"{'gain':>10}  {'95 % over seeds':>22}  {'sd seeds':>9}  {'sd prompts':>10}  better in"
    lines = [f"\n{len(seeds)} seeds: {', '.join(map(str, seeds))}; {headline}", f"{'run':20}  {columns}"]
    for run_name, scorers in found.runs.items():
        spread = scorers[headline]
        low, high = spread.ci95
        interval = f"[{low:+.4g}, {high:+.4g}]"
        lines.append(
            f"{run_name:20.20}  {spread.mean:+10.4g}  {interval:>22}  {spread.sd_seeds:9.2g}  {spread.sd_prompts:10.2g}"
            f"  {spread.seeds_better} of {len(seeds)}"
        )
    return "\n".join(lines)


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 is wanted, not {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
