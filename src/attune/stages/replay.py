"""Sends what a tracking store that was away has not got yet: `make replay`."""

from __future__ import annotations

import logging
import sys

from attune import tracking
from attune.paths import project_root


def main() -> None:
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    log = logging.getLogger("attune.replay")
    done = tracking.replay(project_root())
    waiting = {uid: error for uid, error in done.items() if error is not None}
    log.info("%d runs sent, %d wait", len(done) - len(waiting), len(waiting))
    for uid, error in waiting.items():
        log.warning("%s still waits: %s", uid, tracking.redact(error))
    sys.exit(1 if waiting else 0)


if __name__ == "__main__":
    main()
