"""Stage sweep@<run>: searches the settings of a run (its block in `search`), or writes the best into params.yaml."""

from __future__ import annotations

import argparse
import logging
import sys

from attune.config.check import load
from attune.config.schema import ConfigError
from attune.paths import REPORTS

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
                apply(folder, params.profile, given.run),
            )
            return
    except ConfigError as error:
        sys.exit(f"params.yaml: {error}")
    from attune.search.study import SearchError
    from attune.search.sweep import counts, sweep

    try:
        LOG.info("%s: %s", folder, counts(sweep(given.run, params, profile)))
    except SearchError as error:
        sys.exit(f"sweep {given.run}: {error}")


if __name__ == "__main__":
    main()
