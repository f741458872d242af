"""Validation scores during training: when they are taken, when they end it, and which weights are left."""

import gc
import math

import pytest
import torch

from attune.training.checkpoint import Checkpoint
from attune.training.early_stopping import EarlyStopping
from attune.training.guard import NonFiniteError
from attune.training.loop import Callbacks
from trainables import Interrupted, Line, interrupted, numbers


def stopping(scores, reported, **options):
    """Options of `train`: these scores, one after the other; every report of one is appended to `reported`."""
    given = iter(scores)
    callbacks = Callbacks(on_score=lambda batch, step, score: reported.append((batch, step, score)))
    return {"early_stopping": EarlyStopping(lambda: next(given), **options), "callbacks": callbacks}


def test_patience_ends_training_and_keeps_the_best():
    """Scores .1 before training, then .3, .2, .25 every 2 batches: two without a new best end it after 6 batches.

    The best was taken after 2 batches, where AdamW at rate .1 has brought the weight to -0.2.
    """
    line, reported = Line([1.0]), []
    history, scores = line.train(20, stopping([0.1, 0.3, 0.2, 0.25], reported, every=2, patience=2))
    assert len(history) == 6
    assert reported == [(0, 0, 0.1), (2, 2, 0.3), (4, 4, 0.2), (6, 6, 0.25)]
    assert [tuple(row.values()) for row in scores] == reported
    assert line.w == pytest.approx(-0.2, abs=1e-6)


def test_without_patience_a_falling_score_changes_nothing():
    line, unscored, reported = Line([1.0]), Line([1.0]), []
    line.train(5, stopping([3, 2, 1, 0], reported, every=2))
    assert [batch for batch, _, _ in reported] == [0, 2, 4, 5]
    unscored.train(5)
    assert line.w == unscored.w


def test_scores_may_be_taken_in_between_alone():
    reported = []
    Line([1.0]).train(4, stopping([1], reported, every=2, at_start_and_end=False))
    assert reported == [(2, 2, 1)]


def test_the_last_batch_is_scored_once_where_its_turn_comes():
    line, reported = Line([1.0]), []
    line.train(4, stopping([0, 1, 2], reported, every=2, patience=9))
    assert [batch for batch, _, _ in reported] == [0, 2, 4]
    assert line.w == pytest.approx(-0.4, abs=1e-6)  # the last is the best


def test_the_start_may_be_the_best():
    """Scores 1, 0, 0: training ends after 4 batches, and the weight is again the 0 it started with."""
    line = Line([1.0])
    history, _ = line.train(20, stopping([1, 0, 0], [], every=2, patience=2))
    assert len(history) == 4
    assert line.w == 0


def test_a_score_that_is_no_number_stops_training():
    with pytest.raises(NonFiniteError, match="after batch 2"):
        Line([1.0]).train(4, stopping([0.0, math.nan], [], every=2))


def test_what_on_score_raises_ends_training():
    """As a search does with a trial that is worse than the others."""

    def prune(batch, step, score):
        if batch == 2:
            raise KeyError("pruned")

    line, options = Line([1.0]), stopping([0, 1, 2], [], every=1)
    with pytest.raises(KeyError, match="pruned"):
        line.train(4, options | {"callbacks": Callbacks(on_score=prune)})
    assert line.w == pytest.approx(-0.2, abs=1e-6)  # two batches were trained


def test_a_resumed_training_stops_where_it_would_have(tmp_path):
    """The scores so far and the best weights are in the checkpoint: interrupted after 5 of 6 batches."""
    curve = {0: 0.1, 2: 0.3, 4: 0.2, 6: 0.25}

    def run(line, checkpoint=None, drawn=numbers, taken=()):
        scores = [score for batch, score in curve.items() if batch not in taken]
        return line.train(20, stopping(scores, [], every=2, patience=2) | {"checkpoint": checkpoint}, drawn)

    whole, cut, again = Line([1.0]), Line([1.0]), Line([1.0])
    expected = run(whole)
    checkpoint = Checkpoint(tmp_path, "a", "k", every_seconds=0)
    with pytest.raises(Interrupted):
        run(cut, checkpoint, interrupted(numbers, 5))
    del checkpoint
    gc.collect()
    checkpoint = Checkpoint(tmp_path, "a", "k", every_seconds=0)
    assert run(again, checkpoint, taken=(0, 2, 4)) == expected
    assert torch.equal(whole.module.weight, again.module.weight)
