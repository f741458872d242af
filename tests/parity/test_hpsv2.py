"""HPSv2 against the authors' code: case 15, gradients too."""

import pytest
import torch
import torch.nn.functional as F
from golden.reading import PROMPTS, TOKENIZER, tensors, write_hps

from attune.clip.model import image_features, load_tokenizer, text_features
from attune.clip.open_clip import save_open_clip, to_open_clip
from attune.clip.pixels import normalise
from attune.rewards import hpsv2

pytestmark = pytest.mark.parity

GRADIENT = 1e-4


def unit(uint8_chw: torch.Tensor) -> torch.Tensor:
    """A stored 8-bit image as (1, 3, H, W) in [0, 1]."""
    return uint8_chw[None].float() / 255


def block(file) -> dict[str, str]:
    """The scorer's block for a tiny model."""
    return {"version": "2.0", "path": str(file), "tokenizer": str(TOKENIZER)}


@pytest.fixture(scope="module")
def hps_paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hps")
    return {size: block(write_hps(folder, size)) for size in (28, 224)}


def test_hps_model_and_gradient(table, hps_paths):
    case = tensors("15a_hps_model")
    model = hpsv2.load(hpsv2.Config(**hps_paths[28])).model
    pixels = case["pixel_values"].requires_grad_()
    image = image_features(model, pixels)
    text = F.normalize(model.get_text_features(input_ids=case["token_ids"]).pooler_output, dim=-1)
    scores = (image * text[:2]).sum(-1)
    (scores.sum() / 4).backward()  # the stored gradient is of the mean over four images
    plain = image_features(model, pixels, unit=False)
    table.close("15a", "image features", plain, case["image_features_unnormalised"][:2])
    table.close("15a", "unit image features", image, case["image_features"][:2])
    table.close("15a", "unit text features", text, case["text_features"])
    table.close("15a", "scores", scores, case["hps_score"][:2])
    table.close("15a", "gradient, pixels", pixels.grad, case["grad_pixels_of_mean_score"], rel=GRADIENT)


def test_hps_text_is_unchanged_by_our_tokenizer(table, hps_paths):
    case, scorer = tensors("15a_hps_model"), hpsv2.load(hpsv2.Config(**hps_paths[28]))
    cleaned = [hpsv2.clean_text(prompt) for prompt in PROMPTS["15a"]]
    text = text_features(scorer.model, load_tokenizer(str(TOKENIZER)), cleaned)
    table.close("15a", "text features of our tokens", text, case["text_features"])


def test_hps_layout_survives_a_round_trip(hps_paths, tmp_path):
    model = hpsv2.load(hpsv2.Config(**hps_paths[28])).model
    save_open_clip(model, tmp_path / "again.safetensors")
    again = hpsv2.load(hpsv2.Config(**block(tmp_path / "again.safetensors"))).model
    ours, original = to_open_clip(again), tensors("tiny_hps28")
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[name], original[name]) for name in original)


SHAPES = {
    "square_56x56": True,
    "rgba_40x50": True,
    "down_97x61": True,
    "up_23x41": True,
    "halfround_28x64": True,
    "quirk_longest_equals_target_56x40": True,
    "down_97x61_noantialias": False,
}


@pytest.mark.parametrize("name", SHAPES)
def test_hps_preprocessing(table, name):
    line, case, antialias = name.replace("_", " "), tensors("15b_hps_preprocess"), SHAPES[name]
    name = name.removesuffix("_noantialias")
    expected = case[f"{name}.out_{'antialias' if antialias else 'noantialias'}"][None]
    image = case[f"{name}.uint8_chw"][:3]  # the authors' code keeps an alpha channel, on which its model then fails
    pixels = hpsv2.hps_pixels(unit(image), 56, antialias)
    height, width = expected.shape[-2:]
    top, left = (56 - height) // 2, (56 - width) // 2
    table.close("15b", f"pixels, {line}", pixels[..., top : top + height, left : left + width], expected)
    border = pixels.clone()
    border[..., top : top + height, left : left + width] = normalise(torch.zeros(1, 3, 1, 1))
    table.close("15b", "border", border, normalise(torch.zeros(1, 3, 56, 56)))


def test_hps_scores_of_pictures(table, hps_paths):
    case, scorer = tensors("15c_hps_score_and_loss"), hpsv2.load(hpsv2.Config(**hps_paths[224]))
    images = [unit(case[f"image{i}.uint8_chw"]) for i in range(3)]
    scores = torch.cat([scorer(image, [PROMPTS["15c"][1]]) for image in images])
    table.close("15c", "scores of pictures", scores, case["hpsv2_score"])


def test_hps_as_alignprop_optimises_it(table, hps_paths):
    case = tensors("15c_hps_score_and_loss")
    scorer = hpsv2.load(hpsv2.Config(**hps_paths[224], preprocess="square"))
    images = case["alignprop.images"].requires_grad_()
    score = scorer((images / 2 + 0.5).clamp(0, 1), PROMPTS["15c"][:1])
    ((1 - score).sum() / 3).backward()  # the stored gradient is of the mean over three images
    table.close("15c AlignProp", "scores", score, case["alignprop.score"])
    table.close("15c AlignProp", "loss", 1 - score, case["alignprop.loss"])
    gradient = case["alignprop.grad_images_of_mean_loss"]
    table.close("15c AlignProp", "gradient, images", images.grad, gradient, rel=GRADIENT)
