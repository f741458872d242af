"""Diffusion-DPO against the authors' code: cases 11 (loss) and 12 (training step, full fine-tune)."""

import pytest
import torch
from golden.pipelines import Beside, Recorded, conditioning, own
from golden.reading import tensors

from attune.diffusion import process
from attune.diffusion.losses import denoising_error, preference_loss
from attune.diffusion.noised import NoisedBatch
from attune.methods import dpo

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("beta", [5000, 2000])
def test_loss_and_its_gradient(table, beta):
    case, name = tensors("11_dpo_loss"), f"11 beta {beta}"
    predicted = case["model_pred"].clone().requires_grad_()
    errors = [denoising_error(p, case["target"]) for p in (predicted, case["ref_pred"])]
    chosen, rejected = dpo.implicit_reward(*errors, beta).chunk(2)
    loss = preference_loss(chosen - rejected).mean()
    loss.backward()
    table.close("11", "errors, policy", errors[0], case["model_losses"])
    table.close("11", "errors, reference", errors[1], case["ref_losses"])
    table.close(name, "margin", chosen - rejected, case[f"beta{beta}.inside_term"])
    table.close(name, "loss", loss, case[f"beta{beta}.loss"])
    table.close(name, "gradient", predicted.grad, case[f"beta{beta}.grad_model_pred"])
    table.exact(name, "accuracy", (chosen > rejected).float().mean(), case[f"beta{beta}.implicit_acc"])


def test_supervised_loss(table):
    case = tensors("11_dpo_loss")
    chosen = case["model_pred"][:6], case["target"][:6]
    table.close("11", "sft loss", denoising_error(*chosen).mean(), case["sft_loss"])


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_training_step(table, request, model):
    case, name = tensors(f"12_dpo_step_{model}"), f"12 {model}"
    backbone = own(request.getfixturevalue(model))
    backbone.resolution = 1024  # the authors always say so, whatever the picture's size
    x_0 = backbone.vae.config.scaling_factor * case["posterior_samples_wl"]
    noise, t = case["noise"].repeat(2, 1, 1, 1), case["timesteps"].repeat(2)
    x_t = process.add_noise(x_0, noise, backbone.path.level(t, x_0))
    table.close(name, "x_t", x_t, case["noisy_latents"])

    cond = conditioning(case).repeat(2)
    policy = Beside(backbone, Recorded(x_t, t, cond, case["ref_pred"]))
    policy.denoiser.requires_grad_(True)
    table.close(name, "epsilon, policy", policy.predict(x_t, t, cond), case["model_pred"])
    config = dpo.Config(lora=None, lr=1e-8, batches=1, batch_size=3, beta=5000)
    loss, metrics = dpo.Method(config, policy).loss(NoisedBatch(x_0, t, noise, cond))
    loss.backward()
    # beta = 5000 turns errors of 1e-7 into errors of 1e-3
    table.close(name, "loss", loss, case["loss"], absolute=5e-3)
    table.close(name, "mean margin", metrics["margin"], case["inside_term"].mean(), absolute=5e-3)
    table.exact(name, "accuracy", metrics["accuracy"], case["implicit_acc"])
    gradients = {key: weight.grad for key, weight in policy.denoiser.named_parameters()}
    check_gradients(table, name, gradients, case)


def check_gradients(table, name, gradients, case):
    """Norms of every weight's gradient, in the order of their names, and whole gradients where they are stored."""
    norms = torch.stack([gradients[key].norm() for key in sorted(gradients)])
    for norm, expected in zip(norms, case["grad_norms"], strict=True):
        table.close(name, "gradient norms", norm, expected, rel=2e-3)
    stored = [key.removeprefix("grad.") for key in case if key.startswith("grad.")]
    assert len(stored) > 5
    for key in stored:
        table.close(name, "gradients", gradients[key], case[f"grad.{key}"], rel=2e-3)
    total = torch.linalg.vector_norm(norms)
    table.close(name, "gradient norm, total", total, case["grad_norm_total"], rel=2e-3)
