"""Where a profile's data, models and reports are, relative to the checkout; and the repository they belong to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CHECKPOINTS = Path(".checkpoints")  # below the project root; neither in git nor in DVC
TIMES = CHECKPOINTS / "seconds.json"  # how long each stage took the last time
COSTS = CHECKPOINTS / "costs"  # what each stage cost, by profile
BEST_SETTINGS = "best_params.yaml"  # in the folder of a search
TRACKED_RUNS = CHECKPOINTS / "runs"  # run ids mean something in one tracking store only


@dataclass(frozen=True)
class Paths:
    """The folders of a profile."""

    profile: str

    @property
    def data(self) -> Path:
        return Path("data", self.profile)

    @property
    def prepared(self) -> Path:
        return self.data / "prepared"

    @property
    def quarantine(self) -> Path:
        return self.data / "quarantine.csv"

    def generated(self, run: str) -> Path:
        return self.data / "generated" / run

    def model(self, run: str) -> Path:
        return Path("models", self.profile, run)

    @property
    def preference(self) -> Path:
        return self.model("preference")

    @property
    def reports(self) -> Path:
        return Path("reports", self.profile)

    def training(self, name: str) -> Path:
        """Curves (.csv) and facts (.json) of a training, without the ending."""
        return self.reports / "train" / name

    def scores(self, run: str) -> Path:
        return self.reports / "scores" / f"{run}.parquet"

    def kept_scores(self, run: str) -> Path:
        """Scores of images by each scorer, below the project root, so that none is asked twice."""
        return CHECKPOINTS / "scores" / self.profile / run

    def features(self, run: str) -> Path:
        return self.reports / "features" / f"{run}.npy"

    def labels(self, session: str) -> Path:
        """The answers of a session of the labelling page, a SQLite database."""
        return self.data / "labels" / f"{session}.db"

    def people(self, a: str, b: str) -> Path:
        """What people chose between the images of two runs."""
        return self.reports / "people" / f"{a}-vs-{b}.csv"

    @property
    def seeds(self) -> Path:
        return self.reports / "seeds"

    def seed(self, seed: int) -> Path:
        """The summary of the runs with one seed."""
        return self.seeds / f"seed{seed}.json"

    def seed_copy(self, seed: int) -> Path:
        """The copy of the checkout in which the runs of another seed are made, below the project root."""
        return CHECKPOINTS / "seeds" / self.profile / f"seed{seed}"

    def search(self, run: str) -> Path:
        return self.reports / "sweeps" / run

    def best_settings(self, run: str) -> Path:
        """What a search found, for a person to apply."""
        return self.search(run) / BEST_SETTINGS


def project_root() -> Path:
    """Where shared state lives: the repository, also inside DVC's temporary experiment folders."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()
