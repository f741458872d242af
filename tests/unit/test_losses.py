"""Losses that several methods share."""

import math

import pytest
import torch

from attune.diffusion.losses import denoising_error, preference_loss


def test_denoising_error_by_hand():
    """Row 0: (1 + 4 + 9 + 16) / 4 = 7.5; row 1 is perfect."""
    predicted = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0]]).reshape(2, 1, 2, 2)
    noise = torch.tensor([[0.0] * 4, [5.0] * 4]).reshape(2, 1, 2, 2)
    assert denoising_error(predicted, noise).tolist() == [7.5, 0.0]


def test_denoising_error_of_half_precision_is_computed_in_float32():
    """In float16 the square of 300 would overflow."""
    error = denoising_error(torch.full((1, 4, 8, 8), 300.0).half(), torch.zeros(1, 4, 8, 8).half())
    assert error.dtype == torch.float32
    assert error.item() == 90_000


def test_preference_loss_by_hand():
    """logit 0: ln 2; logit ln 3: sigmoid = 3/4, so ln(4/3); logit -ln 3: ln 4."""
    loss = preference_loss(torch.tensor([0.0, math.log(3), -math.log(3)]))
    assert loss.tolist() == pytest.approx([math.log(2), math.log(4 / 3), math.log(4)])


def test_preference_loss_of_extreme_logits_is_finite():
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = preference_loss(logits)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1e4]
    assert logits.grad.tolist() == [0.0, -1.0]


def test_a_tie_pulls_with_half_strength():
    logit = torch.zeros((), requires_grad=True)
    preference_loss(logit).backward()
    assert logit.grad == -0.5
