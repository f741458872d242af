"""Update rules of preference losses: Poly-DPO (case 20), from its formula in float64."""

import pytest
from golden.reading import tensors

from attune.diffusion.losses import denoising_error, implicit_reward, poly_loss

pytestmark = pytest.mark.parity


def margins(case, beta):
    """The policy's prediction, which takes the gradient, and the margin of each pair."""
    predicted = case["model_pred"].clone().requires_grad_()
    errors = [denoising_error(p, case["target"]) for p in (predicted, case["ref_pred"])]
    chosen, rejected = implicit_reward(*errors, beta).chunk(2)
    return predicted, chosen - rejected


@pytest.mark.parametrize("beta", [2000, 5000])
@pytest.mark.parametrize("alpha", [8.0, 1.0, 0.0, -0.5])
def test_poly_dpo(table, beta, alpha):
    case, key = tensors("20_poly_dpo"), f"beta{beta}.alpha{alpha:g}"
    predicted, margin = margins(case, beta)
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
