"""SPO against the authors' code: cases 3 (choice), 4 (loss), 5 (training step), 6 (rollout).

The authors never clip gradients, whatever they configure; here the loop clips, so losses and gradients agree.
"""

import pytest
import torch
from golden.pipelines import StoredPreference, adapted, conditioning
from golden.reading import tensors

from attune.data.batches import PromptBatch
from attune.diffusion.policy import Policy
from attune.methods import spo

pytestmark = pytest.mark.parity
SDXL = {"candidates": 2, "threshold": 0.4, "inner_steps": 3}


def config(model="sd"):
    paper = {"beta": 10.0, "clip": 0.1, "candidates": 4, "threshold": 0.3, "steps": 20, "start_step": 4}
    loop = {"lora": None, "lr": 6e-5, "batches": 1, "batch_size": 2, "minibatch_size": 8, "guidance_scale": 5.0}
    return spo.Config(**(paper | loop | (SDXL if model == "sdxl" else {})))


@pytest.mark.parametrize("threshold", [0.3, 0.4])
def test_choice_of_a_pair(table, threshold):
    case, name = tensors("03_spo_compare"), f"03 threshold {threshold}"
    scores = case["scores"]
    best, worst, sure = spo.compare(scores, threshold)
    table.exact(name, "kept", sure, case[f"thr{threshold}.valid"])
    # between tied candidates the authors' sort is not stable: any may be theirs, but its score is the same
    sides = zip(("best", "worst"), (best, worst), case[f"thr{threshold}.indices"], ("argmax", "argmin"), strict=True)
    for side, ours, theirs, extreme in sides:
        alone = case[f"{extreme}_unique"]
        table.exact(name, f"{side} candidate where it is alone", ours[alone], theirs[alone])
        table.exact(name, f"score of the {side}", scores.gather(0, ours[None]), scores.gather(0, theirs[None]))


def test_loss_and_its_gradients(table):
    case = tensors("04_spo_loss")
    chosen, rejected = (case[f"logp_{side}"].clone().requires_grad_() for side in ("win", "lose"))
    log_ratios = chosen - case["logp_ref_win"], rejected - case["logp_ref_lose"]
    loss = spo.spo_loss(*log_ratios, beta=10.0, clip=0.1).mean()
    loss.backward()
    table.close("04", "loss", loss, case["loss"])
    table.close("04", "gradient, chosen", chosen.grad, case["grad_logp_win"])
    table.close("04", "gradient, rejected", rejected.grad, case["grad_logp_lose"])
    outside = (case["ratio_win"] <= 0.9) | (case["ratio_win"] >= 1.1)  # stored after the clip
    assert outside.any()
    assert not chosen.grad[outside].any()


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_training_step(table, request, tmp_path, model):
    """In SD both sides share x_t; in SDXL, for its inner steps, they do not."""
    case, name = tensors(f"05_spo_step_{model}"), f"05 {model}"
    null, cond = conditioning(case, "negative_"), conditioning(case)
    policy = adapted(request.getfixturevalue(model), null, f"05_spo_lora_{model}", tmp_path)
    method = spo.Method(config(model), policy, preference_model=None)
    x_t = case["x_t"] if "x_t" in case else torch.cat([case["x_t_win"], case["x_t_lose"]])
    pairs = spo.StepPairs(x_t, case["next_win"], case["next_lose"], case["timesteps"], cond)
    with policy.reference():
        reference = method.log_probs(pairs)
    check_predictions(table, name, method, pairs, case)
    sides = zip(("win", "lose"), method.log_probs(pairs), reference, strict=True)
    for side, log_prob, of_reference in sides:
        table.close(name, "log_prob, policy", log_prob, case[f"logp_{side}"])
        table.close(name, "log_prob, reference", of_reference, case[f"logp_ref_{side}"])
        ratio = (log_prob - of_reference).exp().clamp(0.9, 1.1)
        table.close(name, "ratio", ratio, case[f"ratio_{side}"])
    loss, _ = method.loss(pairs)
    table.close(name, "loss", loss, case["loss"])
    loss.backward()
    check_gradients(table, name, policy, case)


def check_predictions(table, name, method, pairs, case):
    """Guided epsilon of policy and reference, wherever it is stored."""
    t, cond = (x.repeat(len(pairs.x_t) // len(pairs.t)) for x in (pairs.t, pairs.cond))
    predicted = method.policy.predict(pairs.x_t, t, cond, 5.0)
    both = "noise_pred_lose" in case and len(t) > len(pairs.t)
    expected = torch.cat([case["noise_pred_win"], case["noise_pred_lose"]]) if both else case["noise_pred_win"]
    table.close(name, "epsilon, policy", predicted, expected)
    if "noise_ref_pred_win" in case:
        with method.policy.reference():
            predicted = method.policy.predict(pairs.x_t, t, cond, 5.0)
        table.close(name, "epsilon, reference", predicted, case["noise_ref_pred_win"])


def check_gradients(table, name, policy, case):
    """The gradient of every adapter weight."""
    named = [(key, weight) for key, weight in policy.denoiser.named_parameters() if weight.requires_grad]
    gradients = {key.replace(".default", ""): weight.grad for key, weight in named}
    assert {f"grad.{key}" for key in gradients} == {key for key in case if key.startswith("grad.")}
    for key, gradient in gradients.items():
        table.close(name, "gradients", gradient, case[f"grad.{key}"], rel=1e-4)
    total = torch.nn.utils.clip_grad_norm_(policy.parameters(), torch.inf)
    table.close(name, "gradient norm, total", total, case["grad_norm_total"], rel=1e-4)


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_rollout(table, request, model):
    """SDXL: every candidate continues for three steps before it is scored."""
    case = tensors(f"06_spo_rollout_{model}")
    preference_model = StoredPreference(case["W"], case["input_ids"])
    policy = Policy(request.getfixturevalue(model), conditioning(case, "negative_"))
    method = spo.Method(config(model), policy, preference_model)
    pairs = rollout(method, case)
    check_comparisons(table, f"06 {model}", method, preference_model, case)
    check_pairs(table, f"06 {model}", method, pairs, case)


def rollout(method, case):
    """Our step pairs from the case's noise and next states."""
    noise = [case["latents"], *(case[f"noise_step_{i:02d}"].flatten(0, -4) for i in range(20))]
    next_states = list(case["denoise_idx"])

    def draw(shape):
        drawn = noise.pop(0)
        assert drawn.shape == shape
        return drawn

    def choose(k, n):
        assert (k, n) == (method.config.candidates, 2)
        return next_states.pop(0)

    pairs = method.rollout(PromptBatch(["0", "1"], conditioning(case)), draw, choose)
    assert not noise
    assert not next_states
    return pairs


def check_comparisons(table, name, method, preference_model, case):
    """Times, scores and decisions of every comparison."""
    times = [551, 351, 151, 0] if method.config.inner_steps else [*range(701, 0, -50), 0]
    scores = torch.cat(preference_model.scores).reshape(case["compare.scores"].shape)
    said_at = torch.cat(preference_model.times).reshape(scores.shape)
    table.exact(name, "times of comparisons", said_at, torch.tensor(times)[:, None, None].expand(scores.shape))
    best, worst, confident = zip(*(spo.compare(row, method.config.threshold) for row in scores), strict=True)
    decided = torch.stack([torch.stack(best), torch.stack(worst)], 1)
    table.close(name, "scores", scores, case["compare.scores"])
    table.exact(name, "best and worst", decided, case["compare.win_lose_index"])
    table.exact(name, "kept", torch.stack(confident), case["compare.valid"])


def check_pairs(table, name, method, pairs, case):
    """The step pairs, in the authors' order."""
    x_t = torch.stack(pairs.x_t.chunk(len(pairs.x_t) // len(pairs.t)), 1)
    table.exact(name, "timesteps", pairs.t, case["out.timesteps"].flatten())
    table.close(name, "x_t", x_t, case["out.x_t"])
    table.close(name, "x_prev", torch.stack([pairs.chosen, pairs.rejected], 1), case["out.next_latents"])
    steps = method.config.inner_steps + 1
    prompts = torch.cat([kept.nonzero().flatten().repeat(steps) for kept in case["compare.valid"]])
    for key, value in conditioning(case).tensors.items():
        table.exact(name, key, pairs.cond.tensors[key], value[prompts])
