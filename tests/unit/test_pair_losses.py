"""Update rules of the methods on pairs: Poly-DPO's loss."""

import math

import pytest
import torch

import tiny
from attune.config.plugins import plugin_config
from attune.config.schema import ConfigError
from attune.diffusion.losses import expected_loss, poly_loss, preference_loss
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


# ---------------------------------------------------------------- settings

WRONG = {
    "loss: poly needs alpha": {"loss": "poly"},
    "alpha belongs to loss: poly, and loss is sigmoid": {"alpha": 8},
    "alpha belongs to loss: poly, and loss is ipo": {"alpha": 0, "loss": "ipo"},
    "greater than or equal to -1": {"loss": "poly", "alpha": -1.5},
}


@pytest.mark.parametrize("said", WRONG)
def test_a_number_without_its_loss_or_a_loss_without_its_number_is_refused(said):
    with pytest.raises(ConfigError, match=f"^here.*{said}"):
        plugin_config("methods", "dpo", BLOCK | WRONG[said], "here")
