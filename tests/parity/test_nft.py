"""DiffusionNFT: case 25, its own lines on Stable Diffusion 3's velocities, and 25c, the formula on epsilon."""

import pytest
import torch
from golden.reading import tensors

from attune.backbones._flow import sampling_sigmas
from attune.diffusion.path import VP, Flow, logit_normal
from attune.methods.nft import divergence, nft_loss, standing

pytestmark = pytest.mark.parity
FLOW = Flow(lambda steps: sampling_sigmas({"shift": 3.0}, steps), logit_normal(3.0))


@pytest.mark.parametrize(("variant", "beta", "kl"), [("b1", 1.0, 1e-4), ("b0.1", 0.1, 1e-4), ("b1_kl0.5", 1.0, 0.5)])
def test_loss_and_gradient_on_a_flow(table, variant, beta, kl):
    case, name = tensors("25_nft_flow"), f"25 {variant}"
    v = case["v_policy"].clone().requires_grad_()
    r = standing(case["advantages"], 5.0)
    at = FLOW.level(case["timesteps"], case["x_t"])
    loss = 5 * nft_loss(FLOW, v, case["v_old"], case["x_t"], at, case["x0"], r, beta)
    divergences = divergence(v, case["v_ref"])
    total = loss.mean() + kl * divergences.mean()
    (gradient,) = torch.autograd.grad(total, v)
    table.close(name, "r", r, case[f"{variant}.r"])
    table.close(name, "divergence", divergences.mean(), case[f"{variant}.kl_mean"])
    table.close(name, "loss", total.float(), case[f"{variant}.loss"])
    table.close(name, "gradient", gradient, case[f"{variant}.grad_v_policy"])


@pytest.mark.parametrize(("variant", "beta"), [("b1", 1.0), ("b0.1", 0.1)])
def test_loss_and_gradient_on_epsilon(table, variant, beta):
    """In float64, as the formula; errors of images grow with sigma / alpha, to 11 of those of epsilon at t = 951."""
    case, name = tensors("25c_nft_eps"), f"25c {variant}"
    schedule = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    path, wide = VP((1 - schedule).cumprod(0)), {key: value.double() for key, value in case.items()}
    v, x_t = wide["eps_policy"].clone().requires_grad_(), wide["x_t"]
    r, at = standing(wide["advantages"], 5.0), path.level(case["timesteps"], x_t)
    loss = 5 * nft_loss(path, v, wide["eps_old"], x_t, at, wide["x0"], r, beta)
    total = (loss + 1e-4 * divergence(v, wide["eps_ref"])).mean()
    (gradient,) = torch.autograd.grad(total, v)
    table.close(name, "loss", total, case[f"{variant}.loss_f64"])
    table.close(name, "gradient", gradient, case[f"{variant}.grad_eps_policy_f64"])
