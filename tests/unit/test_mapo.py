"""MaPO: the score and the loss by hand, and that no reference is asked."""

import math

import pytest
import torch

import tiny
from attune.distributed import Part
from attune.methods import mapo
from attune.methods.mapo import mapo_loss, score

BLOCK = tiny.PLAIN | {"lora": None, "caption_dropout": 0, "lr": 1e-3, "batches": 2, "batch_size": 4}


def only(method, data, rows=range(4)):
    """The one minibatch of a batch."""
    (minibatch,) = tiny.minibatches(method, data.pair_batch(rows))
    return minibatch


def test_score_by_hand():
    """x = snr e = ln 2: ln 2 / (2 - 1) = ln 2; x = ln 3: ln 3 / 2."""
    errors = torch.tensor([2 * math.log(2), 2 * math.log(3)])
    assert score(errors, 0.5).tolist() == pytest.approx([math.log(2), math.log(3) / 2])


def test_score_of_small_and_of_great_errors():
    """x / (exp(x) - 1) = 1 - x / 2 + x^2 / 12 - ...; at x = 500, where exp(x) is infinite, it and its slope are 0."""
    errors = torch.tensor([1e-3, 1000.0], requires_grad=True)
    values = score(errors, 0.5)
    values.sum().backward()
    assert values.tolist() == pytest.approx([1 - 2.5e-4, 0.0], abs=1e-6)
    assert errors.grad.tolist() == pytest.approx([-0.25, 0.0], abs=1e-3)


def test_mapo_loss_by_hand():
    """beta 2: 0.1 + 2 ln 2 at no margin; 0.2 + 2 ln 4/3 at ln 3."""
    loss = mapo_loss(torch.tensor([0.1, 0.2]), torch.tensor([0.0, math.log(3)]), beta=2.0)
    assert loss.tolist() == pytest.approx([0.1 + 2 * math.log(2), 0.2 + 2 * math.log(4 / 3)])


def test_the_loss_is_that_of_the_errors_of_one_pair(policy, data):
    """Of 1,000 timesteps, so the margin is 1000 (phi_chosen - phi_rejected); it starts at no fixed value."""
    inner = mapo.Method(mapo.Config(**BLOCK), policy)
    loss, metrics = inner.loss(only(inner, data, [0]))
    chosen, rejected = metrics["chosen_error"].detach(), metrics["rejected_error"].detach()
    margin = 1000 * (score(chosen, 0.5) - score(rejected, 0.5))
    assert abs(margin) > 0.1
    assert metrics["margin"].item() == pytest.approx(margin.item())
    assert metrics["accuracy"] == float(margin > 0) == float(chosen < rejected)
    assert loss.item() == pytest.approx((chosen + 0.1 * math.log1p(math.exp(-margin))).item(), rel=1e-5)


def test_equal_images_leave_the_denoising_loss_and_beta_ln_2(policy, data):
    """The same picture twice: the margin is exactly 0."""
    inner = mapo.Method(mapo.Config(**(BLOCK | {"beta": 3})), policy)
    same = data.with_pairs(data.pairs.assign(image_1=data.pairs.image_0))
    loss, metrics = inner.loss(only(inner, same))
    assert metrics["margin"] == 0
    assert loss.item() == pytest.approx(metrics["chosen_error"].item() + 3 * math.log(2), rel=1e-6)


def test_one_forward_and_no_reference(policy, data, monkeypatch):
    """Half of what DPO computes."""
    inner, calls = mapo.Method(mapo.Config(**BLOCK), policy), []
    policy.denoiser.register_forward_hook(lambda _, args, out: calls.append(len(args[0])))

    def no_reference():
        raise AssertionError("MaPO has no reference")

    monkeypatch.setattr(policy, "reference", no_reference)
    inner.loss(only(inner, data))
    assert calls == [8]


def test_both_images_of_a_pair_share_timestep_noise_and_prompt(policy, data):
    inner = mapo.Method(mapo.Config(**(BLOCK | {"caption_dropout": 0.5})), policy)
    m = only(inner, data)
    assert torch.equal(m.t[:4], m.t[4:])
    assert torch.equal(m.noise[:4], m.noise[4:])
    (states,) = m.cond.tensors.values()
    assert torch.equal(states[:4], states[4:])
    assert not torch.equal(m.x_0[:4], m.x_0[4:])


def test_it_widens_the_margin(new_policy, data):
    """On one batch shown over and over, with the same noise."""
    policy = new_policy()
    inner = mapo.Method(mapo.Config(**(BLOCK | {"batches": 12, "beta": 1})), policy)
    minibatch = only(inner, data)
    inner.minibatches = lambda batch, draws: [Part(minibatch, draws.n)]
    history = tiny.run(inner, data)
    assert history[-1]["margin"] > history[0]["margin"] + 0.1
    assert history[-1]["loss"] < history[0]["loss"]
