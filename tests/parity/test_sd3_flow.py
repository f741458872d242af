"""A whole flow model, Stable Diffusion 3.5: cases 24e (diffusers' pipeline) and 24f (Flow-GRPO's DPO step)."""

import pytest
from golden.pipelines import own
from golden.reading import HERE, tensors

from attune.backbones import sd3 as sd3_backbone
from attune.diffusion.ddim import sample
from attune.diffusion.noised import NoisedBatch, policy_and_reference_error
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning
from attune.methods import dpo

pytestmark = pytest.mark.parity
PROMPTS = ["a red fox near the lake", "an old wooden house in the snow, painting"]


def test_from_text_to_image(table, sd3):
    """Both CLIPs, 256 tokens of zeros for the T5, six steps with guidance, latents with scale and shift."""
    case = tensors("24e_sd3_pipeline")
    cond, uncond = sd3.encode_prompts(PROMPTS), sd3.encode_prompts([""])
    for kind, found in (("", cond), ("negative_", uncond[[0, 0]])):
        embeds, expected = found.tensors["prompt_embeds"], case[f"text.{kind or 'prompt_'}embeds_first_77"]
        table.close("24e", "text", embeds, expected[..., : embeds.shape[-1]], rel=2e-5)
        assert not expected[..., embeds.shape[-1] :].any()
        table.close("24e", "pooled text", found.tensors["text_embeds"], case[f"text.{kind}pooled"], rel=2e-5)
    latents = sample(Policy(sd3, uncond), cond, lambda shape: case["latents_init"], 6, 0.0, 4.5)
    table.close("24e", "latents after 6 steps", latents, case["from_text_g4.5.latents_final"], rel=2e-5)
    image = sd3.decode_latents(latents).clamp(0, 1)
    table.close("24e", "image", image, case["from_text_g4.5.image"], rel=2e-5)


def test_an_image_as_latents(table, sd3):
    case = tensors("24e_sd3_pipeline")
    latents = sd3.encode_images(case["encode.pixels"] / 2 + 0.5)
    table.close("24e", "latents of an image", latents, case["encode.mode_scaled"], rel=2e-5)


def test_a_dpo_step(table, sd3, monkeypatch):
    """LoRA of rank 4 and alpha 8: read with B doubled, so that its gradient is half of theirs. No tokens of zeros."""
    monkeypatch.setattr(sd3_backbone, "T5_TOKENS", 0)
    case, name = tensors("24f_flow_dpo_step_sd3"), "24f"
    cond = Conditioning({"prompt_embeds": case["prompt_embeds"], "text_embeds": case["pooled_prompt_embeds"]})
    policy = Policy(own(sd3), cond[:1])
    policy.load(HERE / "24f_lora_sd3.safetensors")
    minibatch = NoisedBatch(case["latents"], case["timesteps"], case["noise"], cond)
    predicted = policy.predict(case["noisy_latents"], case["timesteps"], cond)
    table.close(name, "velocity, policy", predicted, case["model_pred"], rel=2e-5)
    with policy.reference():
        of_reference = policy.predict(case["noisy_latents"], case["timesteps"], cond)
    table.close(name, "velocity, reference", of_reference, case["ref_pred"], rel=2e-5)
    for error, key in zip(policy_and_reference_error(policy, minibatch), ("theta_mse", "ref_mse"), strict=True):
        table.close(name, "errors", error, case[key], rel=2e-5)
    loss, metrics = dpo.Method(dpo.Config(beta=100.0, lora={"rank": 4}, batches=1, batch_size=3), policy).loss(
        minibatch
    )
    table.close(name, "mean margin", metrics["margin"], case["inside_term"].mean(), rel=1e-4)
    table.close(name, "loss", loss, case["loss"], rel=2e-5)
    loss.backward()
    gradients = {
        key.replace(".default", ""): w.grad for key, w in policy.denoiser.named_parameters() if w.requires_grad
    }
    assert {f"grad.{key}" for key in gradients} == {key for key in case if key.startswith("grad.")}
    largest = max(case[f"grad.{key}"].abs().max() for key in gradients)
    for key, gradient in gradients.items():
        expected = case[f"grad.{key}"] / (2 if ".lora_B." in key else 1)
        if expected.abs().max() < 1e-6 * largest:  # of the last block's text queries, whose output is thrown away
            assert "1.attn.add_q_proj" in key
            assert gradient is None or gradient.abs().max() < 1e-6 * largest
        else:
            table.close(name, "gradients", gradient, expected, rel=1e-4)
