"""The step-aware preference model: what it starts from, how it is stored, how it is taught."""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from attune.clip import image_features, text_features
from attune.data.batches import PairBatch
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning, StepReward
from attune.preference.model import (
    StepAwareReward,
    from_clip,
    inference_pixels,
    load,
    save,
    training_pixels,
)
from attune.preference.objective import Config, SPMObjective, accuracy, preference_criterion, relabel

torch.set_num_threads(1)
PROMPTS = ["a red cat", "two blue dogs", "a cat"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP for 16 px images whose tokenizer spells letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokens), "max_position_embeddings": 24, "hidden_act": "gelu"}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    vision = {**tower, "image_size": 16, "patch_size": 8, "hidden_act": "gelu"}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=8))
    for weight in model.parameters():  # wide enough that everything matters
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def spm(clip_folder):
    return from_clip(clip_folder)


@pytest.fixture
def images():
    return torch.rand(3, 3, 20, 28, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.1


def perturbed(model):
    """The model after some imaginary training of its modulation."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if "adaLN" in name:
            weight.data += 0.5 * torch.randn(weight.shape, generator=generator)
    return model


def at(t, n=3):
    return torch.full((n,), t)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("t", [0, 1, 501, 999])
def test_starts_as_the_clip_it_came_from_bit_for_bit(spm, images, t):
    model, tokenizer = spm
    plain = CLIPModel.from_pretrained(tokenizer.name_or_path).eval()
    pixels = inference_pixels(images, 16)
    with torch.no_grad():
        expected = image_features(plain, pixels, normalise=False)
        assert (model.image_features(pixels, at(t)) - expected).abs().max() == 0
        assert torch.equal(text_features(model.model, tokenizer, PROMPTS), text_features(plain, tokenizer, PROMPTS))


def test_scores_depend_on_time_once_the_modulation_has_moved(spm, images):
    judge = StepAwareReward(perturbed(spm[0]), spm[1])
    early, late = judge(images, PROMPTS, at(951)), judge(images, PROMPTS, at(1))
    assert (early - late).abs().min() > 1e-3


def test_every_row_has_its_own_time(spm, images):
    judge = StepAwareReward(perturbed(spm[0]), spm[1])
    mixed = judge(images, PROMPTS, torch.tensor([951, 501, 0]))
    alone = [judge(images[i : i + 1], PROMPTS[i : i + 1], at(t, 1))[0] for i, t in enumerate((951, 501, 0))]
    torch.testing.assert_close(mixed, torch.stack(alone), rtol=0, atol=1e-5)


def test_one_call_for_candidates_is_the_same_as_one_each(spm, images):
    model, tokenizer = spm[0].eval(), spm[1]
    pixels = torch.stack([inference_pixels(images, 16), inference_pixels(images.flip(-1), 16)])
    ids = tokenizer(PROMPTS, padding=True, return_tensors="pt").input_ids
    both = model(pixels, ids, at(7))
    assert both.shape == (2, 3)
    torch.testing.assert_close(both[1], model(pixels[1:], ids, at(7))[0], rtol=0, atol=1e-5)


def test_judge_is_differentiable_in_images_and_frozen(spm, images):
    judge = StepAwareReward(*spm)
    assert isinstance(judge, StepReward)
    images.requires_grad_()
    judge(images, PROMPTS, at(501)).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in judge.model.parameters())


def test_judge_encodes_each_prompt_once(spm, images, monkeypatch):
    judge, encoded = StepAwareReward(*spm), []
    encode = judge.model.model.get_text_features
    monkeypatch.setattr(
        judge.model.model, "get_text_features", lambda **k: encoded.append(len(k["input_ids"])) or encode(**k)
    )
    for _ in range(3):
        judge(images, ["a cat", "a dog", "a cat"], at(1))
    assert encoded == [1, 1]


def test_judge_refuses_lengths_that_differ(spm, images):
    with pytest.raises(ValueError, match="2 prompts"):
        StepAwareReward(*spm)(images, PROMPTS[:2], at(1))


def test_training_and_inference_pixels_agree_on_a_square_image_in_range():
    square = torch.rand(2, 3, 16, 16)
    assert torch.equal(training_pixels(square, 16), inference_pixels(square, 16))


def test_inference_resizes_overshoot_and_training_cuts_it():
    wild = 3 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (training_pixels(wild, 16) - inference_pixels(wild, 16)).abs().max() > 0.1


def test_odd_crops_round_half_to_even():
    """3 pixels to lose: the offset is round(1.5) = 2, as torchvision crops."""
    columns = torch.arange(19.0).expand(1, 3, 16, 19) / 19
    assert torch.equal(inference_pixels(columns, 16), training_pixels(columns[..., 2:18], 16))


# ---------------------------------------------------------------- files


def test_a_saved_folder_stands_alone(spm, images, tmp_path):
    save(perturbed(spm[0]), spm[1], tmp_path / "preference")
    again = StepAwareReward(*load(tmp_path / "preference"))
    assert torch.equal(again(images, PROMPTS, at(501)), StepAwareReward(*spm)(images, PROMPTS, at(501)))
    assert '"hidden_act": "gelu"' in (tmp_path / "preference" / "config.json").read_text()


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_the_released_layout_loads(spm, images, tmp_path, clip_folder, prefix):
    tensors = {prefix + k.removeprefix("model."): v for k, v in perturbed(spm[0]).state_dict().items()}
    tensors[f"{prefix}vision_model.embeddings.position_ids"] = torch.arange(5.0)[None]
    torch.save(tensors, tmp_path / "spm.bin")
    again = StepAwareReward(*load(tmp_path / "spm.bin", clip=clip_folder))
    assert torch.equal(again(images, PROMPTS, at(501)), StepAwareReward(*spm)(images, PROMPTS, at(501)))


def test_views_of_one_storage_load_and_save(spm, tmp_path, clip_folder):
    """DeepSpeed writes every tensor as a view of one flat buffer, which safetensors refuses."""
    state = spm[0].state_dict()
    flat, start, views = torch.cat([v.flatten() for v in state.values()]), 0, {}
    for name, value in state.items():
        views[name] = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()
    torch.save(views, tmp_path / "flat.bin")
    save(*load(tmp_path / "flat.bin", clip=clip_folder), tmp_path / "folder")
    saved = load_file(tmp_path / "folder" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in state.items())


class _Payload:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, clip_folder):
    torch.save({"model.logit_scale": torch.zeros(()), "x": _Payload(tmp_path / "owned")}, tmp_path / "spm.bin")
    with pytest.raises(ValueError, match="more than tensors"):
        load(tmp_path / "spm.bin", clip=clip_folder)
    assert not (tmp_path / "owned").exists()


def test_missing_and_unexpected_tensors_are_named(spm, tmp_path, clip_folder):
    tensors = spm[0].state_dict()
    del tensors["model.logit_scale"]
    save_file(tensors | {"model.stranger": torch.zeros(1)}, tmp_path / "spm.safetensors")
    with pytest.raises(ValueError, match=r"missing \['model.logit_scale'\], unexpected \['model.stranger'\]"):
        load(tmp_path / "spm.safetensors", clip=clip_folder)


def test_a_plain_clip_is_not_a_preference_model(clip_folder):
    with pytest.raises(ValueError, match="t_embedder"):
        load(clip_folder)


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
        self.alphas_cumprod = torch.linspace(0.99, 0.01, 100)
        self.latent_shape, self.lora_targets = (3, 4, 4), ()

    def decode_latents(self, latents):
        return latents.repeat_interleave(4, -1).repeat_interleave(4, -2)

    def predict_noise(self, denoiser, x_t, t, cond):
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
    (minibatch,) = objective.minibatches(batch, torch.Generator().manual_seed(seed))
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
    plain = objective.base.predict_noise(x, t, Conditioning({"shift": torch.zeros(3)}))
    shift = (objective._guided(x, t, cond) - plain)[:, 0, 0, 0]
    torch.testing.assert_close(shift, 5 * cond.tensors["shift"])


def test_the_generator_decides_everything(objective):
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
