"""The step-aware preference model: how it is taught."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from attune.config.settings import AIFeedback
from attune.data.batches import PairBatch
from attune.data.labels import relabel, with_ai_feedback
from attune.diffusion.path import VP
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning
from attune.spm.model import inference_pixels, load, save
from attune.spm.objective import Config, SPMObjective, accuracy, preference_criterion, starting_model

PROMPTS = ["a red cat", "two blue dogs", "a cat"]


def at(t, n=3):
    return torch.full((n,), t)


# ---------------------------------------------------------------- criterion, accuracy, labels


def test_equal_scores_cost_ln_2_for_a_choice_and_nothing_for_a_tie():
    scores = torch.tensor([19.0, 21.0, 20.0])
    assert preference_criterion(scores, scores, torch.tensor([1.0, 0.0, 1.0])).item() == pytest.approx(math.log(2))
    assert preference_criterion(scores, scores, torch.full((3,), 0.5)).item() == pytest.approx(0, abs=1e-6)


def test_a_choice_costs_its_negative_log_likelihood():
    """Scores ln 3 apart: the chosen image wins with probability 3/4 or 1/4."""
    ahead, behind = torch.tensor([math.log(3)]), torch.tensor([0.0])
    assert preference_criterion(ahead, behind, torch.ones(1)).item() == pytest.approx(math.log(4 / 3))
    assert preference_criterion(ahead, behind, torch.zeros(1)).item() == pytest.approx(math.log(4))


def test_weights_are_normalised():
    """ln 2 and ln 4 with weights 3 and 1, whatever their sum: (3 ln 2 + 2 ln 2) / 4."""
    scores_0, label = torch.tensor([0.0, math.log(3)]), torch.tensor([1.0, 0.0])
    for scale in (1.0, 10.0):
        loss = preference_criterion(scores_0, torch.zeros(2), label, scale * torch.tensor([3.0, 1.0]))
        assert loss.item() == pytest.approx(1.25 * math.log(2))


def test_far_apart_scores_stay_finite():
    scores_0 = torch.tensor([500.0, 500.0, 500.0], requires_grad=True)
    loss = preference_criterion(scores_0, torch.zeros(3), torch.tensor([1.0, 0.0, 0.5]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores_0.grad).all()


def test_accuracy_ignores_ties_and_does_not_reward_equal_scores():
    scores_0, scores_1 = torch.tensor([2.0, 2.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert accuracy(scores_0, scores_1, torch.tensor([1.0, 0.0, 0.5, 1.0])).item() == pytest.approx(1 / 3)
    assert accuracy(scores_0, scores_1, torch.full((4,), 0.5)).item() == 0.5


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.4])
def test_a_label_is_sure_beyond_tanh_of_half_the_gap(threshold):
    edge = 2 * math.atanh(threshold)
    gaps = torch.tensor([1.001 * edge, 0.999 * edge, 0.0, -0.999 * edge, -1.001 * edge])
    p = torch.stack([gaps, torch.zeros(5)]).softmax(0)
    torch.testing.assert_close(p[0] - p[1], torch.tanh(gaps / 2))
    assert relabel(gaps, torch.zeros(5), threshold).tolist() == [1, 0.5, 0.5, 0.5, 0]


# ---------------------------------------------------------------- the objective


class ToyBackbone:
    """Latents are small images; noise is predicted by a 1x1 convolution plus a condition."""

    def __init__(self):
        torch.manual_seed(3)
        self.denoiser = nn.Conv2d(3, 3, 1)
        self.path = VP(torch.linspace(0.99, 0.01, 100))
        self.latent_shape, self.lora_targets, self.guidance = (3, 4, 4), (), "cfg"

    def decode_latents(self, latents):
        return latents.repeat_interleave(4, -1).repeat_interleave(4, -2)

    def predict(self, denoiser, x_t, t, cond):
        return denoiser(x_t) + cond.tensors["shift"][:, None, None, None]


@pytest.fixture
def objective(spm):
    config = Config(clip="-", lr=1e-3, batches=1, batch_size=3)
    return SPMObjective(config, *spm, Policy(ToyBackbone(), Conditioning({"shift": torch.zeros(1)})))


def pairs(same=False, label=(1.0, 0.0, 1.0)):
    generator = torch.Generator().manual_seed(4)
    first, second = torch.rand(2, 3, 3, 4, 4, generator=generator)
    cond = Conditioning({"shift": torch.tensor([0.1, 0.2, 0.3])})
    return PairBatch(PROMPTS, cond, first, first if same else second, torch.tensor(label), torch.ones(3))


def only_minibatch(objective, batch, seed=5):
    (minibatch,) = tiny.minibatches(objective, batch, seed)
    return minibatch


def test_both_images_of_a_pair_go_through_the_same_noise(objective):
    minibatch = only_minibatch(objective, pairs(same=True))
    assert minibatch.pixel_values.shape == (2, 3, 3, 16, 16)
    assert torch.equal(*minibatch.pixel_values)
    loss, metrics = objective.loss(minibatch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["accuracy"] == 0


def test_time_zero_shows_the_images_themselves(objective):
    batch, noise = pairs(), torch.randn(3, 3, 4, 4)
    seen = objective.one_step_images(batch, torch.tensor([0, 50, 0]), noise)
    true = objective.base.backbone.decode_latents(torch.cat([batch.latents_0, batch.latents_1]))
    differs = (seen != true).flatten(1).any(1)
    assert differs.tolist() == [False, True, False] * 2


def test_guidance_is_the_configured_one(objective):
    """The toy denoiser adds its condition, so guidance 5 adds 5 times as much."""
    x, t, cond = torch.zeros(3, 3, 4, 4), at(10), pairs().cond
    plain = objective.base.predict(x, t, Conditioning({"shift": torch.zeros(3)}))
    shift = (objective._guided(x, t, cond) - plain)[:, 0, 0, 0]
    torch.testing.assert_close(shift, 5 * cond.tensors["shift"])


def test_the_draws_decide_everything(objective):
    one, other = (only_minibatch(objective, pairs(), seed=5) for _ in range(2))
    assert torch.equal(one.pixel_values, other.pixel_values)
    assert not torch.equal(one.t, only_minibatch(objective, pairs(), seed=6).t)


def test_learning_moves_all_of_the_model_and_nothing_of_the_base(objective):
    minibatch = only_minibatch(objective, pairs())
    before, _ = objective.loss(minibatch)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    for _ in range(10):
        loss, _ = objective.loss(minibatch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert objective.loss(minibatch)[0] < before
    still = [name for name, weight in objective.model.named_parameters() if not weight.grad.abs().sum() > 0]
    # a key's bias shifts all attention logits alike, which softmax cannot see: its gradient is 0 or noise
    assert all("k_proj.bias" in name for name in still)
    assert all(weight.grad is None for weight in objective.base.denoiser.parameters())


def test_a_distributed_wrapper_is_what_gets_called(objective):
    """The loop replaces `module`; a loss that went around it would train ranks apart."""
    calls, inner = [], objective.module
    objective.module = lambda *args: calls.append(len(args)) or inner(*args)
    objective.loss(only_minibatch(objective, pairs()))
    assert calls == [3]


def test_config_knows_the_papers_guidance_and_refuses_strangers():
    given = {"clip": "x", "lr": 3e-4, "batches": 150, "batch_size": 24}
    assert Config(**given).guidance_scale == 5
    with pytest.raises(ValueError, match="extra"):
        Config(**given, stranger=1)


def test_pairs_need_only_look_like_a_pair_batch(objective):
    batch = pairs()
    fields = {name: getattr(batch, name) for name in ("prompts", "cond", "latents_0", "latents_1", "label_0", "weight")}
    alike = SimpleNamespace(**fields, draw_noise=batch.draw_noise)
    assert torch.equal(only_minibatch(objective, alike).pixel_values, only_minibatch(objective, batch).pixel_values)


# ---------------------------------------------------------------- labels of a scorer


def test_ai_feedback_moves_labels_towards_the_scorer():
    """sigmoid(ln 3) = 0.75; half way from a person's 0 to it is 0.375, from a tie 0.625."""
    frame = pd.DataFrame({"label_0": [0.0, 0.5], "judge_0": [math.log(3), math.log(3)], "judge_1": [0.0, 0.0]})
    soft = with_ai_feedback(frame, AIFeedback(scorer="judge", weight=0.5))
    assert soft.label_0.tolist() == pytest.approx([0.375, 0.625])
    assert frame.label_0.tolist() == [0.0, 0.5]
    assert with_ai_feedback(frame, None) is frame


def test_ai_feedback_can_be_hard_and_a_cosine_needs_a_temperature():
    """A cosine gap of 0.02 is 2 at temperature 0.01: tanh(1) = 0.76 > 0.1; at temperature 1 it is a tie."""
    frame = pd.DataFrame({"label_0": [0.0], "hps_0": [0.28], "hps_1": [0.26]})
    sharp = with_ai_feedback(frame, AIFeedback(scorer="hps", threshold=0.1, temperature=0.01))
    blunt = with_ai_feedback(frame, AIFeedback(scorer="hps", threshold=0.1))
    assert (sharp.label_0.item(), blunt.label_0.item()) == (1.0, 0.5)


def test_ai_feedback_without_scores_says_where_they_come_from():
    with pytest.raises(ValueError, match=r"no scores by 'judge'.*data\.score_with"):
        with_ai_feedback(pd.DataFrame({"label_0": [1.0]}), AIFeedback(scorer="judge"))


# ---------------------------------------------------------------- full size


def scores(model, images):
    with torch.no_grad():
        return model.eval().image_features(inference_pixels(images, 16), at(501, len(images)))


def test_training_can_go_on_from_released_weights(spm, clip_folder, images, tmp_path):
    """A single file in the released layout, with the position indices old libraries saved as floats."""
    model, _ = spm
    for name, weight in model.named_parameters():
        if "adaLN" in name:
            weight.data += 0.1
    released = {name: value.clone() for name, value in model.state_dict().items()}
    released["model.vision_model.embeddings.position_ids"] = torch.arange(5.0)[None]
    for file in (tmp_path / "spm.bin", tmp_path / "spm.safetensors"):
        (torch.save if file.suffix == ".bin" else save_file)(released, file)
        config = Config(clip=clip_folder, lr=1e-3, batches=0, batch_size=3, weights=str(file))
        again, tokenizer = starting_model(config)
        assert torch.equal(scores(again, images), scores(model, images))
        assert len(tokenizer) == 54


def test_tensors_that_share_one_storage_load_train_and_save(spm, clip_folder, tmp_path):
    """DeepSpeed's converter writes views of one flat buffer; safetensors refuses those."""
    model, _ = spm
    state = model.state_dict()
    flat = torch.cat([value.flatten() for value in state.values()])
    pieces = flat.split([value.numel() for value in state.values()])
    views = {name: piece.view(state[name].shape) for name, piece in zip(state, pieces, strict=True)}
    torch.save(views, tmp_path / "spm.bin")
    assert (tmp_path / "spm.bin").stat().st_size < 1.2 * flat.numel() * 4 + 100_000  # one buffer, not one per tensor
    again, tokenizer = load(tmp_path / "spm.bin", clip_folder)
    weight = again.train().requires_grad_(True).model.logit_scale
    with torch.no_grad():
        weight += 1
    save(again, tokenizer, tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    changed = [name for name, value in saved.items() if not torch.equal(value, state[name])]
    assert changed == ["model.logit_scale"]


def test_the_tokenizer_may_live_elsewhere(clip_folder, tmp_path):
    """The Hub's PickScore is scored with another repository's tokenizer."""
    other = tmp_path / "tokenizer"
    tokenizer = starting_model(Config(clip=clip_folder, lr=1e-3, batches=0, batch_size=3))[1]
    tokenizer.save_pretrained(other)
    _, tokenizer = starting_model(Config(clip=clip_folder, lr=1e-3, batches=0, batch_size=3, tokenizer=str(other)))
    assert tokenizer.name_or_path == str(other)


def gradients(objective, minibatch):
    loss, _ = objective.loss(minibatch)
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in objective.model.named_parameters()}
    objective.model.zero_grad()
    return loss.detach(), found


def test_gradient_checkpointing_changes_no_number(objective):
    minibatch = only_minibatch(objective, pairs())
    loss, plain = gradients(objective, minibatch)
    objective.model.checkpointing = True
    again, recomputed = gradients(objective, minibatch)
    assert torch.equal(loss, again)
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)


def test_half_precision_is_near_and_keeps_float32_weights(spm):
    base = Policy(ToyBackbone(), Conditioning({"shift": torch.zeros(1)}))
    full, half = (
        SPMObjective(Config(clip="-", lr=1e-3, batches=1, batch_size=3, precision=p), *spm, base)
        for p in ("float32", "bfloat16")
    )
    minibatch = only_minibatch(full, pairs())
    assert half.loss(minibatch)[0].item() == pytest.approx(full.loss(minibatch)[0].item(), abs=0.1)
    assert half.loss(minibatch)[0] != full.loss(minibatch)[0]
    assert {weight.dtype for weight in half.parameters()} == {torch.float32}


def test_without_step_awareness_the_trained_model_does_not_know_t(objective):
    """Its additions stay neutral: after a step the weights have moved, and every t gives the same score."""
    config = objective.config.model_copy(update={"step_aware": False})
    blind = SPMObjective(config, objective.model, objective.tokenizer, objective.base)
    assert len(blind.parameters()) == len(list(blind.model.parameters())) - len(blind.model.adaln_parameters())
    before = blind.parameters()[0].detach().clone()
    seen = only_minibatch(blind, pairs())
    loss, _ = blind.loss(seen)
    loss.backward()
    torch.optim.SGD(blind.parameters(), lr=0.1).step()
    assert not torch.equal(before, blind.parameters()[0])
    assert all(weight.grad is None for weight in blind.model.adaln_parameters())
    early, late = (blind.model(seen.pixel_values, seen.input_ids, torch.full_like(seen.t, t)) for t in (1, 99))
    assert torch.equal(early, late)
