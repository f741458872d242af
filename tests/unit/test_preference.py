"""The step-aware preference model: what it starts from, how it is stored, how it is taught."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from attune.clip.model import image_features, text_features
from attune.interfaces import StepReward
from attune.spm.model import (
    StepAwareReward,
    inference_pixels,
    load,
    save,
    training_pixels,
)

PROMPTS = ["a red cat", "two blue dogs", "a cat"]


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
        expected = image_features(plain, pixels, unit=False)
        assert (model.image_features(pixels, at(t)) - expected).abs().max() == 0
        assert torch.equal(text_features(model.model, tokenizer, PROMPTS), text_features(plain, tokenizer, PROMPTS))


def test_scores_depend_on_time_once_the_modulation_has_moved(spm, images):
    reward = StepAwareReward(perturbed(spm[0]), spm[1])
    early, late = reward(images, PROMPTS, at(951)), reward(images, PROMPTS, at(1))
    assert (early - late).abs().min() > 1e-3


def test_every_row_has_its_own_time(spm, images):
    reward = StepAwareReward(perturbed(spm[0]), spm[1])
    mixed = reward(images, PROMPTS, torch.tensor([951, 501, 0]))
    alone = [reward(images[i : i + 1], PROMPTS[i : i + 1], at(t, 1))[0] for i, t in enumerate((951, 501, 0))]
    torch.testing.assert_close(mixed, torch.stack(alone), rtol=0, atol=1e-5)


def test_one_call_for_candidates_is_the_same_as_one_each(spm, images):
    model, tokenizer = spm[0].eval(), spm[1]
    pixels = torch.stack([inference_pixels(images, 16), inference_pixels(images.flip(-1), 16)])
    ids = tokenizer(PROMPTS, padding=True, return_tensors="pt").input_ids
    both = model(pixels, ids, at(7))
    assert both.shape == (2, 3)
    torch.testing.assert_close(both[1], model(pixels[1:], ids, at(7))[0], rtol=0, atol=1e-5)


def test_the_step_aware_reward_is_differentiable_in_images_and_frozen(spm, images):
    reward = StepAwareReward(*spm)
    assert isinstance(reward, StepReward)
    images.requires_grad_()
    reward(images, PROMPTS, at(501)).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in reward.model.parameters())


def test_the_step_aware_reward_encodes_each_prompt_once(spm, images, monkeypatch):
    reward, encoded = StepAwareReward(*spm), []
    encode = reward.model.model.get_text_features
    monkeypatch.setattr(
        reward.model.model, "get_text_features", lambda **k: encoded.append(len(k["input_ids"])) or encode(**k)
    )
    for _ in range(3):
        reward(images, ["a cat", "a dog", "a cat"], at(1))
    assert encoded == [1, 1]


def test_the_callers_autocast_does_not_reach_the_scores(spm, images):
    model = perturbed(spm[0])
    expected = StepAwareReward(model, spm[1])(images, PROMPTS, at(501))
    fresh = StepAwareReward(model, spm[1])  # no text cached
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fresh(images, PROMPTS, at(501)), expected)


def test_the_step_aware_reward_refuses_lengths_that_differ(spm, images):
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


SRC = Path(__file__).parents[2] / "src"
SAVE = """
import sys
from attune.spm.model import from_clip, save
save(*from_clip(sys.argv[1]), sys.argv[2])
"""


def test_the_saved_bytes_do_not_depend_on_where_the_hub_is_looked_for(clip_folder, tmp_path):
    """transformers notes in tokenizer_config.json whether HF_HUB_OFFLINE was set; DVC would see another model."""
    saved = {}
    for offline in ("0", "1"):  # read when huggingface_hub is imported, so each needs a process of its own
        environment = os.environ | {"HF_HUB_OFFLINE": offline, "PYTHONPATH": str(SRC)}
        folder = tmp_path / offline
        subprocess.run([sys.executable, "-c", SAVE, clip_folder, str(folder)], check=True, env=environment)
        saved[offline] = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert saved["0"] == saved["1"]
    assert set(saved["0"]) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_a_saved_tokenizer_is_the_one_that_was_given(spm, tmp_path):
    """Nothing but how it was found is left out, and the one given is not touched."""
    before = dict(spm[1].init_kwargs)
    save(*spm, tmp_path)
    assert spm[1].init_kwargs == before
    again = load(tmp_path)[1]
    assert again(PROMPTS, padding=True).input_ids == spm[1](PROMPTS, padding=True).input_ids
    for token in ("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length"):
        assert getattr(again, token) == getattr(spm[1], token)


def test_the_saved_bytes_do_not_depend_on_the_calls_before(spm, tmp_path):
    """A call leaves its padding and truncation in the tokenizer; a resumed training makes other calls."""
    save(*spm, tmp_path / "before")
    spm[1](PROMPTS, padding="max_length", truncation=True, max_length=9)
    save(*spm, tmp_path / "after")
    files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in sorted(tmp_path.iterdir())]
    assert files[0] == files[1]
    assert spm[1].backend_tokenizer.truncation["max_length"] == 9  # the one that was given is not touched


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


def test_a_single_file_needs_its_clip(spm, tmp_path):
    save_file(spm[0].state_dict(), tmp_path / "spm.safetensors")
    with pytest.raises(ValueError, match=r"spm\.safetensors is no folder; a single file needs the CLIP"):
        load(tmp_path / "spm.safetensors")


def test_a_plain_clip_is_not_a_preference_model(clip_folder):
    with pytest.raises(ValueError, match="t_embedder"):
        load(clip_folder)
