"""SDPO's safeguard: how much of the rejected image's gradient is kept, and what that is good for."""

import pytest
import torch

import tiny
from attune.diffusion.losses import (
    denoising_error,
    descent_kept,
    implicit_reward,
    preference_loss,
    with_gradient_times,
)
from attune.methods import dpo

BLOCK = tiny.PLAIN | {"lora": None, "caption_dropout": 0, "lr": 1e-3, "batches": 2, "batch_size": 4, "beta": 500}


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("mu", "kept"), [(0.9, 0.1), (0.6, 0.4), (0.0, 1.0), (1.0, 0.0)])
def test_of_two_equal_images_one_minus_mu_is_kept(mu, kept):
    residual = noise(0, 3, 4, 8, 8)
    assert descent_kept(residual, residual, mu).tolist() == pytest.approx([kept] * 3, abs=1e-7)


def test_by_hand():
    """r_w = (1, 2): r_l = (3, 1) has <r_w, r_l> = 5 = |r_w|^2; (2, 4) has 10; (2, -1) and (-1, -2) do not agree."""
    chosen = torch.tensor([1.0, 2.0]).expand(5, 2)
    rejected = torch.tensor([[3.0, 1.0], [2.0, 4.0], [2.0, -1.0], [-1.0, -2.0], [0.0, 0.0]])
    assert descent_kept(chosen, rejected, 0.2).tolist() == pytest.approx([0.8, 0.4, 1, 1, 1])
    assert descent_kept(chosen, rejected, 0.0).tolist() == pytest.approx([1, 0.5, 1, 1, 1])
    assert descent_kept(torch.zeros(5, 2), rejected, 0.9).tolist() == [1] * 5


def test_it_has_no_scale():
    """Residuals of a fine model are small; the authors' 1e-9 in the denominator would count beside them."""
    chosen, rejected = noise(0, 8, 4, 8, 8), noise(0, 8, 4, 8, 8) + noise(1, 8, 4, 8, 8)
    expected = descent_kept(chosen, rejected, 0.5)
    torch.testing.assert_close(descent_kept(1e-6 * chosen, 1e-6 * rejected, 0.5), expected)


def test_residuals_of_half_precision_are_multiplied_in_float32():
    """In float16 the square of 300 would overflow."""
    chosen = torch.full((1, 4, 8, 8), 300.0).half()
    assert descent_kept(chosen, 2 * chosen, 0.5).tolist() == [0.25]


def step(mu, rejected_target):
    """How the chosen error changes by a small step of DPO on the one bias that predicts both images."""
    bias = torch.zeros(1, 8, requires_grad=True)
    targets = torch.stack([torch.ones(8), rejected_target])
    reference = denoising_error(torch.zeros(2, 8), targets)

    def errors():
        return denoising_error(bias.expand(2, 8), targets)

    error = errors()
    if mu is not None:
        kept = descent_kept(*(bias - targets).chunk(2), mu)
        error = torch.cat([error[:1], with_gradient_times(error[1:], kept)])
    chosen, rejected = implicit_reward(error, reference, 10.0).chunk(2)
    preference_loss(chosen - rejected).mean().backward()
    before = error[0].item()
    bias.data -= 1e-3 * bias.grad
    return errors()[0].item() - before


@pytest.mark.parametrize("seed", range(5))
def test_a_small_step_never_raises_the_chosen_error_and_does_without_it(seed):
    """Both predictions have one Jacobian, the rejected residual is three times the chosen one and noise."""
    rejected_target = 3 + noise(seed, 8)
    assert step(None, rejected_target) > 1e-4
    descent = step(None, torch.zeros(8))  # of the chosen image alone: the rejected one is predicted without error
    for mu in (0.0, 0.2, 0.9, 1.0):
        assert step(mu, rejected_target) == pytest.approx(mu * descent, abs=2e-5)


def found(policy, data, rows, **options):
    """Loss, metrics and the flat gradient of these pairs, each with noise and time of its own number."""
    method = dpo.Method(dpo.Config(**(BLOCK | options)), policy)
    (minibatch,) = tiny.minibatches(method, data.pair_batch(rows))
    loss, metrics = method.loss(minibatch)
    gradient = torch.autograd.grad(loss, policy.parameters())
    return loss, metrics, torch.cat([part.flatten() for part in gradient])


@pytest.mark.parametrize("options", [{}, {"loss": "poly", "alpha": 8.0, "label_smoothing": 0.2}], ids=["dpo", "poly"])
def test_values_are_the_same_with_and_without_and_gradients_are_not(new_policy, data, options):
    policy = new_policy(moved=0.3)
    loss, metrics, gradient = found(policy, data, range(4), **options)
    guarded, more, other = found(policy, data, range(4), safeguard=0.5, **options)
    assert torch.equal(loss, guarded)
    assert {name: more[name] for name in metrics} == metrics
    assert set(more) - set(metrics) == {"safeguard", "safeguarded"}
    assert 0 < more["safeguard"] < 1
    assert 0 < more["safeguarded"] <= 1
    assert (gradient - other).norm() > 0.1 * gradient.norm()


def test_it_is_of_each_pair_so_that_batches_can_be_cut_anywhere(new_policy, data):
    """The gradient of four pairs is the mean of those of their halves; the authors' single lambda would differ."""
    policy = new_policy(moved=0.3)
    method = dpo.Method(dpo.Config(**(BLOCK | {"safeguard": 0.9})), policy)
    (whole,) = tiny.minibatches(method, data.pair_batch(range(4)))
    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        chosen, rejected = whole.x_0.chunk(2)
        t, noised = whole.t[:4][half], whole.noise[:4][half]
        parts.append(whole.pairs(chosen[half], rejected[half], t, noised, whole.cond[:4][half]))
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(method.loss(m)[0], policy.parameters())])
        for m in (whole, *parts)
    ]
    torch.testing.assert_close(gradients[0], (gradients[1] + gradients[2]) / 2, rtol=1e-3, atol=1e-6)
