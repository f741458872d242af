"""A reference that follows the policy: how far, how fast, and that a training resumes and divides as ever."""

import gc

import pytest
import torch

import tiny
from attune.averages import MovingAverage, decay_at
from attune.config.plugins import plugin_config
from attune.config.schema import ConfigError
from attune.config.settings import Lora
from attune.methods import dpo
from attune.training.checkpoint import Checkpoint
from attune.training.loop import Callbacks
from forked import together
from trainables import equal, flat, halved, run_until

BLOCK = tiny.PLAIN | {"lora": None, "caption_dropout": 0, "lr": 1e-3, "batches": 4, "batch_size": 2, "beta": 100}
LINEAR = {"loss": "linear", "eta": 0.001}


def dpo_of(policy, decay=None, warmup=False, **options):
    reference = {} if decay is None else {"reference": {"ema_decay": decay, "warmup": warmup}}
    return dpo.Method(dpo.Config(**(BLOCK | reference | options)), policy)


def full(new_policy, **lora):
    policy = new_policy(adapter=False)
    policy.unfreeze()
    return policy


def adapted(new_policy, **lora):
    return new_policy(**lora)


KINDS = pytest.mark.parametrize("make", [adapted, full])


def reference_weights(policy):
    return [weight.clone() for weight in policy.moving_reference.weights]


def test_the_average_by_hand():
    """0.9 10 + 0.1 20 = 11, then 0.9 11 + 0.1 30 = 12.9."""
    average = MovingAverage([torch.tensor([10.0])], 0.9, warmup=False)
    for step, theta in enumerate((20.0, 30.0), 1):
        average.update([torch.tensor([theta])], step)
    assert average.weights[0].item() == pytest.approx(12.9)


def test_it_follows_faster_in_the_beginning():
    """2/11, 3/12, ... up to the decay, which is reached at n = (10 d - 1) / (1 - d): 8 for a half."""
    assert [decay_at(0.5, n) for n in (1, 2, 7, 8, 9)] == pytest.approx([2 / 11, 3 / 12, 8 / 17, 0.5, 0.5])
    assert [decay_at(d, 1) for d in (0.0, 0.1, 1.0)] == [0.0, 0.1, 1.0]
    average = MovingAverage([torch.zeros(1)], 0.99)
    average.update([torch.ones(1)], 1)
    assert average.weights[0].item() == pytest.approx(9 / 11)


@KINDS
@pytest.mark.parametrize("warmup", [False, True])
def test_a_decay_of_1_is_a_frozen_reference_bit_for_bit(new_policy, data, make, warmup):
    frozen, still = make(new_policy), make(new_policy)
    history = tiny.run(dpo_of(frozen), data)
    assert tiny.run(dpo_of(still, 1.0, warmup), data) == history
    assert equal(frozen.parameters(), still.parameters())


@KINDS
def test_a_decay_of_0_is_the_policy_so_no_pair_ever_has_a_margin(new_policy, data, make):
    """The weight stays a half, and after every step the reference is what the policy has become."""
    policy = make(new_policy)
    history = tiny.run(dpo_of(policy, 0.0, **LINEAR), data)
    assert [row["margin"] for row in history] == [0.0] * 4
    assert all(row["grad_norm"] > 0 for row in history)
    assert equal(reference_weights(policy), policy.parameters())


@KINDS
def test_in_between_it_moves_once_per_optimizer_step(new_policy, data, make):
    """Four batches are two steps: the reference is an average of the start and the two policies there were."""
    policy = make(new_policy)
    seen = [flat(policy.parameters())]
    after_step = Callbacks(log=lambda metrics, step: seen.append(flat(policy.parameters())))
    tiny.run(dpo_of(policy, 0.75, accumulation=2), data, callbacks=after_step)
    start, first, last = seen
    assert not torch.equal(first, start)
    assert not torch.equal(last, first)
    expected = 0.75 * (0.75 * start + 0.25 * first) + 0.25 * last
    torch.testing.assert_close(flat(reference_weights(policy)), expected)


@KINDS
def test_it_changes_what_is_trained_and_is_not_saved_with_it(new_policy, data, make, tmp_path):
    policies = [make(new_policy) for _ in range(2)]
    histories = [tiny.run(dpo_of(policy, d), data) for policy, d in zip(policies, (None, 0.5), strict=True)]
    assert histories[0][:2] != histories[1][:2]
    assert histories[0][0] == histories[1][0]
    policies[1].save(tmp_path)
    again = new_policy(adapter=False)
    again.load(tmp_path)
    assert tiny.weights(again).keys() == tiny.weights(policies[1]).keys()
    assert equal(tiny.weights(again).values(), tiny.weights(policies[1]).values())


def test_on_a_base_in_half_precision_it_is_float32(new_policy, data):
    """A gap of 1e-4 of a weight of 0.03 is closed by 5 % a step only where 5e-6 is not rounded away."""
    policy = halved(new_policy())
    dpo_of(policy, 0.95)
    before = reference_weights(policy)
    for weight in policy.parameters():
        weight.data += 1e-4
    policy.moving_reference.update(policy.parameters(), 1)
    assert {weight.dtype for weight in before} == {torch.float32}
    moved = torch.cat([(after - b).flatten() for after, b in zip(reference_weights(policy), before, strict=True)])
    assert moved.mean().item() == pytest.approx(5e-6, rel=0.01)


def test_a_training_that_goes_on_from_an_adapter_begins_with_it_as_reference(new_policy, data, tmp_path):
    first = new_policy(moved=0.1)
    first.save(tmp_path)
    policy = new_policy(adapter=False)
    policy.continue_from(str(tmp_path), Lora(rank=2))
    history = tiny.run(dpo_of(policy, 0.5), data)
    assert history[0]["margin"] == 0
    assert not equal(reference_weights(policy), first.parameters())


@KINDS
def test_a_resumed_training_has_the_reference_of_one_that_was_not_stopped(new_policy, data, tmp_path, make):
    whole, options = make(new_policy), {"decay": 0.9, "warmup": True, **LINEAR}
    history = tiny.run(dpo_of(whole, **options), data)
    run_until(dpo_of(make(new_policy), **options), data, tmp_path, stop=2)
    gc.collect()  # the dead process's lock
    again = make(new_policy, seed=99)
    method = dpo_of(again, **options)
    for weight in again.moving_reference.weights:
        weight += 1  # which the checkpoint must replace
    assert tiny.run(method, data, checkpoint=Checkpoint(tmp_path, "align@x", "key", every_seconds=0)) == history
    assert equal(whole.parameters(), again.parameters())
    assert equal(reference_weights(whole), reference_weights(again))


def test_two_processes_have_the_reference_that_one_has(new_policy, data, tmp_path):
    """Apart by rounding, with every option that looks at pairs; and between the two by nothing."""
    options = LINEAR | {"safeguard": 0.5, "sft_weight": 3.0}

    def work(shard):
        policy = new_policy()
        policy.shard = shard
        return tiny.run(dpo_of(policy, 0.5, batch_size=3, **options), data), reference_weights(policy)

    expected, weights = work(new_policy().shard)
    (history, first), (same, second) = together(2, tmp_path, work)
    assert history == same
    assert equal(first, second)
    for row, wanted in zip(history, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    torch.testing.assert_close(flat(first), flat(weights), rtol=1e-3, atol=1e-5)


def test_wrong_settings_name_their_key():
    for wrong, key in (({"ema_decay": 1.1}, "ema_decay"), ({"ema_decay": -0.1}, "ema_decay"), ({}, "ema_decay")):
        with pytest.raises(ConfigError, match=rf"^here\.reference\.{key}"):
            plugin_config("methods", "dpo", BLOCK | {"reference": wrong}, "here")
    with pytest.raises(ConfigError, match=r"^here\.reference"):
        plugin_config("methods", "spin", {"reference": {"ema_decay": 0.9}}, "here")
