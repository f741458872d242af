"""What each run of params.yaml would learn from the rows that were found, and how often it would see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attune.config.resolve import Settings
from attune.config.settings import TrainingConfig
from attune.planning.make import needs_preference_model, rows_of

PREFERENCE_MODEL = "preference model"


@dataclass(frozen=True)
class Learning:
    """A training: its rows of data and how often each is presented; `kind` is what its rows are."""

    run: str
    method: str
    kind: str  # "choices", "pairs", "images", "liked images", "groups" or "prompts"
    rows: int
    batches: int
    batch_size: int

    @property
    def presented(self) -> int:
        """Rows that all batches together have."""
        return self.batches * self.batch_size

    @property
    def epochs(self) -> float:
        """How often each row is presented; infinite without any row."""
        return self.presented / self.rows if self.rows else float("inf")


def learnings(settings: Settings, counts: Mapping[str, float]) -> list[Learning]:
    """Every training of params.yaml, the preference model first if any run needs it.

    Args:
        counts: `prompts/train`, `pairs/train` and `choices/train`, as `prepare` counts them.
    """
    return list(_learnings(settings, counts))


def _learnings(settings: Settings, counts: Mapping[str, float]) -> Iterator[Learning]:
    preference = settings.preference
    if preference is not None and preference.batches and needs_preference_model(settings):
        yield _learning(PREFERENCE_MODEL, "", "pairs", preference, counts)  # a tie teaches it something too
    for name, run in settings.runs.items():
        if run.method is None:
            continue
        config, kind = settings.methods[name], rows_of(run.method, settings.source)
        if kind == "pairs" and getattr(config, "ai_feedback", None) is None:
            kind = "choices"  # ties have no chosen image, unless a scorer decides them
        yield _learning(name, run.method, kind, config, counts)


def _learning(run: str, method: str, kind: str, config: TrainingConfig, counts: Mapping[str, float]) -> Learning:
    counted = {"liked images": "liked", "groups": "prompts"}.get(kind, kind)  # a prompt with images is a group, or more
    rows = int(counts.get(f"{counted}/train", 0))
    return Learning(run, method, kind, rows, config.batches, config.batch_size)
