"""SPIN-Diffusion: case 18, eq. 4.9 of the paper as another program computed it; the authors' code was not at hand."""

import pytest
import torch
from golden.pipelines import Beside, Recorded, conditioning, own
from golden.reading import tensors

from attune.diffusion import process
from attune.diffusion.noised import NoisedBatch
from attune.methods import spin

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("beta", [2000, 5000])
def test_training_step(table, sd, beta):
    """Real and generated images share t, but not the noise: the formula leaves that open."""
    case, name = tensors("18_spin"), f"18 beta {beta}"
    backbone, cond = own(sd), conditioning(case).repeat(2)
    x_0, noise = (torch.cat([case[f"{part}_real"], case[f"{part}_gen"]]) for part in ("latents", "noise"))
    t = case["timesteps"].repeat(2)
    x_t = process.add_noise(x_0, noise, backbone.path.level(t, x_0))
    opponent = Recorded(x_t, t, cond, torch.cat([case["eps_ref_real"], case["eps_ref_gen"]]))
    policy = Beside(backbone, opponent)
    policy.denoiser.requires_grad_(True)
    config = spin.Config(lora=None, lr=2e-5, batches=1, batch_size=4, beta=beta, steps=20, guidance_scale=7.5)
    loss, metrics = spin.Method(config, policy).loss(NoisedBatch(x_0, t, noise, cond))
    loss.backward()
    predicted = torch.cat([case["eps_theta_real"], case["eps_theta_gen"]])
    table.close(name, "epsilon, policy", policy.predict(x_t, t, cond), predicted)
    # bracket = (e - e_ref) of real images minus that of generated ones; beta turns its errors of 1e-7 into 1e-3
    table.close(name, "mean margin", metrics["margin"], -0.5 * beta * case["bracket"].mean(), absolute=5e-3)
    table.close(name, "loss", loss, case[f"loss_beta{beta}"], absolute=5e-3)
    if beta == 2000:
        gradient = policy.denoiser.conv_out.weight.grad
        table.close(name, "gradient", gradient, case["grad.conv_out.weight"], rel=2e-3)
