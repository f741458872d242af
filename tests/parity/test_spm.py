"""The preference model against the authors' code: cases 7 (scores), 8 (loss), 9 (noising), 10 (labels)."""

import pytest
import torch
from golden.reading import PROMPTS, assert_close, tensors, write_clip, write_spm

from attune.diffusion.process import add_noise, at
from attune.interfaces import Conditioning
from attune.preference.model import (
    StepAwareReward,
    inference_pixels,
    load,
    timestep_embedding,
    training_pixels,
)
from attune.preference.noising import one_step_latents
from attune.preference.objective import preference_criterion, relabel

pytestmark = pytest.mark.parity
torch.set_num_threads(1)

SCORES = 2e-4  # allowed error of scores near 100 cos
SIZES = {
    "up_16x16": slice(0, 4),
    "nonsq_24x40": slice(1, 3),
    "nonsq_40x26": slice(0, 4),
    "down_48x48": slice(0, 1),
}
SCALING_FACTOR = 0.18215
ALPHAS_CUMPROD = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    return load(write_spm(folder / "spm.bin"), clip=str(write_clip(folder / "clip")))


@pytest.fixture(scope="module")
def case():
    return tensors("07_spm_score")


def test_timesteps_are_embedded_as_in_the_authors_code(spm, case):
    assert_close(timestep_embedding(case["timesteps"]), case["timestep_embedding_256"])
    assert_close(spm[0].model.t_embedder(case["timesteps"]), case["t_embedder"])


def test_text_features(spm, case):
    clip, tokenizer = spm[0].model, spm[1]
    ids = tokenizer(PROMPTS["07"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ids, case["input_ids"])
    assert_close(clip.get_text_features(input_ids=ids).pooler_output, case["text_features"])


@pytest.mark.parametrize("size", SIZES)
def test_scores_and_features(spm, case, size):
    rows = SIZES[size]
    images, t = case[f"{size}.images"] / 2 + 0.5, case["timesteps"][rows]
    features = spm[0].image_features(inference_pixels(images, 32), t)
    assert_close(features, case[f"{size}.image_features"])
    assert_close(StepAwareReward(*spm)(images, PROMPTS["07"][rows], t), case[f"{size}.score"], absolute=SCORES)


def test_inference_preprocessing(case):
    pixels = inference_pixels(case["nonsq_40x26.images"][:2] / 2 + 0.5, 32)
    assert_close(pixels, case["nonsq_40x26.pixel_values"])


def test_old_position_indices_do_not_matter(spm, tmp_path):
    old = {f"model.{tower}_model.embeddings.position_ids": torch.arange(17.0)[None] for tower in ("text", "vision")}
    again, _ = load(write_spm(tmp_path / "old.bin", **old), clip=str(write_clip(tmp_path / "clip")))
    assert all(torch.equal(value, spm[0].state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("scale", ["scale20", "scale100"])
def test_criterion_and_its_gradients(scale):
    case = tensors("08_spm_criterion")
    names = ("text_features", "image_0_features", "image_1_features", f"{scale}.logit_scale_exp")
    text, image_0, image_1, temperature = (case[name].clone().requires_grad_() for name in names)
    scores = [temperature * (text * image).sum(-1) for image in (image_0, image_1)]
    loss = preference_criterion(*scores, case["label_0"], 1 / case["num_examples_per_prompt"])
    loss.backward()
    assert_close(loss, case[f"{scale}.pairs.loss"])
    for name, leaf in {
        "text": text,
        "image_0": image_0,
        "image_1": image_1,
        "logit_scale_exp": temperature,
    }.items():
        assert_close(leaf.grad, case[f"{scale}.pairs.grad_{name}"])


def test_noising_and_the_one_step_prediction():
    case = tensors("09_spm_noising_sd")
    nothing = Conditioning({})
    for i in "01":
        x_0, noise, t = SCALING_FACTOR * case[f"posterior_sample_{i}"], case["noise"], case["timesteps"]
        assert_close(add_noise(x_0, noise, at(ALPHAS_CUMPROD, t, x_0)), case[f"noised_latents_{i}"])
        null, cond = case[f"unet_out_{i}"].chunk(2)
        guided = null + 5 * (cond - null)
        predicted = one_step_latents(lambda *_, eps=guided: eps, ALPHAS_CUMPROD, x_0, t, noise, nothing)
        assert_close(predicted, case[f"pred_x0_latents_{i}"])
        assert_close(training_pixels(case[f"decoded_{i}"] / 2 + 0.5, 32), case[f"pixel_values_{i}"])


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_labels_from_scores(threshold):
    case = tensors("10_spm_relabel")
    label_0 = relabel(case["scores_0"], case["scores_1"], threshold)
    assert torch.equal(label_0, case[f"thr{threshold}.label_0"])
    assert torch.equal(1 - label_0, case[f"thr{threshold}.label_1"])
