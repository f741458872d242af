"""The training loop: which batches, groups and rates its steps get, and what it reports."""

import math
import threading
import time
from collections import Counter

import pytest
import torch

import tiny
from attune.diffusion.noise import keyed_generator
from attune.training import loop
from attune.training.loop import Callbacks, epoch_order, epoch_rows
from trainables import METHODS, Line, at_batch, equal, method, numbers

# ---------------------------------------------------------------- rates, groups and reports, on one weight


def test_warm_up_by_hand():
    """A constant gradient makes AdamW move by its rate: 0.1 (1/4 + 2/4 + 3/4 + 1 + 1) = 0.35 downhill."""
    line, steady = Line([1.0]), Line([1.0])
    history, _ = line.train(5, warmup=4)
    assert [row["lr"] for row in history] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert line.w == pytest.approx(-0.35, abs=1e-6)
    steady.train(5)
    assert steady.w == pytest.approx(-0.5, abs=1e-6)


def test_linear_schedule_by_hand():
    """Two steps up, then down over the four batches that are left: 1, 3/4, 2/4, 1/4 of the rate."""
    history, _ = Line([1.0]).train(6, warmup=2, schedule="linear")
    assert [row["lr"] for row in history] == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025])
    history, _ = Line([1.0]).train(4, schedule="linear")
    assert [row["lr"] for row in history] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_linear_schedule_of_rollouts():
    """Several steps in a batch share its rate; a batch without any passes all the same."""
    history, _ = Line([1.0, 2.0], [], [1.0]).train(6, schedule="linear")
    assert [row["lr"] for row in history] == pytest.approx([0.1 * left / 6 for left in (6, 6, 4, 3, 3, 1)])
    history, _ = Line([1.0, 2.0]).train(2, warmup=3, schedule="linear")  # warm-up ends inside the last batch
    assert [row["lr"] for row in history] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1])


def test_accumulation_runs_across_batches():
    """Offline methods yield one minibatch per batch: five batches, two per step, and the last alone."""
    history, _ = Line([1.0], [3.0], [5.0], [7.0], [9.0]).train(5, accumulation=2)
    assert [(row["step"], row["batch"], row["x"]) for row in history] == [(1, 1, 2), (2, 3, 6), (3, 4, 9)]


def test_batches_may_yield_nothing():
    """As when the preference model is confident of no pair; training continues."""
    line, idle = Line([], [1.0, 2.0], []), Line([])
    history, _ = line.train(3)
    assert [(row["step"], row["batch"]) for row in history] == [(1, 1), (2, 1)]
    assert line.w < 0
    assert idle.train(2) == ([], [])
    assert idle.w == 0


def test_what_is_logged_is_the_history():
    logged, shown = [], []
    line = Line([1.0, 2.0])
    callbacks = Callbacks(
        "a line", log=lambda row, step: logged.append({**row, "step": step}), sample_images=shown.append, sample_every=2
    )
    history, _ = line.train(4, {"callbacks": callbacks})
    assert [{k: v for k, v in row.items() if k != "batch"} for row in history] == logged
    assert [row["batch"] for row in history] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {"loss", "x", "grad_norm", "lr", "step"} == set(logged[0])
    assert shown == [0, 4, 8]  # before the first batch, and the optimizer step after batches 2 and 4


# ---------------------------------------------------------------- reading ahead


def test_one_batch_is_read_while_another_is_trained_on_and_none_after_the_last():
    """Batch 0 waits until batch 1 has been read: a loop that read it afterwards would wait in vain."""
    read, following = [], threading.Event()

    def drawn(b, shard):
        read.append((b, threading.get_ident()))
        if b == 1:
            following.set()
        return numbers(b, shard)

    line, before = Line([1.0]), []
    at_batch(line, 0, lambda: before.append(following.wait(30)))
    at_batch(line, 2, lambda: (time.sleep(0.1), before.append([b for b, _ in read])))
    line.train(5, drawn=drawn)
    assert before == [True, [0, 1, 2, 3]]
    assert [b for b, _ in read] == [0, 1, 2, 3, 4]
    assert {thread for _, thread in read}.isdisjoint({threading.get_ident()})
    assert [thread.name for thread in threading.enumerate() if "ThreadPool" in thread.name] == []


def test_an_error_in_reading_comes_in_its_turn_and_says_where_it_arose():
    """Batches 0 and 1 are trained on although batch 2 cannot be read."""

    def damaged_file(b, shard):
        if b == 2:
            raise OSError("latents-00002.safetensors is cut off")
        return numbers(b, shard)

    line = Line([1.0])
    with pytest.raises(OSError, match="is cut off") as error:
        line.train(5, drawn=damaged_file)
    assert line.w == pytest.approx(-0.2, abs=1e-6)
    assert "damaged_file" in [entry.name for entry in error.traceback]


# ---------------------------------------------------------------- randomness


def test_generators_of_batches_differ():
    draws = {torch.rand(1, generator=keyed_generator(seed, b)).item() for seed in range(3) for b in range(-2, 3)}
    assert len(draws) == 15
    assert torch.equal(*(torch.rand(4, generator=keyed_generator(1, 2)) for _ in range(2)))


@pytest.mark.parametrize(("n", "batch_size"), [(7, 3), (4, 4), (3, 8), (5, 1)])
def test_every_epoch_shows_every_row_once(n, batch_size):
    """Batches run across epochs: n batches of any size are exactly `batch_size` epochs."""
    rows = torch.cat([epoch_rows(n, batch_size, b, seed=0) for b in range(n)])
    assert len(rows) == n * batch_size
    for epoch in rows.split(n):
        assert sorted(epoch.tolist()) == list(range(n))
    assert Counter(rows.tolist()) == Counter(dict.fromkeys(range(n), batch_size))
    if batch_size > 1 and n > 3:
        assert not torch.equal(*rows.split(n)[:2])  # shuffled anew
    assert not torch.equal(rows, torch.cat([epoch_rows(n, batch_size, b, seed=1) for b in range(n)]))


def test_an_epoch_is_drawn_once(monkeypatch):
    """30 rows in batches of 4, three epochs: three draws; batches 7 and 15 begin in one epoch and end in the next."""
    epoch_order.cache_clear()
    drawn, randperm = [], torch.randperm
    monkeypatch.setattr(loop.torch, "randperm", lambda n, **options: drawn.append(n) or randperm(n, **options))
    rows = torch.cat([epoch_rows(30, 4, b, seed=5) for b in range(22)])
    assert drawn == [30, 30, 30]
    orders = [randperm(30, generator=keyed_generator(5, -1 - epoch)) for epoch in range(3)]
    assert torch.equal(rows, torch.cat(orders)[:88])


def test_no_rows_are_an_error_that_names_the_data():
    with pytest.raises(ValueError, match="nothing to learn from: data/<profile>/prepared holds 0 rows"):
        epoch_rows(0, 2, 0, seed=0)


# ---------------------------------------------------------------- real methods on a real network


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_bits_and_only_the_adapter_moves(new_policy, data, name):
    ends = []
    for seed in (0, 0, 1):
        policy = new_policy()
        before, base = tiny.weights(policy), tiny.fingerprint(policy.denoiser)
        history = tiny.run(method(name, policy), data, seed=seed)
        assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in history)
        assert tiny.fingerprint(policy.denoiser) == base
        after = policy.denoiser.state_dict()
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert moved == {key for key in before if "lora_" in key}
        ends.append((tiny.adapter(policy), history))
    assert equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert not equal(ends[0][0], ends[2][0])


@pytest.mark.parametrize("name", METHODS)
def test_optimizer_steps_are_as_many_as_asked(new_policy, data, name):
    """SPO: 2 prompts and 2 steps with candidates, all judged with confidence: 4 pairs, so 2 minibatches of 2."""
    per_batch = {"sft": 1, "dpo": 1, "spo": 2}[name]
    for accumulation in (1, 2):
        policy = new_policy()
        history = tiny.run(method(name, policy, accumulation=accumulation, batches=2), data)
        assert [row["step"] for row in history] == list(range(1, 2 * per_batch // accumulation + 1))
