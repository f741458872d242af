"""Diffusion-KTO: the utility by hand, the reference point, and images that are no longer pairs."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tiny
from attune.data.batches import ImageBatch
from attune.diffusion.noised import NoisedBatch, policy_and_reference_error
from attune.distributed import Part
from attune.methods import kto
from attune.methods.kto import kto_loss, reference_point

BLOCK = (
    tiny.PLAIN
    | {"lora": None, "caption_dropout": 0, "lr": 1e-3, "batches": 2, "batch_size": 4, "beta": 50}
    | {"lambda_desirable": 1, "lambda_undesirable": 1}
)


def method(policy, **options):
    return kto.Method(kto.Config(**(BLOCK | options)), policy)


def only(method, data, rows=range(4)):
    """The one minibatch of a batch."""
    (minibatch,) = tiny.minibatches(method, data.pair_batch(rows).images)
    return minibatch


def test_kto_loss_by_hand():
    """sigmoid(ln 3) = 3/4. A liked image at gain ln 3: 2 (1 - 3/4) = 1/2; a disliked one there: 3 (1 - 1/4) = 9/4."""
    gain, liked = torch.full((2,), math.log(3)), torch.tensor([True, False])
    assert kto_loss(gain, liked, "kahneman_tversky", 2.0, 3.0).tolist() == pytest.approx([0.5, 2.25])


def test_other_utilities_by_hand():
    """log sigmoid(ln 3) = -ln 4/3, so 1 + ln 4/3; -log sigmoid(-ln 3) = ln 4, so 1 - ln 4."""
    gain, liked = torch.tensor([math.log(3)]), torch.tensor([True])
    assert kto_loss(gain, liked, "loss_averse", 1.0, 1.0).item() == pytest.approx(1 + math.log(4 / 3))
    assert kto_loss(gain, liked, "risk_seeking", 1.0, 1.0).item() == pytest.approx(1 - math.log(4))


@pytest.mark.parametrize(
    ("utility", "far"), [("kahneman_tversky", "none"), ("loss_averse", "losses"), ("risk_seeking", "gains")]
)
def test_a_utility_is_known_by_where_it_stops_pulling(utility, far):
    """Slope of U far below and far above the reference point: a sigmoid is flat at both ends."""
    gain = torch.tensor([-30.0, 30.0], requires_grad=True)
    kto_loss(gain, torch.tensor([True, True]), utility, 1.0, 1.0).sum().backward()
    pulls = {"none": [0.0, 0.0], "losses": [1.0, 0.0], "gains": [0.0, 1.0]}[far]
    assert (-gain.grad).tolist() == pytest.approx(pulls, abs=1e-6)


def test_the_reference_point_is_the_mean_reward_but_never_below_zero_and_has_no_gradient():
    reward = torch.tensor([1.0, 4.0, -2.0], requires_grad=True)
    assert reference_point(reward).item() == 1.0
    assert reference_point(-reward).item() == 0.0
    assert not reference_point(reward).requires_grad


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({}, 0.5),
        ({"lambda_desirable": 1.6, "lambda_undesirable": 0.4}, 0.5),
        ({"lambda_desirable": 3.0}, 1.0),
        ({"utility": "loss_averse"}, 1 + math.log(2)),
        ({"utility": "risk_seeking"}, 1 - math.log(2)),
    ],
)
def test_it_starts_at_its_closed_form(policy, data, options, start):
    """Every gain is 0, half the images are liked: (lambda_d + lambda_u) / 2 times 1 - U(0); U(0) = 1/2 or -+ ln 2."""
    inner = method(policy, **options)
    loss, metrics = inner.loss(only(inner, data))
    assert loss.item() == pytest.approx(start, abs=1e-6)
    assert [metrics[name].item() for name in ("z_ref", "liked_reward", "disliked_reward")] == [0, 0, 0]
    assert metrics["accuracy"] == 0.5


def test_images_of_a_pair_share_neither_timestep_nor_noise_nor_a_dropped_prompt(policy, data):
    inner = method(policy, caption_dropout=0.5, batch_size=24)
    m, batch = only(inner, data, range(24)), data.pair_batch(range(24))
    assert torch.equal(m.x_0, torch.cat([batch.chosen, batch.rejected]))
    assert (m.t[:24] == m.t[24:]).sum() < 3  # by chance one in 1000
    assert (m.noise[:24] - m.noise[24:]).abs().flatten(1).amax(1).min() > 0.1
    (states,) = m.cond.tensors.values()
    null = next(iter(policy.uncond.tensors.values()))
    empty = (states == null).flatten(1).all(1)
    assert 0 < empty.sum() < 48
    assert not torch.equal(empty[:24], empty[24:])


def test_the_loss_is_that_of_the_images_rewards(new_policy, data):
    """beta (e_ref - e) of one liked and one disliked image, no 1/2 as in DPO; z_ref is their mean, if positive."""
    policy = new_policy(moved=0.3)
    inner = method(policy)
    loss, metrics = inner.loss(only(inner, data, [0]))
    rewards = torch.stack([metrics["liked_reward"], metrics["disliked_reward"]])
    z = max(rewards.mean().item(), 0.0)
    sides = torch.sigmoid(torch.stack([rewards[0] - z, z - rewards[1]]))
    assert metrics["z_ref"].item() == pytest.approx(z)
    assert loss.item() == pytest.approx(1 - sides.mean().item(), rel=1e-6)
    assert rewards.abs().min() > 0.1
    _, doubled = method(policy, beta=2 * BLOCK["beta"]).loss(only(inner, data, [0]))
    assert doubled["liked_reward"].item() == pytest.approx(2 * rewards[0].item(), rel=1e-5)


def test_it_learns_to_tell_liked_from_disliked(new_policy, data):
    """On one batch shown over and over, with the same noise."""
    policy = new_policy()
    inner = method(policy, batches=12)
    minibatch = only(inner, data)
    inner.minibatches = lambda batch, draws: [Part(minibatch, draws.n)]
    history = tiny.run(inner, data)
    assert history[-1]["liked_reward"] > history[-1]["disliked_reward"] + 0.02
    assert history[-1]["loss"] < 0.5 == pytest.approx(history[0]["loss"])


@pytest.mark.parametrize(("silent", "heard"), [("lambda_undesirable", "liked"), ("lambda_desirable", "disliked")])
def test_a_weight_of_zero_ignores_that_half(new_policy, data, silent, heard):
    """Only the other half's images have a gradient, so their pixels alone matter to it."""
    policy = new_policy(moved=0.3)
    inner = method(policy, **{silent: 0.0})
    m = only(inner, data)
    m.x_0.requires_grad_()
    inner.loss(m)[0].backward()
    pulled = m.x_0.grad.flatten(1).abs().amax(1) > 0
    assert pulled.tolist() == [heard == "liked"] * 4 + [heard == "disliked"] * 4


def test_it_learns_from_single_images_unequal_in_number(new_policy, data):
    """Three liked images and one disliked one, not of one pair: lambda weighs each."""
    policy = new_policy(moved=0.2)
    pairs = data.pair_batch(range(4))
    liked = torch.tensor([True, True, False, True])
    inner = method(policy, batch_size=4, lambda_desirable=1, lambda_undesirable=3)
    batch = ImageBatch(pairs.prompts, pairs.cond, pairs.latents_0, liked)
    (m,) = tiny.minibatches(inner, batch)
    error, reference = policy_and_reference_error(policy, m)
    reward = (50 * (reference - error)).detach()
    gain = reward - reward.mean().clamp(min=0)
    expected = sum(
        (1 if like else 3) * (1 - torch.sigmoid(g if like else -g)) for g, like in zip(gain, liked, strict=True)
    )
    loss, metrics = inner.loss(m)
    assert loss.item() == pytest.approx(expected.item() / 4, rel=1e-6)
    assert metrics["disliked_reward"].item() == pytest.approx(reward[2].item())
    (none,) = tiny.minibatches(inner, replace(batch, liked=torch.ones(4, dtype=torch.bool)))
    assert inner.loss(none)[1]["disliked_reward"] == 0


class Heard:
    """Gives a part of a minibatch what all parts together are."""

    sharded_weights = False

    def __init__(self, whole):
        self.whole = iter(whole)

    def gather(self, rows):
        return next(self.whole)


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_single_images_may_be_shared_by_processes_though_one_has_liked_ones_alone(new_policy, data, cut):
    """Of images liked, liked, not, liked, not: losses and metrics of two parts, by their rows, are those of all."""
    policy, pairs = new_policy(moved=0.3), data.pair_batch(range(5))
    batch = ImageBatch(pairs.prompts, pairs.cond, pairs.latents_0, torch.tensor([True, True, False, True, False]))
    inner = method(policy)
    (minibatch,) = tiny.minibatches(inner, batch)
    shard, heard = policy.shard, []
    policy.shard = SimpleNamespace(gather=lambda rows: heard.append(rows) or rows, sharded_weights=False)
    loss, metrics = inner.loss(minibatch)
    found = []
    for rows in (slice(cut), slice(cut, 5)):
        policy.shard = Heard(heard)
        part = {name: getattr(minibatch, name)[rows] for name in ("x_0", "t", "noise", "cond", "liked")}
        found.append((len(part["t"]) / 5, *inner.loss(NoisedBatch(**part))))
    policy.shard = shard
    assert sum(share * part.item() for share, part, _ in found) == pytest.approx(loss.item(), rel=1e-4)
    for name, value in metrics.items():
        assert sum(share * float(part[name]) for share, _, part in found) == pytest.approx(float(value), rel=1e-3), name
    rewards = [metrics[name].item() for name in ("liked_reward", "disliked_reward")]
    assert (3 * rewards[0] + 2 * rewards[1]) / 5 == pytest.approx(heard[0].mean().item(), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", [True, False])
def test_a_batch_of_one_kind_has_a_finite_loss_and_no_reward_of_the_other(new_policy, data, kind):
    policy, pairs = new_policy(moved=0.3), data.pair_batch(range(3))
    inner = method(policy)
    batch = ImageBatch(pairs.prompts, pairs.cond, pairs.latents_0, torch.full((3,), kind))
    loss, metrics = inner.loss(tiny.minibatches(inner, batch)[0])
    assert math.isfinite(loss)
    assert metrics["disliked_reward" if kind else "liked_reward"] == 0
    assert metrics["liked_reward" if kind else "disliked_reward"] != 0
