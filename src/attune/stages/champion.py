"""Registers the best run of the report as the champion, if it beats the one there is: `make champion`."""

from __future__ import annotations

import argparse
import logging
import sys

from attune.config.resolve import load
from attune.config.schema import ConfigError
from attune.hub import parse
from attune.paths import Paths, project_root

LOG = logging.getLogger("attune.champion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anew", action="store_true", help="take the alias from a champion of another protocol")
    anew = parser.parse_args().anew
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    LOG.setLevel(logging.INFO)
    try:
        settings = load()
    except ConfigError as error:
        sys.exit(str(error))
    if settings.tracking is None:
        sys.exit("params.yaml: tracking: null, and the registry is in the tracking store")

    from attune.evaluation.champion import NoCandidate, find_candidate
    from attune.tracking.promote import promote
    from attune.tracking.registry import RegistryError

    paths, store = Paths(settings.profile), (settings.tracking, project_root())
    source = parse(settings.model.path)
    base_model = (source.place, source.commit)
    try:
        candidate = find_candidate(paths.reports, paths.model("base").parent)
        LOG.info(promote(f"attune-{settings.profile}", candidate, base_model, store, seed=settings.seed, anew=anew))
    except NoCandidate as none:
        LOG.info("%s: nothing to register", none)
    except (FileNotFoundError, ValueError, RegistryError) as error:
        sys.exit(f"champion: {error}")


if __name__ == "__main__":
    main()
