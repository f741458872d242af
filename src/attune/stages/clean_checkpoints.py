"""Removes checkpoints that no training of the profile will read again: `make clean-checkpoints`; ALL=1 (`--all`): all.

Those of trainings that run now are never removed. `make plan` lists them.
"""

from __future__ import annotations

import argparse
import sys

from attune.config.resolve import load
from attune.config.schema import ConfigError
from attune.paths import CHECKPOINTS, project_root
from attune.planning.checkpoints import remove, saved_trainings
from attune.stages.plan import say, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="those that could be resumed, and other profiles' too")
    everything = parser.parse_args().all
    try:
        settings = load()
    except ConfigError as error:
        sys.exit(str(error))
    root, removed = project_root(), 0
    for training in saved_trainings(root, settings.profile, texts(settings)):
        wanted = training.state == "stale" or (everything and training.state != "running")
        if wanted and remove(training):
            removed += training.size
            say(f"removed {training}")
        else:
            say(f"kept {training}")
    say(f"{removed / 1e6:.1f} MB of {root / CHECKPOINTS} are free again")


if __name__ == "__main__":
    main()
