"""Update rules of preference losses: SDPO (case 19), Poly-DPO in float64 (20), Linear-DPO (21)."""

import pytest
import torch
from golden.reading import tensors

from attune.averages import MovingAverage
from attune.diffusion.losses import (
    denoising_error,
    descent_kept,
    implicit_reward,
    linear_loss,
    poly_loss,
    preference_loss,
    with_gradient_times,
)

pytestmark = pytest.mark.parity


def margins(case, beta):
    """The policy's prediction, which takes the gradient, its errors, and the margin of each pair."""
    predicted = case["model_pred"].clone().requires_grad_()
    errors = [denoising_error(p, case["target"]) for p in (predicted, case["ref_pred"])]
    chosen, rejected = implicit_reward(*errors, beta).chunk(2)
    return predicted, errors[0], chosen - rejected


@pytest.mark.parametrize("beta", [2000, 5000])
@pytest.mark.parametrize("alpha", [8.0, 1.0, 0.0, -0.5])
def test_poly_dpo(table, beta, alpha):
    case, key = tensors("20_poly_dpo"), f"beta{beta}.alpha{alpha:g}"
    predicted, _, margin = margins(case, beta)
    margin.retain_grad()
    losses = poly_loss(margin, alpha)
    losses.mean().backward()
    table.close("20", "loss of each pair", losses, case[f"{key}.per_pair_loss_f64"], rel=2e-4)
    table.close("20", "loss", losses.mean(), case[f"{key}.loss_f64"], rel=2e-4)
    slope = len(margin) * beta / 2 * margin.grad  # of each pair, by the difference of errors
    table.close("20", "gradient, difference of errors", slope, case[f"{key}.dloss_dmargin_f64"], rel=2e-4)
    table.close("20", "1 + alpha p", 1 + alpha * margin.sigmoid(), case[f"{key}.gradient_factor_f64"], rel=2e-4)
    if f"{key}.grad_model_pred_f64" in case:
        table.close("20", "gradient", predicted.grad, case[f"{key}.grad_model_pred_f64"], rel=2e-4)


SAFEGUARDS = ["mu0.9_beta5000", "mu0.2_beta5000", "mu0.6_beta2000", "mu0_beta2000", "mu1_beta2000"]


@pytest.mark.parametrize("key", SAFEGUARDS)
def test_sdpo(table, key):
    """Of each pair, as the authors' function gives it when it is called with one; beta 5000 amplifies rounding."""
    case, (mu, beta) = tensors("19_sdpo"), (float(part.lstrip("mubeta")) for part in key.split("_"))
    predicted = case["model_pred"].clone().requires_grad_()
    kept = descent_kept(*(predicted - case["target"]).chunk(2), mu)
    table.close("19", "lambda, authors' code", kept, case[f"{key}.code_one_pair_at_a_time.lambda"])
    table.close("19", "lambda", kept, case[f"{key}.per_pair.lambda_f64"])
    errors, reference = (denoising_error(p, case["target"]) for p in (predicted, case["ref_pred"]))
    chosen, rejected = errors.chunk(2)
    guarded = torch.cat([chosen, with_gradient_times(rejected, kept)])
    table.exact("19", "errors with and without", guarded, errors)
    better, worse = implicit_reward(guarded, reference, beta).chunk(2)
    loss = preference_loss(better - worse).mean()
    loss.backward()
    table.close("19", "margin", better - worse, beta / 2 * case[f"{key}.per_pair.margin_f64"], rel=2e-3)
    table.close("19", "loss", loss, case[f"{key}.per_pair.loss_f64"], rel=1e-4)
    if f"{key}.plain_dpo.loss" in case:
        table.close("19", "loss, authors' code", loss, case[f"{key}.plain_dpo.loss"], rel=1e-4)
    if f"{key}.per_pair.grad_model_pred_f64" in case:
        table.close("19", "gradient", predicted.grad, case[f"{key}.per_pair.grad_model_pred_f64"], rel=2e-3)


@pytest.mark.parametrize(
    ("beta", "eta", "grad"), [(100, "0.001", False), (250, "0.001", True), (500, "0", False), (500, "0.05", True)]
)
def test_linear_dpo(table, beta, eta, grad):
    """Pair 0 equals the reference, pair 1 is far right and pair 2 far wrong."""
    case, key = tensors("21_linear_dpo"), f"beta{beta}_eta{eta}.sd"
    predicted, errors, margin = margins(case, beta)
    chosen, rejected = errors.chunk(2)
    weight = linear_loss(margin, torch.ones(6), float(eta))
    table.close("21", "weight", weight, case[f"{key}.weight"])
    table.close("21", "weight, not held", 0.5 - 0.4 * margin, case[f"{key}.weight_before_clip"])
    loss = linear_loss(margin, chosen - rejected, float(eta)).mean()
    loss.backward()
    table.close("21", "loss", loss, case[f"{key}.loss"], rel=5e-5)
    assert grad == (f"{key}.grad_model_pred" in case)
    if grad:
        table.close("21", "gradient", predicted.grad, case[f"{key}.grad_model_pred"])


@pytest.mark.parametrize("decay", [0.95, 0.99, 0.995])
@pytest.mark.parametrize("warmup", [False, True])
def test_average_of_linear_dpo(table, decay, warmup):
    """Five steps of a small layer, each before the average; the authors' order for Stable Diffusion 1.5 and XL."""
    case, key = tensors("21_linear_dpo_ema"), f"sd.decay{decay}{'.warmup' if warmup else ''}"
    average = MovingAverage([case["theta.step0.w"].clone(), case["theta.step0.b"].clone()], decay, warmup)
    for step in range(1, 6):
        average.update([case[f"theta.step{step}.{name}"] for name in "wb"], step)
        for found, name in zip(average.weights, "wb", strict=True):
            table.close("21", "moving average", found, case[f"{key}.step{step}.{name}"])
