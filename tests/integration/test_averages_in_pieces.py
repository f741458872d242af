"""Moving averages of weights of which each process holds a piece: they are what one process has, and resume exactly."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

import tiny
from attune.distributed import Shard
from attune.fsdp import is_sharded
from attune.stop import Stopped
from attune.training.checkpoint import Checkpoint
from attune.training.early_stopping import EarlyStopping
from forked import together
from trainables import at_batch, every_weight, flat, method

pytestmark = pytest.mark.integration

REFERENCE = {"ema_decay": 0.5, "warmup": False}
OPTIONS = {"batches": 2, "batch_size": 2, "ema_decay": 0.5, "reference": REFERENCE}


def trained(new_policy, data, shard, root=None, stop=None):
    """History, averaged weights, reference and scores, or that it was stopped; with a checkpoint if there is a root."""
    policy = every_weight(new_policy(adapter=False), replace(shard, sharded_weights=shard.world_size > 1), moved=0.0)
    built = method("dpo", policy, **OPTIONS)
    assert is_sharded(policy.moving_reference.weights) == (shard.world_size > 1)
    scores = []

    def score():
        """Of the average, which is cut as the weights are."""
        scores.append(flat(policy.parameters()).square().sum().item())
        return scores[-1]

    kept = None if root is None else Checkpoint(root, "align@x", "key", 60, writes=shard.is_main_process)
    if stop is not None and not shard.is_main_process:
        at_batch(built, stop, lambda: signal.raise_signal(signal.SIGTERM))  # it saves after this batch, and ends
    try:
        stopping = EarlyStopping(score, every=1)
        history = tiny.run(built, data, checkpoint=kept, early_stopping=stopping)
    except Stopped:
        return "stopped"
    return history, flat(policy.parameters()), flat(policy.moving_reference.weights), scores


def test_a_reference_in_pieces_is_what_one_process_has_and_is_resumed_to_the_bit(new_policy, data, tmp_path):
    folders = [tmp_path / str(i) for i in range(3)]
    for folder in folders:
        folder.mkdir()
    alone = trained(new_policy, data, Shard())
    work = partial(trained, new_policy, data)
    whole = together(2, folders[0], work)
    stopped = together(2, folders[1], partial(work, root=tmp_path / "root", stop=0))
    again = together(2, folders[2], partial(work, root=tmp_path / "root"))
    assert stopped == ["stopped"] * 2
    for of_two, of_one in zip(whole[0][1:3], alone[1:3], strict=True):
        torch.testing.assert_close(of_two, of_one, rtol=1e-3, atol=1e-5)
    assert whole[0][3] == pytest.approx(alone[3], rel=1e-5)
    for (history, after, reference, _), (expected, ended, moved, _) in zip(again, whole, strict=True):
        assert history == expected
        assert torch.equal(after, ended)
        assert torch.equal(reference, moved)
