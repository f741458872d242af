"""Diffusion-DPO against the authors' code: cases 11 (loss) and 12 (training step, full fine-tune)."""

import pytest
import torch
from golden.reading import tensors
from golden.tiny_sd import Beside, Recorded, TinySD

from attune.diffusion import process
from attune.diffusion.losses import denoising_error, preference_loss
from attune.interfaces import Conditioning
from attune.methods import dpo

pytestmark = pytest.mark.parity
SCALING_FACTOR = 0.18215


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
    assert (chosen > rejected).float().mean() == case[f"beta{beta}.implicit_acc"]


def test_supervised_loss(table):
    case = tensors("11_dpo_loss")
    chosen = case["model_pred"][:6], case["target"][:6]
    table.close("11", "sft loss", denoising_error(*chosen).mean(), case["sft_loss"])


def test_training_step(table):
    case = tensors("12_dpo_step_sd")
    x_0, t = SCALING_FACTOR * case["posterior_samples_wl"], case["timesteps"].repeat(2)
    noise, prompts = case["noise"].repeat(2, 1, 1, 1), case["prompt_embeds"].repeat(2, 1, 1)
    backbone, nobody = TinySD(), torch.zeros(6)
    x_t = process.add_noise(x_0, noise, process.at(backbone.alphas_cumprod, t, x_0))
    table.close("12 sd", "x_t", x_t, case["noisy_latents"])

    class Reference(Recorded):
        def forward(self, x_t, t, encoder_hidden_states):
            assert torch.equal(encoder_hidden_states, prompts)
            return super().forward(x_t, t, nobody)

    policy = Beside(backbone, Reference(x_t, t, nobody, case["ref_pred"]), null=None)
    policy.denoiser.requires_grad_(True)
    config = dpo.Config(lr=1e-8, batches=1, batch_size=3, beta=5000)
    cond = Conditioning({"prompt_embeds": prompts})
    table.close("12 sd", "epsilon, policy", policy.predict_noise(x_t, t, cond), case["model_pred"])
    loss, metrics = dpo.Method(config, policy).loss(dpo.NoisedPairs(x_0, t, noise, cond))
    loss.backward()
    # beta = 5000 turns errors of 1e-7 into errors of 1e-3
    table.close("12 sd", "loss", loss, case["loss"], absolute=5e-3)
    table.close("12 sd", "margin", metrics["margin"], case["inside_term"].mean(), absolute=5e-3)
    assert metrics["accuracy"] == case["implicit_acc"]
    gradients = {name: weight.grad for name, weight in policy.denoiser.named_parameters()}
    norms = [name.removeprefix("grad_norm.") for name in case if name.startswith("grad_norm.")]
    assert set(norms) == set(gradients)
    for name in norms:
        table.close("12 sd", "gradient norms", gradients[name].norm(), case[f"grad_norm.{name}"], rel=2e-3)
    stored = [name.removeprefix("grad.") for name in case if name.startswith("grad.")]
    assert len(stored) == 6
    for name in stored:
        table.close("12 sd", "gradients", gradients[name], case[f"grad.{name}"], rel=2e-3)
