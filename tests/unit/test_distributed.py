"""Whose rows are whose, and what is said when a process is gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attune.diffusion.noise import Draws
from attune.distributed import Shard

SRC = str(Path(__file__).parents[2] / "src")


def test_rows_lie_together_and_every_row_is_somebodys():
    """5 of 2: 2 + 3. 7 of 3: 2 + 2 + 3. 1 of 2: the first has none, and computes with row 0 all the same."""
    assert [Shard(r, 2).rows(5) for r in range(2)] == [slice(0, 2), slice(2, 5)]
    assert [Shard(r, 3).rows(7) for r in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert [(Shard(r, 2).count(1), Shard(r, 2).rows(1)) for r in range(2)] == [(0, slice(0, 1)), (1, slice(0, 1))]
    for n in range(20):
        assert sum(Shard(r, 6).count(n) for r in range(6)) == n


@pytest.mark.parametrize("k", [1, 3])
def test_draws_are_what_one_process_would_have_drawn_for_the_row(k):
    """k values of each of 5 rows, copy by copy: value j * 5 + i is row i's; and so again for the next draws."""

    def drawn(shard):
        draws, m = Draws.of_batch(3, 1, 5, shard), max(1, shard.count(5))
        kinds = (lambda: draws.noise((k * m, 2, 9)), lambda: draws.integers(1000, k * m), lambda: draws.uniform(k * m))
        found = [draw().unflatten(0, (k, m)) for _ in range(2) for draw in kinds]
        return found, torch.rand(3, generator=draws.shared)

    whole, shared = drawn(Shard())
    assert len(torch.cat([whole[0], whole[3]]).unique()) == 2 * k * 5 * 18
    for shard in [Shard(r, 2) for r in range(2)] + [Shard(r, 7) for r in range(7)]:
        found, same = drawn(shard)
        assert torch.equal(same, shared)
        for ours, all_rows in zip(found, whole, strict=True):
            assert torch.equal(ours, all_rows[:, shard.rows(5)])


def test_draws_differ_by_seed_batch_and_row_and_refuse_a_row_with_more_than_another():
    first = [Draws.of_batch(seed, b, 4, Shard()).uniform(4) for seed in (0, 1) for b in (0, 1)]
    assert len(torch.cat(first).unique()) == 16
    with pytest.raises(ValueError, match="5 values for 4 rows"):
        Draws.of_batch(0, 0, 4, Shard()).noise((5, 2))


def test_one_process_is_left_alone():
    shard, rows = Shard(), torch.ones(3, requires_grad=True)
    assert shard.gather(rows) is rows
    assert (shard.rows(3), shard.count(3), shard.is_main_process) == (slice(0, 3), 3, True)
    assert (shard.all_gather_object("x"), shard.all_reduce_sum([1.5]), shard.broadcast_from_main(lambda: 7)) == (
        ["x"],
        [1.5],
        7,
    )


def test_what_is_said_of_a_lost_process_comes_out_though_the_launcher_stops_us():
    """Its SIGTERM comes when the training is over and before Python has printed why."""
    code = """
import os, signal, sys
from attune.distributed import Shard
def stopped_first(kind, error, trace):
    os.kill(os.getpid(), signal.SIGTERM)
    print(error, file=sys.stderr)
sys.excepthook = stopped_first
with Shard(0, 2).process_group_guard():
    raise RuntimeError("gloo: connection closed by peer")
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": SRC}, capture_output=True)
    assert b"process 0 of the 2 that work together cannot go on: another is gone. " in done.stderr
    assert done.returncode == 1
