"""A guided step of a whole flow model with an adapter: case 24g, Flow-GRPO's. Its loss is no method of this project."""

import pytest
import torch
from golden.flow_grpo import flow_grpo_step
from golden.pipelines import own
from golden.reading import HERE, tensors

from attune.backbones import sd3 as sd3_backbone
from attune.diffusion import process
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning

pytestmark = pytest.mark.parity


@torch.no_grad()
def test_a_guided_step_with_an_adapter(table, sd3, monkeypatch):
    """Guidance 4.5, LoRA of rank 4 and alpha 8, noise level 0.7; the last row's step ends at the image."""
    monkeypatch.setattr(sd3_backbone, "T5_TOKENS", 0)
    case, name = tensors("24g_flow_grpo_step_sd3"), "24g"
    cond, uncond = (
        Conditioning(
            {"prompt_embeds": case[f"{kind}prompt_embeds"], "text_embeds": case[f"{kind}pooled_prompt_embeds"]}
        )
        for kind in ("", "negative_")
    )
    policy = Policy(own(sd3), uncond)
    policy.load(HERE / "24f_lora_sd3.safetensors")
    x, second = case["latents"], sd3.path.sampling_times(10)[1].item() / 1000

    def step():
        velocity = policy.predict(x, case["timesteps"], cond, guidance_scale=4.5)
        return flow_grpo_step(sd3.path, velocity, x, case["sigma"], case["sigma_prev"], second, 0.7)

    mean, std = step()
    with policy.reference():
        of_reference, _ = step()
    table.close(name, "mean, policy", mean, case["prev_sample_mean"], rel=2e-5)
    table.close(name, "mean, reference", of_reference, case["prev_sample_mean_ref"], rel=2e-5)
    theirs = case["std_dev_t"] * (case["sigma"] - case["sigma_prev"]).sqrt()
    table.close(name, "std", std.flatten(), theirs, rel=2e-5)
    log_prob = process.gaussian_log_prob(case["next_latents"], mean, std)
    table.close(name, "log_prob", log_prob, case["log_prob"], rel=2e-5)
    table.close(name, "ratio", (log_prob - case["old_log_probs"]).exp(), case["ratio"], rel=2e-5)
