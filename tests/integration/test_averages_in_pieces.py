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
from forked import together
from trainables import at_batch, every_weight, flat, method

pytestmark = pytest.mark.integration

OPTIONS = {"batches": 2, "batch_size": 2, "reference": {"ema_decay": 0.5, "warmup": False}}


def trained(new_policy, data, shard, root=None, stop=None):
    """History, weights and reference of a training, or that it was stopped; with a checkpoint where there is a root."""
    policy = every_weight(new_policy(adapter=False), replace(shard, sharded_weights=shard.world_size > 1), moved=0.0)
    built = method("dpo", policy, **OPTIONS)
    assert is_sharded(policy.moving_reference.weights) == (shard.world_size > 1)
    kept = None if root is None else Checkpoint(root, "align@x", "key", 60, writes=shard.is_main_process)
    if stop is not None and not shard.is_main_process:
        at_batch(built, stop, lambda: signal.raise_signal(signal.SIGTERM))  # it saves after this batch, and ends
    try:
        history = tiny.run(built, data, checkpoint=kept)
    except Stopped:
        return "stopped"
    return history, flat(policy.parameters()), flat(policy.moving_reference.weights)


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
    assert (whole[0][2] - whole[0][1]).abs().max() > 1e-5
    torch.testing.assert_close(whole[0][2], alone[2], rtol=1e-3, atol=1e-5)
    for (history, after, reference), (expected, ended, moved) in zip(again, whole, strict=True):
        assert history == expected
        assert torch.equal(after, ended)
        assert torch.equal(reference, moved)
