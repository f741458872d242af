"""SPIN-Diffusion: who the opponent is, and that the game starts even in every iteration."""

import math

import pytest
import torch

import tiny
from attune.config.settings import Lora
from attune.diffusion.ddim import sample
from attune.distributed import Part, Shard
from attune.methods import spin
from attune.training.loop import epoch_rows

ATTENTION = Lora(rank=2)
SETTINGS = {"lr": 1e-3, "batches": 3, "batch_size": 2, "beta": 500, "steps": 4, "guidance_scale": 2}


def spin_of(policy, **changes):
    return spin.Method(spin.Config(lora=ATTENTION, **(tiny.PLAIN | SETTINGS | changes)), policy)


@pytest.fixture
def second(new_policy, data, tmp_path):
    """A policy at the start of iteration 2: it goes on from what iteration 1 saved."""
    first = new_policy()
    tiny.run(spin_of(first), data)
    first.save(tmp_path)
    policy = new_policy(adapter=False)
    policy.continue_from(str(tmp_path), ATTENTION)
    return policy


def game(method, data):
    """The batch and the one minibatch of batch 0."""
    batch = tiny.batches(data, method)(0, Shard()).rows
    (minibatch,) = tiny.minibatches(method, batch)
    return batch, minibatch


def test_real_images_are_the_chosen_ones_and_share_time_and_noise_with_their_opponents(policy, data):
    batch, found = game(spin_of(policy), data)
    real, opponents = found.x_0.chunk(2)
    assert torch.equal(real, batch.latents)
    rows = epoch_rows(len(data.pairs), 2, 0, 0)
    pairs = data.pair_batch(rows)
    assert torch.equal(real, pairs.chosen)
    assert not torch.isclose(opponents, pairs.rejected).any()
    for shared in (found.t, found.noise, *found.cond.tensors.values()):
        assert torch.equal(*shared.chunk(2))


def test_the_opponent_is_what_the_reference_generates_however_far_the_policy_has_moved(second, data):
    method = spin_of(second)
    tiny.move(second, 0.3)
    batch, found = game(method, data)
    with second.reference():
        expected = sample(second, batch.cond, tiny.draws(2).noise, 4, 0.0, 2.0)
    by_policy = sample(second, batch.cond, tiny.draws(2).noise, 4, 0.0, 2.0)
    assert torch.equal(found.x_0.chunk(2)[1], expected)
    assert not torch.allclose(by_policy, expected, atol=1e-2)


def test_every_iteration_starts_at_ln_2_and_pulls(second, data):
    """Policy and reference are one network with one adapter twice: margins are 0 and the loss is -log sigmoid(0)."""
    loss, metrics = (method := spin_of(second)).loss(game(method, data)[1])
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["margin"].item() == 0
    loss.backward()
    assert all(weight.grad is not None for weight in second.parameters())
    assert sum(weight.grad.square().sum() for weight in second.parameters()) > 0
    assert all(weight.grad is None for weight in second.reference_model.parameters())


def test_the_second_iteration_learns_and_its_reference_stays(second, data):
    reference = tiny.adapter(second)
    liked = Part(data.pair_batch(range(8)).liked_images, 8)
    history = tiny.run(spin_of(second, batches=12, batch_size=8), data, batches=lambda b, shard: liked)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert sum(row["margin"] for row in history[-4:]) / 4 > 0.02
    kept = [weight for name, weight in second.reference_model.named_parameters() if "lora_" in name]
    assert all(torch.equal(a, b) for a, b in zip(kept, reference, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(second.parameters(), reference, strict=True))


def test_emptied_captions_are_emptied_for_both_and_after_generating(policy, data):
    """A share of 0.5 drops some of eight prompts, and not all; the pictures were generated knowing them."""
    _, plain = game(spin_of(policy, batch_size=8), data)
    _, found = game(spin_of(policy, batch_size=8, caption_dropout=0.5), data)
    assert torch.equal(plain.x_0, found.x_0)
    for name, value in found.cond.tensors.items():
        real, opponent = value.chunk(2)
        assert torch.equal(real, opponent)
        empty = [torch.equal(row, policy.uncond.tensors[name][0]) for row in real]
        assert 0 < sum(empty) < 8
