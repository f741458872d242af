"""SPO against the authors' code: cases 3 (choice), 4 (loss), 5 (training step), 6 (rollout).

The authors never clip gradients, whatever they configure; here the loop clips, so losses and gradients agree.
The tiny SDXL is too large to keep: `recorded.*` are its outputs on exactly the inputs these cases lead to.
"""

import pytest
import torch
from golden.reading import HERE, tensors
from golden.tiny_sd import Beside, Recorded, StoredPreference, TinySD
from safetensors.torch import load_file, save_file

from attune.data.batches import PromptBatch
from attune.diffusion.policy import ADAPTER_FILE, Policy
from attune.interfaces import Conditioning
from attune.methods import spo

pytestmark = pytest.mark.parity


def config(**changes):
    paper = {"beta": 10.0, "clip": 0.1, "candidates": 4, "threshold": 0.3, "steps": 20, "plain_steps": 4}
    loop = {"lr": 6e-5, "batches": 1, "batch_size": 2, "minibatch_size": 8, "guidance_scale": 5.0}
    return spo.Config(**(paper | loop | changes))


def embeds(value):
    return Conditioning({"prompt_embeds": value})


@pytest.mark.parametrize("threshold", [0.3, 0.4])
def test_choice_of_a_pair(threshold):
    case = tensors("03_spo_compare")
    best, worst, sure = spo.compare(case["scores"], threshold)
    winner, loser = case[f"thr{threshold}.indices"]
    assert torch.equal(sure, case[f"thr{threshold}.valid"])
    # between tied candidates the authors' sort is not stable, so either may be theirs
    assert torch.equal(best[case["argmax_unique"]], winner[case["argmax_unique"]])
    assert torch.equal(worst[case["argmin_unique"]], loser[case["argmin_unique"]])


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


@pytest.fixture
def trained(tmp_path):
    """The policy of case 5, its adapter read from the file as published."""
    policy = Policy(TinySD(), embeds(tensors("05_spo_step_sd")["negative_embeds"]))
    policy.add_adapter(rank=4, seed=0)
    save_file(load_file(HERE / "05_spo_lora_sd.safetensors"), tmp_path / ADAPTER_FILE)
    policy.load(tmp_path)
    return policy


def test_training_step(table, trained):
    case = tensors("05_spo_step_sd")
    method = spo.Method(config(), trained, judge=None)
    cond = embeds(case["prompt_embeds"])
    pairs = spo.StepPairs(case["x_t"], case["next_win"], case["next_lose"], case["timesteps"], cond)
    predicted = trained.predict_noise(pairs.x_t, pairs.t, cond, 5.0)
    table.close("05 sd", "epsilon, policy", predicted, case["noise_pred_win"])
    with trained.reference():
        predicted = trained.predict_noise(pairs.x_t, pairs.t, cond, 5.0)
        reference = method.log_probs(pairs)
    table.close("05 sd", "epsilon, reference", predicted, case["noise_ref_pred_win"])
    sides = zip(("win", "lose"), method.log_probs(pairs), reference, strict=True)
    for side, log_prob, of_reference in sides:
        table.close("05 sd", "log_prob, policy", log_prob, case[f"logp_{side}"])
        table.close("05 sd", "log_prob, reference", of_reference, case[f"logp_ref_{side}"])
    loss, _ = method.loss(pairs)
    table.close("05 sd", "loss", loss, case["loss"])
    loss.backward()
    gradients = {
        name.replace(".default", ""): weight.grad
        for name, weight in trained.denoiser.named_parameters()
        if weight.requires_grad
    }
    assert {f"grad.{name}" for name in gradients} == {name for name in case if name.startswith("grad.")}
    for name, gradient in gradients.items():
        table.close("05 sd", "gradients", gradient, case[f"grad.{name}"], rel=1e-4)
    total = torch.nn.utils.clip_grad_norm_(trained.parameters(), torch.inf)
    table.close("05 sd", "gradient norm", total, case["grad_norm_total"], rel=1e-4)


def test_training_step_where_the_sides_start_apart(table):
    """SDXL: x_t of chosen and rejected differ. The predictions are the stored ones, already guided."""
    case = tensors("05_spo_step_sdxl")
    x_t, t = torch.cat([case["x_t_win"], case["x_t_lose"]]), case["timesteps"]
    nobody = torch.zeros(4)

    def recorded(prefix):
        output = torch.cat([case[f"{prefix}_win"], case[f"{prefix}_lose"]])
        return Recorded(x_t, t.repeat(2), nobody.repeat(2), output)

    networks = recorded("noise_pred"), recorded("recorded.noise_ref_pred")
    policy = Beside(TinySD(networks[0]), networks[1], embeds(nobody[:1]))
    method = spo.Method(config(guidance_scale=1.0), policy, judge=None)
    pairs = spo.StepPairs(x_t, case["next_win"], case["next_lose"], t, embeds(nobody))
    with policy.reference():
        reference = method.log_probs(pairs)
    sides = zip(("win", "lose"), method.log_probs(pairs), reference, strict=True)
    for side, log_prob, of_reference in sides:
        table.close("05 sdxl", "log_prob, policy", log_prob, case[f"logp_{side}"])
        table.close("05 sdxl", "log_prob, reference", of_reference, case[f"logp_ref_{side}"])
    table.close("05 sdxl", "loss", method.loss(pairs)[0], case["loss"])


def rollout(name, method, cond):
    """Runs case 6 with its own noise and survivors; returns the case and our step pairs."""
    case = tensors(name)
    noise = [case["latents"], *(case[f"noise_step_{i:02d}"].flatten(0, -4) for i in range(20))]
    survivors = list(case["denoise_idx"])

    def draw(shape):
        drawn = noise.pop(0)
        assert drawn.shape == shape
        return drawn

    def choose(k, n):
        assert (k, n) == (method.config.candidates, 2)
        return survivors.pop(0)

    pairs = method.rollout(PromptBatch(["0", "1"], cond), draw, choose)
    assert not noise
    assert not survivors
    return case, pairs


def check_rollout(table, name, case, pairs, judge):
    """Times, scores and decisions of every comparison, and the pairs that came of them."""
    scores = torch.stack([said.reshape(case["compare.scores"].shape[1:]) for _, said in judge.calls])
    table.close(name, "scores", scores, case["compare.scores"])
    threshold = {"06 sd": 0.3, "06 sdxl": 0.4}[name]
    best, worst, sure = zip(*(spo.compare(row, threshold) for row in scores), strict=True)
    decided = torch.stack([torch.stack(best), torch.stack(worst)], 1)
    assert torch.equal(decided, case["compare.win_lose_index"])
    assert torch.equal(torch.stack(sure), case["compare.valid"])
    assert torch.equal(pairs.t, case["out.timesteps"].flatten())
    x_t = torch.stack(pairs.x_t.chunk(len(pairs.x_t) // len(pairs.t)), 1)
    table.close(name, "x_t", x_t, case["out.x_t"])
    table.close(name, "x_prev", torch.stack([pairs.chosen, pairs.rejected], 1), case["out.next_latents"])


def test_rollout(table):
    stored = tensors("06_spo_rollout_sd")
    judge = StoredPreference(stored["W"], stored["input_ids"])
    policy = Policy(TinySD(), embeds(stored["negative_prompt_embeds"]))
    cond = embeds(stored["prompt_embeds"])
    case, pairs = rollout("06_spo_rollout_sd", spo.Method(config(), policy, judge), cond)
    check_rollout(table, "06 sd", case, pairs, judge)
    assert [int(t[0]) for t, _ in judge.calls] == [*range(701, 0, -50), 0]
    prompts = case["compare.valid"].nonzero()[:, 1]
    assert torch.equal(pairs.cond.tensors["prompt_embeds"], stored["prompt_embeds"][prompts])


def test_rollout_with_inner_steps(table):
    stored = tensors("06_spo_rollout_sdxl")
    judge = StoredPreference(stored["W"], stored["input_ids"])
    network = Recorded(*(stored[f"recorded.{part}"] for part in ("x_t", "t", "cond", "output")))
    policy = Policy(TinySD(network, "tiny_sdxl_decoder", 0.13025), embeds(torch.zeros(1)))
    method = spo.Method(config(candidates=2, threshold=0.4, inner_steps=3), policy, judge)
    case, pairs = rollout("06_spo_rollout_sdxl", method, embeds(torch.tensor([1.0, 2.0])))
    check_rollout(table, "06 sdxl", case, pairs, judge)
    assert [int(t[0]) for t, _ in judge.calls] == [551, 351, 151, 0]
