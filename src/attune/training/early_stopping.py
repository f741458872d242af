"""Validation scores during training, and the end of a training whose scores no longer improve."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attune.distributed import Shard
from attune.training.guard import NonFiniteError
from attune.training.progress import Progress

OnScore = Callable[[int, int, float], None]
"""`on_score(batch, step, score)`: batches and optimizer steps done, and the validation score then."""


@dataclass(frozen=True)
class EarlyStopping:
    """Computes a validation score every so many batches, and may end the training by it.

    With `patience`, training ends when that many scores in a row have brought no new best, and its result are the
    weights of the best score, which may be those it started with.
    """

    score: Callable[[], float]  # higher is better; all processes call it, and each may compute a part of it
    every: int  # batches from one score to the next
    at_start_and_end: bool = True  # a score before the first batch and one after the last, too
    patience: int | None = None  # scores without a new best; None: train to the end and keep the last weights

    def evaluate(
        self, progress: Progress, parameters: Sequence[Tensor], shard: Shard, on_score: OnScore, end: bool = False
    ) -> None:
        """Adds a score to `progress` if one is due after `progress.batch` batches, and reports it.

        Args:
            parameters: the weights that are scored, of which a copy is kept if the score is a new best.
            on_score: called in the main process; what it raises ends all processes.
            end: this is after the last batch.

        Raises:
            NonFiniteError: the score is NaN or infinite.
        """
        if not self._is_due(progress, end):
            return
        score = shard.all_gather_object(self.score())[0]  # one for all, though sums of theirs should round apart
        if not math.isfinite(score):
            raise NonFiniteError(f"the validation score is {score} after batch {progress.batch}")
        if self.patience is not None and all(score > past["score"] for past in progress.scores):
            progress.best = [weight.detach().to("cpu", copy=True) for weight in parameters]
        progress.scores.append({"batch": progress.batch, "step": progress.step, "score": score})
        shard.broadcast_from_main(lambda: on_score(progress.batch, progress.step, score))

    def should_stop(self, scores: Sequence[Mapping[str, float]]) -> bool:
        """Whether the last `patience` scores have brought no new best."""
        if self.patience is None or not scores:
            return False
        best = max(range(len(scores)), key=lambda i: scores[i]["score"])
        return len(scores) - 1 - best >= self.patience

    def _is_due(self, progress: Progress, end: bool) -> bool:
        if progress.scores and progress.scores[-1]["batch"] == progress.batch:
            return False  # a resumed training has taken this score already; or the last batch was due anyway
        if end or progress.batch == 0:
            return self.at_start_and_end
        return progress.batch % self.every == 0


def restore_best(progress: Progress, parameters: Sequence[Tensor]) -> None:
    """Puts the weights of the best score back, if any were kept."""
    if not progress.best:
        return
    with torch.no_grad():
        for weight, best in zip(parameters, progress.best, strict=True):
            weight.copy_(best)
