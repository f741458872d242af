"""Stage sweep@<run>: searches the settings of a run (its block in `search`), or writes the best into params.yaml."""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from attune.config import plugins
from attune.config.check import load, method_of, update_params_file
from attune.config.plugins import plugin_config
from attune.config.profile import Params, Profile
from attune.config.schema import ConfigError, check
from attune.config.search import Config
from attune.files import digest
from attune.paths import PREFERENCE, PREPARED, REPORTS

if TYPE_CHECKING:
    from attune.search.plan import SweepPlan

LOG = logging.getLogger("attune.sweep")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="a block of the profile's search")
    parser.add_argument("--apply", action="store_true", help="write the best settings found into params.yaml")
    given = parser.parse_args()
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    LOG.setLevel(logging.INFO)
    try:
        params, profile = load()
        if given.run not in profile.search:
            known = ", ".join(profile.search) or "none"
            raise ConfigError(f"profiles.{params.profile}.search has no block {given.run!r}; there are: {known}")
        folder = REPORTS / "sweeps" / given.run
        if given.apply:
            from attune.search.results import apply

            LOG.info(
                "params.yaml: profiles.%s.methods.%s: %s",
                params.profile,
                given.run,
                apply(
                    folder,
                    params.profile,
                    given.run,
                    lambda values: update_params_file({f"profiles.{params.profile}.{k}": v for k, v in values.items()}),
                ),
            )
            return
    except ConfigError as error:
        sys.exit(f"params.yaml: {error}")
    from attune.search.study import SearchError
    from attune.search.sweep import count_states, sweep

    try:
        LOG.info("%s: %s", folder, count_states(sweep(sweep_plan(given.run, params, profile))))
    except SearchError as error:
        sys.exit(f"sweep {given.run}: {error}")


def sweep_plan(run: str, params: Params, profile: Profile, report: Path | None = None) -> SweepPlan:
    """What a search of a run's settings needs.

    Args:
        report: folder of the results; None is reports/sweeps/<run>.
    """
    from attune.search.plan import SweepPlan

    method, search = method_of(run, params), check(Config, profile.search[run], f"search.{run}")
    config = plugin_config("methods", method, profile.methods[run], f"methods.{run}")
    validation = [config.validation.scorer] if config.validation else []
    asked = dict.fromkeys([*search.objectives, *getattr(config, "rewards", ()), *validation])
    scorers = {name: (name, plugin_config("rewards", name, profile.scorers[name], name)) for name in asked}
    weights = [place for _, scorer in scorers.values() for place, _ in scorer.locations().values()]
    local = [Path(place) for place in (profile.model.path, profile.model.vae, *weights) if place]
    needs_preference = "judge" in inspect.signature(plugins.load("methods", method).Method).parameters
    return SweepPlan(
        profile=params.profile,
        run=run,
        method=method,
        seed=profile.seed,
        threads=profile.threads,
        model=profile.model,
        config=config,
        search=search,
        sampling=profile.generate.sampling,
        scorers=scorers,
        prepared=PREPARED,
        preference=PREFERENCE if needs_preference else None,
        start=Path(config.start) if config.start and Path(config.start).exists() else None,
        report=report or REPORTS / "sweeps" / run,
        tracking=params.tracking,
        inputs={str(path): digest(path) for path in local if path.exists()},
    )


if __name__ == "__main__":
    main()
