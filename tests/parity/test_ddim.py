"""DDIM and its transition density against the SPO authors' code: cases 1 (log_prob) and 2 (candidates)."""

import pytest
import torch
from golden.reading import tensors
from golden.tiny_sd import ALPHAS_CUMPROD

from attune.diffusion import process

pytestmark = pytest.mark.parity
ETA = {"eps": 1.0, "v": 1.0, "eps_eta05": 0.5}


def step(case, variant, model_output, t, eta):
    """Mean and std of our DDIM step, and x_0, from the output of a network of either kind."""
    x_t = case["sample"]
    a_t = process.at(ALPHAS_CUMPROD, t, x_t)
    a_prev = process.at(ALPHAS_CUMPROD, process.previous_timestep(t, 1000, 20), x_t)
    noise_pred = process.velocity_to_noise(model_output, x_t, a_t) if variant == "v" else model_output
    return *process.ddim_step(x_t, noise_pred, a_t, a_prev, eta), process.predict_x0(x_t, noise_pred, a_t)


def test_schedule(table):
    case = tensors("01_ddim_log_prob")
    table.close("01", "alphas_cumprod", ALPHAS_CUMPROD, case["alphas_cumprod"])
    assert process.ddim_timesteps(1000, 20).tolist() == list(range(951, 0, -50))
    assert torch.equal(process.previous_timestep(case["timesteps"], 1000, 20), case["eps.prev_timestep"])


@pytest.mark.parametrize("variant", ETA)
def test_transition_and_its_log_probability(table, variant):
    case = tensors("01_ddim_log_prob")
    output = case["model_output"].clone().requires_grad_()
    mean, std, x_0 = step(case, variant, output, case["timesteps"], ETA[variant])
    log_prob = process.gaussian_log_prob(case[f"{variant}.prev_sample"], mean, std)
    (gradient,) = torch.autograd.grad(log_prob.sum(), output)
    own = (mean + std * case["noise"]).detach()
    name = f"01 {variant}"
    table.close(name, "mean", mean, case[f"{variant}.mean"])
    table.close(name, "std", std.flatten(), case[f"{variant}.std"])
    table.close(name, "log_prob", log_prob, case[f"{variant}.log_prob"])
    table.close(name, "gradient of log_prob", gradient, case[f"{variant}.grad_model_output_of_sum_log_prob"])
    own_log_prob = process.gaussian_log_prob(own, mean, std)
    table.close(name, "log_prob of own noise", own_log_prob, case[f"{variant}.log_prob_own_noise"])
    if variant == "eps":
        table.close(name, "x_0", x_0, case["eps.pred_x0"])


@pytest.mark.parametrize("variant", ["eps", "v", "scalar_t451"])
def test_candidates(table, variant):
    case = tensors("02_ddim_candidates")
    t = torch.tensor(451).expand(6) if variant == "scalar_t451" else case["timesteps"]
    mean, std, x_0 = step(case, variant, case["model_output"], t, 1.0)
    table.close(f"02 {variant}", "candidates", mean + std * case["noise"], case[f"{variant}.candidates_K4"])
    if variant != "scalar_t451":
        table.close(f"02 {variant}", "x_0", x_0, case[f"{variant}.pred_original_sample"])
        a_t = process.at(ALPHAS_CUMPROD, t, x_0)
        noise_pred = (case["sample"] - a_t.sqrt() * x_0) / (1 - a_t).sqrt()
        # undoing predict_x0 divides by sqrt(1 - a_t), 0.03 at t = 1: a looser bound
        table.close(f"02 {variant}", "epsilon", noise_pred, case[f"{variant}.pred_epsilon"], rel=1e-4)
