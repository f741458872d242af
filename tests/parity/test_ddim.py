"""DDIM and its transition density: cases 1 and 2 (SPO), 17 (DDPO, the sampler's part)."""

import pytest
import torch
from golden.pipelines import Recorded, write_pipeline
from golden.reading import tensors

from attune.backbones import sd as sd_backbone
from attune.config.settings import Model
from attune.diffusion import process
from attune.diffusion.path import VP
from attune.interfaces import Conditioning

pytestmark = pytest.mark.parity
ETA = {"eps": 1.0, "v": 1.0, "eps_eta05": 0.5}
PATH = VP(tensors("01_ddim_log_prob")["alphas_cumprod"])


@pytest.fixture(scope="module")
def v_prediction(tmp_path_factory):
    """The backbone of a folder whose scheduler says that the network predicts velocities."""
    folder = write_pipeline(tmp_path_factory.mktemp("v"), "tiny_sd", prediction_type="v_prediction")
    return sd_backbone.load(Model(backbone="sd", path=folder), torch.device("cpu"))


def epsilon(backbone, x_t, t, output):
    """What `backbone` makes of a network's output."""
    cond = Conditioning({"prompt_embeds": torch.zeros(len(x_t), 77, 32)})
    return backbone.predict(Recorded(x_t, t, cond, output), x_t, t, cond)


def step(x_t, noise_pred, t, steps=20, eta=1.0):
    """Mean and std of our DDIM step, and x_0; a row of case 1 starts between the times of a run."""
    at = PATH.level(t, x_t)
    to = PATH.level((t - 1000 // steps).clamp(min=0), x_t)
    x_0, noise = PATH.x0_and_noise(noise_pred, x_t, at)
    return *process.ddim_step(x_0, noise, at, to, eta), x_0


def test_schedule(table, sd, sdxl):
    case = tensors("01_ddim_log_prob")
    table.exact("01", "alphas_cumprod, SD", sd.path.alphas_cumprod, case["alphas_cumprod"])
    table.exact("01", "alphas_cumprod, SDXL", sdxl.path.alphas_cumprod, case["alphas_cumprod"])
    table.exact("01", "timesteps", PATH.sampling_times(20)[:-1], torch.arange(951, 0, -50))
    visited = torch.isin(case["timesteps"], PATH.sampling_times(20))
    prev = process.time_after(PATH.sampling_times(20), case["timesteps"][visited])
    assert visited.sum() == len(visited) - 1
    table.exact("01", "previous timesteps", prev, case["eps.prev_timestep"][visited])


@pytest.mark.parametrize("variant", ETA)
def test_transition_and_its_log_probability(table, sd, v_prediction, variant):
    case = tensors("01_ddim_log_prob")
    output, t = case["model_output"].clone().requires_grad_(), case["timesteps"]
    noise_pred = epsilon(v_prediction if variant == "v" else sd, case["sample"], t, output)
    mean, std, x_0 = step(case["sample"], noise_pred, t, eta=ETA[variant])
    log_prob = process.gaussian_log_prob(case[f"{variant}.prev_sample"], mean, std)
    (gradient,) = torch.autograd.grad(log_prob.sum(), output, retain_graph=True)
    own = process.gaussian_log_prob((mean + std * case["noise"]).detach(), mean, std)
    name = f"01 {variant}"
    table.close(name, "mean", mean, case[f"{variant}.mean"])
    table.close(name, "std", std.flatten(), case[f"{variant}.std"])
    table.close(name, "log_prob", log_prob, case[f"{variant}.log_prob"])
    table.close(name, "log_prob of own noise", own, case[f"{variant}.log_prob_own_noise"])
    expected = case[f"{variant}.grad_model_output_of_sum_log_prob"]
    table.close(name, "gradient of log_prob", gradient, expected)
    if variant == "eps":
        table.close(name, "x_0", x_0, case["eps.pred_x0"])


@pytest.mark.parametrize("variant", ["eps", "v"])
def test_candidates(table, sd, v_prediction, variant):
    case, name = tensors("02_ddim_candidates"), f"02 {variant}"
    x_t, t = case["sample"], case["timesteps"]
    noise_pred = epsilon(v_prediction if variant == "v" else sd, x_t, t, case["model_output"])
    mean, std, x_0 = step(x_t, noise_pred, t)
    table.close(name, "candidates", mean + std * case["noise"], case[f"{variant}.candidates_K4"])
    table.close(name, "x_0", x_0, case[f"{variant}.pred_original_sample"])
    table.close(name, "epsilon", noise_pred, case[f"{variant}.pred_epsilon"])


def test_one_timestep_for_all_rows(table):
    case = tensors("02_ddim_candidates")
    mean, std, _ = step(case["sample"], case["model_output"], torch.tensor(451))
    assert std.numel() == 1
    table.close("02 t = 451", "candidates", mean + std * case["noise"], case["scalar_t451.candidates_K4"])


def test_fifty_steps(table):
    case = tensors("17_ddpo_ddim")
    t, x_t, x_prev = case["timesteps"], case["sample"], case["prev_sample"]
    assert set(t.tolist()) < set(PATH.sampling_times(50).tolist())
    mean, std, _ = step(x_t, case["model_output"], t, steps=50)
    table.close("17", "x_prev", mean + std * case["noise"], x_prev)
    table.close("17", "log_prob", process.gaussian_log_prob(x_prev, mean, std), case["log_prob_old"])
    mean, std, _ = step(x_t, case["model_output_new"], t, steps=50)
    table.close("17", "log_prob, moved policy", process.gaussian_log_prob(x_prev, mean, std), case["log_prob_new"])
