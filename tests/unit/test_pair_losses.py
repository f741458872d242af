"""Losses of the methods on pairs that have a number of their own: Poly-DPO's and Linear-DPO's."""

import math

import pytest
import torch

import tiny
from attune.config.plugins import plugin_config
from attune.config.schema import ConfigError
from attune.diffusion.losses import expected_loss, linear_loss, poly_loss, preference_loss
from attune.diffusion.noised import policy_error
from attune.distributed import Part
from attune.methods import dpo

BLOCK = tiny.PLAIN | {"lora": None, "caption_dropout": 0, "lr": 1e-3, "batches": 2, "batch_size": 4, "beta": 100}


def first(policy, data, rows=range(4), **options):
    """Loss and metrics of the first batch."""
    method = dpo.Method(dpo.Config(**(BLOCK | options)), policy)
    (minibatch,) = tiny.minibatches(method, data.pair_batch(rows))
    return method.loss(minibatch)


def gradient(loss, margin):
    return torch.autograd.grad(loss(margin).sum(), margin)[0]


# ---------------------------------------------------------------- Poly-DPO


@pytest.mark.parametrize("alpha", [8.0, -0.5])
def test_poly_pulls_by_one_and_alpha_p_more_than_sigmoid(alpha):
    margin = torch.tensor([-3.0, -0.5, 0.0, 1.0, 4.0], dtype=torch.float64, requires_grad=True)
    found = gradient(lambda m: poly_loss(m, alpha), margin) / gradient(preference_loss, margin)
    torch.testing.assert_close(found, 1 + alpha * margin.detach().sigmoid(), rtol=1e-12, atol=0)


def test_poly_of_alpha_0_is_sigmoid_bit_for_bit(new_policy, data):
    ends = []
    for options in ({}, {"loss": "poly", "alpha": 0.0}):
        policy = new_policy(moved=0.3)
        loss, metrics = first(policy, data, label_smoothing=0.1, **options)
        loss.backward()
        ends.append([loss, *metrics.values(), *(weight.grad for weight in policy.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_poly_starts_at_ln_2_and_half_alpha(policy, data, smoothing):
    loss, _ = first(policy, data, loss="poly", alpha=8.0, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(math.log(2) + 4, abs=1e-6)


def test_poly_is_expected_over_a_label_that_may_be_wrong(new_policy, data):
    """One pair, so that the mean margin is the margin."""
    loss, metrics = first(new_policy(moved=0.3), data, [0], loss="poly", alpha=8.0, label_smoothing=0.2)
    margin = metrics["margin"].item()
    assert abs(margin) > 0.1
    p = 1 / (1 + math.exp(-margin))
    by_hand = 0.8 * (-math.log(p) + 8 * (1 - p)) + 0.2 * (-math.log(1 - p) + 8 * p)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_poly_of_extreme_margins_is_finite():
    margin = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = expected_loss(lambda m: poly_loss(m, 8.0), margin, torch.ones(2))
    assert loss.tolist() == [0.0, 1e4 + 8]
    assert gradient(lambda m: poly_loss(m, 8.0), margin).tolist() == [0.0, -1.0]


# ---------------------------------------------------------------- Linear-DPO


def test_linear_by_hand():
    """w = 0.5 - 0.4 m: 0.5, 0.3, 0.7 and, held, 0.1 and 0.9; the gap of errors is 2, and w has no gradient."""
    margin = torch.tensor([0.0, 0.5, -0.5, 9.0, -9.0], requires_grad=True)
    gap = torch.full((5,), 2.0, requires_grad=True)
    loss = linear_loss(margin, gap, 0.1)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1.0, 0.6, 1.4, 0.2, 1.8])
    assert gap.grad.tolist() == pytest.approx([0.5, 0.3, 0.7, 0.1, 0.9])
    assert margin.grad is None


def test_linear_starts_at_half_the_gap_of_errors(policy, data):
    options = {"loss": "linear", "eta": 0.001}
    method = dpo.Method(dpo.Config(**(BLOCK | options)), policy)
    (minibatch,) = tiny.minibatches(method, data.pair_batch(range(4)))
    chosen, rejected = policy_error(policy, minibatch).chunk(2)
    assert method.loss(minibatch)[0].item() == pytest.approx((chosen - rejected).mean().item() / 2, abs=1e-6)


def test_linear_is_expected_over_a_label_that_may_be_wrong(new_policy, data):
    """With the images exchanged the margin and the gap turn, and the weight w becomes 1 - w: (0.8 + w - 1) gap."""
    options = {"loss": "linear", "eta": 0.0, "beta": 10}
    loss, metrics = first(new_policy(moved=0.3), data, [0], label_smoothing=0.2, **options)
    w = 0.5 - 0.4 * metrics["margin"].item()
    assert 0.01 < abs(w - 0.5) < 0.5
    gap = first(new_policy(moved=0.3), data, [0], **options)[0].item() / w
    assert loss.item() == pytest.approx((w - 0.2) * gap, rel=1e-4)


def test_linear_widens_the_margin(new_policy, data):
    """On one batch shown over and over, with the same noise; held at 0, pairs that are far right have no gradient."""
    method = dpo.Method(dpo.Config(**(BLOCK | {"loss": "linear", "eta": 0.0, "batches": 12})), new_policy())
    minibatch = tiny.minibatches(method, data.pair_batch(range(4)))[0]
    method.minibatches = lambda batch, draws: [Part(minibatch, draws.n)]
    history = tiny.run(method, data)
    assert history[-1]["margin"] > 0.02 > history[0]["margin"] == 0


# ---------------------------------------------------------------- the anchor


@pytest.mark.parametrize("options", [{}, {"loss": "linear", "eta": 0.001}, {"safeguard": 0.9}], ids=str)
def test_the_anchor_adds_the_chosen_images_error_and_its_gradient(new_policy, data, options):
    """Exactly the loss and gradient of supervised fine-tuning on the chosen half, 30 times."""
    policy, ends = new_policy(moved=0.3), []
    for weight in (0.0, 30.0):
        method = dpo.Method(dpo.Config(**(BLOCK | options | {"sft_weight": weight})), policy)
        (minibatch,) = tiny.minibatches(method, data.pair_batch(range(4)))
        loss, metrics = method.loss(minibatch)
        ends.append((loss.item(), torch.autograd.grad(loss, policy.parameters())))
    chosen = policy_error(policy, minibatch)[:4].mean()
    assert metrics["chosen_error"].item() == pytest.approx(chosen.item())
    assert ends[1][0] - ends[0][0] == pytest.approx(30 * chosen.item(), rel=1e-5)
    for plain, anchored, own in zip(
        ends[0][1], ends[1][1], torch.autograd.grad(chosen, policy.parameters()), strict=True
    ):
        torch.testing.assert_close(anchored - plain, 30 * own, rtol=1e-3, atol=1e-4 * anchored.abs().max().item())


def test_without_an_anchor_its_error_is_not_logged(policy, data):
    assert "chosen_error" not in first(policy, data)[1]


# ---------------------------------------------------------------- settings

WRONG = {
    "loss: poly needs alpha": {"loss": "poly"},
    "alpha belongs to loss: poly, and loss is sigmoid": {"alpha": 8},
    "alpha belongs to loss: poly, and loss is ipo": {"alpha": 0, "loss": "ipo"},
    "loss: linear needs eta": {"loss": "linear"},
    "eta belongs to loss: linear, and loss is poly": {"eta": 0.0, "loss": "poly", "alpha": 1},
    "less than or equal to 0.5": {"loss": "linear", "eta": 0.6},
    "greater than or equal to -1": {"loss": "poly", "alpha": -1.5},
}


@pytest.mark.parametrize("said", WRONG)
def test_a_number_without_its_loss_or_a_loss_without_its_number_is_refused(said):
    with pytest.raises(ConfigError, match=f"^here.*{said}"):
        plugin_config("methods", "dpo", BLOCK | WRONG[said], "here")
