"""Stage sweep@<run>: searches the settings of a run (its block in `search`), or writes the best into the profile."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from attune.config.edit import update_params_file
from attune.config.plan import SearchPlan, Session, read
from attune.config.resolve import load, read_yaml
from attune.config.schema import ConfigError, check
from attune.config.search import Config
from attune.paths import Paths
from attune.stages.common import planned
from attune.stop import stoppable

if TYPE_CHECKING:
    from attune.search.plan import SweepPlan

LOG = logging.getLogger("attune.sweep")
ASKED = Path("sweeps/asked.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", help="a run with a block in the profile's search; DVC's stage says it otherwise")
    parser.add_argument("--apply", action="store_true", help="write the best settings found into the profile")
    parser.add_argument("--dvc", action="store_true", help="have DVC run it: a stage of sweeps/dvc.yaml, noted in git")
    given = parser.parse_args()
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    LOG.setLevel(logging.INFO)
    if given.dvc and not given.apply:
        ask(given.run)
        stage = f"{ASKED.with_name('dvc.yaml')}:sweep@{given.run}"
        sys.exit(subprocess.call([sys.executable, "-m", "dvc", "repro", stage]))
    plan = planned(SearchPlan, "sweep")
    profile = Path("params", f"{plan.profile}.yaml")
    if plan.search is None:
        sys.exit(f"{profile}:search.{plan.run.run}: is missing, so there is nothing to search")
    if given.apply:
        apply_best(plan, profile)
        return
    from attune.search.study import SearchError
    from attune.search.sweep import count_states, sweep

    work = sweep_plan(plan)
    try:
        with stoppable(f"sweep {work.run}"):
            LOG.info("%s: %s", work.report, count_states(sweep(work)))
    except SearchError as error:
        sys.exit(f"sweep {work.run}: {error}")


def ask(name: str | None) -> None:
    """Adds the run to sweeps/asked.yaml, whose runs are the stages of sweeps/dvc.yaml."""
    try:
        runs = load().runs
        if name is None or name not in runs:
            raise ConfigError(f"runs: has no {name!r}, so there is nothing to search; there are {', '.join(runs)}")
        asked = read_yaml(ASKED).get("asked")
        if not isinstance(asked, dict):
            raise ConfigError(f"{ASKED}: asked: a block of runs is wanted, or {{}} for none")
        if name not in asked:
            update_params_file({f"asked.{name}": {"after": runs[name].after}}, ASKED)
    except ConfigError as error:
        sys.exit(str(error))


def apply_best(plan: SearchPlan, profile: Path) -> None:
    """Writes the best settings into params/<profile>.yaml; every other line of it stays."""
    from attune.search.results import apply

    run = plan.run.run
    try:
        found = apply(Paths(plan.profile).search(run), plan.profile, run, partial(update_params_file, path=profile))
    except ConfigError as error:
        sys.exit(str(error))
    LOG.info("%s: methods.%s: %s", profile, run, found)


def sweep_plan(plan: SearchPlan, report: Path | None = None) -> SweepPlan:
    """What a search works from.

    Args:
        report: folder of the results; None is reports/<profile>/sweeps/<run>.
    """
    from attune.search.plan import SweepPlan

    session, paths = read(Session, "session"), Paths(plan.profile)
    return SweepPlan(
        training=plan.run,
        threads=session.threads,
        search=check(Config, plan.search, "search"),
        sampling=plan.sampling,
        objectives=plan.objectives,
        report=report or paths.search(plan.run.run),
        tracking=session.tracking,
        inputs={**plan.run.files, **plan.files},
    )


if __name__ == "__main__":
    with stoppable("sweep"):
        main()
