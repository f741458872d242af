"""DDPO against the authors' code: case 17, advantages and the clipped loss; case 26, a training step.

Case 25b: advantages by Flow-GRPO and DiffusionNFT, which are one another's.
"""

import pytest
import torch
from golden.pipelines import adapted, conditioning
from golden.reading import tensors

from attune.diffusion import process
from attune.diffusion.path import VP
from attune.methods import _rewards, ddpo
from attune.methods._rewards import standardised

pytestmark = pytest.mark.parity
CLIPS_17, CLIPS_26 = {"clip0.0001": 1e-4, "clip0.2": 0.2}, {"clip1e-4": 1e-4, "clip0.2": 0.2}
PROMPTS_17 = ["cat", "dog", "cat", "fish", "cat", "dog", "cat", "cat"]
MIN_COUNT = 4


def tracked(rewards, prompts, earlier_rewards, earlier_prompts):
    """What the authors' tracker says of a rollout after an earlier one, by our advantages within a rollout.

    Its buffer holds both; but a prompt that has too few images in it is judged by the new rollout alone.
    """
    both = [*earlier_prompts, *prompts]
    own = standardised(torch.cat([earlier_rewards, rewards]), both, "prompt", MIN_COUNT)[len(earlier_prompts) :]
    alone = standardised(rewards, prompts, "batch", MIN_COUNT)
    is_known = torch.tensor([both.count(prompt) >= MIN_COUNT for prompt in prompts])
    return torch.where(is_known, own, alone)


# ---------------------------------------------------------------- advantages


def test_advantages_by_prompt(table):
    """First rollout: five cats are judged by cats, the others by all; after the second, dogs are four, too."""
    case = tensors("17_ddpo_loss")
    first, second = case["tracker.rewards"]
    found = standardised(first, PROMPTS_17, "prompt", MIN_COUNT)
    table.close("17", "advantages by prompt", found, case["tracker.advantages_1"])
    found = tracked(second, PROMPTS_17, first, PROMPTS_17)
    table.close("17", "advantages by prompt of two rollouts", found, case["tracker.advantages_2"])


def test_advantages_by_rollout(table):
    case = tensors("17_ddpo_loss")
    found = standardised(case["tracker.rewards"][0], PROMPTS_17, "batch", MIN_COUNT)
    table.close("17", "advantages by rollout", found, case["global_advantages"])


def test_advantages_of_case_26(table):
    case = tensors("26_ddpo_step_sd")
    first, then = ["fox", "lake", "fox", "boat"], ["fox", "fox", "lake", "fox"]
    found = standardised(case["tracker.first_rewards"], first, "prompt", MIN_COUNT)
    table.close("26", "advantages by prompt, all too few", found, case["tracker.first_advantages"])
    found = tracked(case["tracker.rewards"], then, case["tracker.first_rewards"], first)
    table.close("26", "advantages by prompt of two rollouts", found, case["tracker.advantages"])


@pytest.mark.parametrize("code", ["nft", "flow_grpo.grpo"])
def test_advantages_of_groups(table, monkeypatch, code):
    """The mean of the prompt's images; the deviation of them, or of all. Both codes add 1e-4 to either."""
    case = tensors("25b_group_advantages")
    prompts = [str(i) for i in (0, 1, 0, 2, 1, 0, 2, 2, 0, 1, 2, 0)]
    found = standardised(case["rewards_f64"], prompts, "prompt_mean", 1)
    table.close("25b", "advantages, deviation of all", found, case[f"{code}.global_std1_f64"])
    monkeypatch.setitem(_rewards.EPS, "prompt", 1e-4)
    found = standardised(case["rewards_f64"], prompts, "prompt", 1)
    table.close("25b", "advantages, deviation of the prompt", found, case[f"{code}.global_std0_f64"])


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("name", CLIPS_17)
def test_loss(table, name):
    """Advantages reach beyond 5; the gradient is that of the network's output."""
    case = tensors("17_ddpo_ddim") | tensors("17_ddpo_loss")
    path, t, x_t = VP(tensors("01_ddim_log_prob")["alphas_cumprod"]), case["timesteps"], case["sample"]
    output = case["model_output_new"].clone().requires_grad_()
    at, to = path.level(t, x_t), path.level((t - 20).clamp(min=0), x_t)
    mean, std = process.ddim_step(*path.x0_and_noise(output, x_t, at), at, to, eta=1.0)
    log_ratio = process.gaussian_log_prob(case["prev_sample"], mean, std) - case["log_prob_old"]
    loss = ddpo.ddpo_loss(log_ratio, case["advantages"].clamp(-5, 5), CLIPS_17[name]).mean()
    (gradient,) = torch.autograd.grad(loss, output)
    name, line = f"17 {name}", case_of(case, name)
    table.close(name, "ratio", log_ratio.exp(), line["ratio"])
    table.close(name, "loss", loss, line["loss"])
    table.close(name, "gradient", gradient, line["grad_model_output"])
    table.close(name, "approx_kl", 0.5 * (log_ratio**2).mean(), line["approx_kl"])
    clipped = ((log_ratio.exp() - 1).abs() > CLIPS_17[name.removeprefix("17 ")]).float().mean()
    table.exact(name, "clipped", clipped, line["clipfrac"])


def case_of(case, clip):
    """The outputs of a case at one clip."""
    return {key.removeprefix(f"{clip}."): value for key, value in case.items() if key.startswith(f"{clip}.")}


@pytest.mark.parametrize("clip", CLIPS_26)
def test_training_step(table, sd, tmp_path, clip):
    """Three of 50 steps of four images. Theirs takes a step of all images at a time, and so means of the three."""
    case, name = tensors("26_ddpo_step_sd"), f"26 {clip}"
    policy = adapted(sd, conditioning(case, "negative_"), "26_ddpo_lora", tmp_path)
    config = ddpo.Config(rewards={"none": 1}, clip=CLIPS_26[clip], guidance_scale=5, steps=50)
    method, expected = ddpo.Method(config, policy, {"none": None}), case_of(case, clip)
    for j in range(3):
        m = ddpo.Steps(
            x_t=case["latents"][:, j],
            x_prev=case["next_latents"][:, j],
            t=case["timesteps"][:, j],
            cond=conditioning(case),
            advantage=case["advantages"].clamp(-5, 5),
            old_log_prob=case["old_log_probs"][:, j],
            rewards={},
        )
        with torch.no_grad():
            table.close(name, "epsilon", policy.predict(m.x_t, m.t, m.cond, 5.0), case[f"noise_pred.{j}"])
            log_prob = method.log_prob(m)[0]
        table.close(name, "log_prob", log_prob, case["log_probs"][:, j])
        table.close(name, "ratio", (log_prob - m.old_log_prob).exp(), case["ratio"][:, j])
        loss, metrics = method.loss(m)
        table.close(name, "loss", loss, expected["loss_per_timestep"][j])
        table.close(name, "approx_kl", metrics["approx_kl"], expected["approx_kl"][j], rel=1e-3)
        table.exact(name, "clipped", metrics["clipped"], expected["clipfrac"][j])
        (loss / 3).backward()
    check_gradients(table, name, policy, expected)


def check_gradients(table, name, policy, expected):
    """The gradient of every adapter weight, by the largest of all, as in the case's own tolerance."""
    named = {key.replace(".default", ""): w.grad for key, w in policy.denoiser.named_parameters() if w.requires_grad}
    assert {f"grad.{key}" for key in named} == {key for key in expected if key.startswith("grad.")}
    found = torch.cat([gradient.flatten() for gradient in named.values()])
    wanted = torch.cat([expected[f"grad.{key}"].flatten() for key in named])
    table.close(name, "gradients", found, wanted, rel=5e-4)
    total = torch.nn.utils.clip_grad_norm_(policy.parameters(), torch.inf)
    table.close(name, "gradient norm", total, expected["grad_norm"], rel=5e-4)
