"""Flow matching without a model: cases 24a (Flow-GRPO's step), 24b (schedules), 24c (DPO), 24d (the general step)."""

import math

import pytest
import torch
from golden.flow_grpo import flow_grpo_step
from golden.reading import tensors

from attune.backbones._flow import sampling_sigmas, scheduler_of, size_shift
from attune.diffusion import process
from attune.diffusion.losses import denoising_error, implicit_reward, preference_loss
from attune.diffusion.path import VP, Flow, logit_normal, shifted

pytestmark = pytest.mark.parity
REL = 2e-6
FLOW = Flow(lambda steps: sampling_sigmas({"shift": 3.0}, steps), logit_normal(3.0))


def close(table, case, what, actual, expected, rel=REL):
    table.close(case, what, actual, expected, rel=rel)


@pytest.mark.parametrize(("variant", "noise_level"), [("nl07", 0.7), ("nl02", 0.2)])
def test_flow_grpos_step_is_eulers_and_a_push_along_our_noise(table, variant, noise_level):
    case, name = tensors("24a_flow_sde_step"), f"24a {variant}"
    x, output = case["sample"], case["model_output"].clone().requires_grad_()
    times = FLOW.sampling_times(10) / 1000
    table.exact("24a", "sigmas", torch.stack([times[case["step_index"]], times[case["step_index"] + 1]]), sides(case))
    second = times[1].item()
    mean, std = flow_grpo_step(FLOW, output, x, case["sigma"], case["sigma_prev"], second, noise_level)
    close(table, name, "mean", mean, case[f"{variant}.prev_sample_mean"])
    close(table, name, "std", std.flatten(), case[f"{variant}.noise_std"])
    log_prob = process.gaussian_log_prob(case["prev_sample"], mean, std)
    close(table, name, "log_prob", log_prob, case[f"{variant}.log_prob"])
    (gradient,) = torch.autograd.grad(log_prob.sum(), output)
    close(table, name, "gradient of log_prob", gradient, case[f"{variant}.grad_model_output_of_sum_log_prob"])


def sides(case):
    return torch.stack([case["sigma"], case["sigma_prev"]])


@pytest.mark.parametrize("steps", [5, 10, 28, 40, 50])
def test_sampling_times(table, steps):
    case = tensors("24b_flow_schedules")
    times = FLOW.sampling_times(steps)
    close(table, "24b", "sigmas, shift 3", times / 1000, case[f"shift3.n{steps}.sigmas"])
    close(table, "24b", "timesteps, shift 3", times[:-1], case[f"shift3.n{steps}.timesteps"])
    unshifted = sampling_sigmas({"shift": 1.0}, steps)
    close(table, "24b", "sigmas, shift 1", unshifted, case[f"shift1.n{steps}.sigmas"])


def test_tables_that_training_draws_from(table):
    """FLUX's is not shifted before an image's size is known, so its shift is ours to add."""
    case, even = tensors("24b_flow_schedules"), torch.arange(1000, 0, -1) / 1000
    close(table, "24b", "training table, shift 3", shifted(even, 3.0), case["shift3.train_table_sigmas"])
    drawn = scheduler_of({"shift": 3.0}).sigmas  # of `density: uniform`
    table.exact("24b", "table of the uniform density, shift 3", drawn, case["shift3.train_table_sigmas"])
    close(table, "24b", "training table, FLUX", even, case["flux.train_table_sigmas"])


@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096])
@pytest.mark.parametrize("steps", [10, 28])
def test_the_shift_of_flux(table, tokens, steps):
    """What training draws is shifted by as much as what sampling visits: of even sigmas both make the same."""
    case, config = tensors("24b_flow_schedules"), {"use_dynamic_shifting": True}
    mu, expected = size_shift(config, tokens), case[f"flux.tokens{tokens}.n{steps}.sigmas"]
    close(table, "24b", "mu, FLUX", torch.tensor(mu), case[f"flux.tokens{tokens}.mu"])
    close(table, "24b", "sigmas, FLUX", sampling_sigmas(config, steps, mu), expected)
    even = torch.linspace(1, 1 / steps, steps)
    close(table, "24b", "shift in training, FLUX", shifted(even, math.exp(mu)), expected[:-1])


@pytest.mark.parametrize(("beta", "rel"), [(100, 5e-5), (2000, 1e-4)])
def test_dpo_on_a_flow(table, beta, rel):
    """Flow-GRPO's script: five pairs, each under one s and one noise; errors are of velocity."""
    case, name = tensors("24c_flow_dpo_loss"), f"24c beta {beta}"
    level = FLOW.level(case["timesteps"], case["latents"])
    close(table, "24c", "x_t", process.add_noise(case["latents"], case["noise"], level), case["noisy_latents"])
    target, output = FLOW.target(case["latents"], case["noise"]), case["model_pred"].clone().requires_grad_()
    table.exact("24c", "target", target, case["target"])
    error, reference = denoising_error(output, target), denoising_error(case["ref_pred"], target)
    close(table, "24c", "errors", torch.stack([error, reference]), torch.stack([case["theta_mse"], case["ref_mse"]]))
    preferred, other = implicit_reward(error, reference, beta).chunk(2)
    loss = preference_loss(preferred - other).mean()
    loss.backward()
    close(table, name, "margin", preferred - other, case[f"flow_grpo.beta{beta}.inside_term"], rel)
    close(table, name, "loss", loss, case[f"flow_grpo.beta{beta}.loss"], rel)
    close(table, name, "gradient", output.grad, case[f"flow_grpo.beta{beta}.grad_model_pred"], rel)


@pytest.mark.parametrize("eta", ["0", "0.5", "1"])
@pytest.mark.parametrize("kind", ["flow", "vp"])
def test_the_general_step(table, kind, eta):
    """A formula, in float64. The last step of a flow has no noise, and so no density."""
    case, name = tensors("24d_general_step_f64"), f"24d {kind} eta {eta}"
    path = FLOW if kind == "flow" else VP(exact_schedule())
    x, output, x_prev = (case[key].double() for key in ("sample", "model_output", "prev_sample"))
    t, t_next = (1000 * case[f"flow.{key}"].double() for key in ("s", "s_next")) if kind == "flow" else vp_times(case)
    now, to = path.level(t, x), path.level(t_next, x)
    mean, std = process.ddim_step(*path.x0_and_noise(output, x, now), now, to, float(eta))
    close(table, name, "mean", mean, case[f"{kind}.eta{eta}.mean_f64"], 1e-12)
    close(table, name, "std", std.flatten(), case[f"{kind}.eta{eta}.std_f64"], 1e-12)
    noisy = std.flatten() > 0
    assert noisy.sum() == (0 if eta == "0" else 5 if kind == "flow" else 6)
    if noisy.any():
        density = process.gaussian_log_prob(x_prev[noisy], mean[noisy], std[noisy])
        close(table, name, "log_prob", density, case[f"{kind}.eta{eta}.log_prob_where_std_positive_f64"], 1e-12)


def exact_schedule():
    """Stable Diffusion's, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def vp_times(case):
    return case["vp.t"], case["vp.t_next"]
