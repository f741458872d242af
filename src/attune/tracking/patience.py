"""How long the stages of one pipeline have waited for a store that is away, locked or slow: a note between processes.

Each stage alone may wait a few seconds at its start and at its end. Together they wait no longer than BUDGET: what the
store lacks is in the outboxes, and nothing is gained by waiting for it at every stage.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from attune.files import values_sha, write_atomically
from attune.tracking.outbox import OUTBOXES

BUDGET = 20.0  # s a pipeline
FORGOTTEN = 600.0  # s after which another pipeline waits again
NOTE = OUTBOXES / "waited.json"


@dataclass(frozen=True)
class Patience:
    """What is known of a store: `waited` seconds so far, without getting all that it was sent."""

    file: Path
    store: str  # hash of its URI
    pipeline: str
    waited: float = 0.0

    @property
    def left(self) -> float:
        """Seconds that may still be waited."""
        return max(0.0, BUDGET - self.waited)

    @property
    def is_known_away(self) -> bool:
        """Whether an earlier stage has waited in vain, and has said so."""
        return self.waited > 0

    def spend(self, seconds: float) -> None:
        """Notes seconds that were waited in vain."""
        about = {"store": self.store, "pipeline": self.pipeline, "waited": self.waited + max(seconds, 0.1)}
        write_atomically(self.file, json.dumps({**about, "at": time.time()}).encode())

    def forget(self) -> None:
        """The store has got all of a run."""
        self.file.unlink(missing_ok=True)


def read(root: Path, uri: str, pipeline: str) -> Patience:
    """What earlier stages of the pipeline, or whatever ran here in the last minutes, have noted of the store."""
    fresh = Patience(root / NOTE, values_sha(uri), pipeline)
    try:
        known = json.loads(fresh.file.read_text())
        same = known["store"] == fresh.store and (
            0 <= time.time() - known["at"] < FORGOTTEN or (pipeline and known["pipeline"] == pipeline)
        )
        return Patience(fresh.file, fresh.store, pipeline, float(known["waited"])) if same else fresh
    except (OSError, ValueError, LookupError, TypeError):  # no note, or half of one
        return fresh
