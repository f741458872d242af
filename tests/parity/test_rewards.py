"""The scorers against the authors' code: cases 14 (aesthetic), 15 (HPSv2), 16 (PickScore); gradients too."""

import shutil

import PIL
import pytest
import torch
import torch.nn.functional as F
from golden.reading import HERE, PROMPTS, TOKENIZER, assert_close, tensors, write_clip, write_hps
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from attune.clip import clip_pixels, clip_pixels_pil, image_features, load_tokenizer, text_features
from attune.interfaces import Reward
from attune.rewards import aesthetic, hpsv2, oracle, pickscore

pytestmark = pytest.mark.parity
torch.set_num_threads(1)

GRADIENT = 1e-4
SCORES = 2e-4
PILLOW = int(PIL.__version__.split(".")[0])
PILLOW_LEVEL = 0.0155  # one 8-bit level in normalised units: what Pillow 13 moved against the version used


def unit(uint8_chw: torch.Tensor) -> torch.Tensor:
    """A stored 8-bit image as (1, 3, H, W) in [0, 1]."""
    return uint8_chw[None].float() / 255


# ---------------------------------------------------------------- 14


@pytest.fixture(scope="module")
def aesthetic_paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aesthetic")
    shutil.copyfile(HERE / "tiny_aesthetic.json", folder / "config.json")
    text = {k: v for k, v in CLIPModel(CLIPConfig.from_pretrained(folder)).state_dict().items() if "text" in k}
    save_file(text | tensors("tiny_aesthetic"), folder / "model.safetensors", metadata={"format": "pt"})
    save_file(affine_head(), folder / "head.safetensors")
    torch.save(affine_head(), folder / "head.pth")
    return {"path": str(folder), "head": str(folder / "head.pth")}


def affine_head() -> dict[str, torch.Tensor]:
    """The published head collapsed into its first layer, under the published names."""
    case = tensors("14_aesthetic")
    head = {f"layers.{n}.{kind}": torch.ones(1, 1) if kind == "weight" else torch.zeros(1)
            for n in (2, 4, 6, 7) for kind in ("weight", "bias")}  # fmt: skip
    slope = case["grad_embedding"].double()
    offset = (case["scores_f64"] - case["unit_embeddings"].double() @ slope).mean()
    return head | {"layers.0.weight": slope.float()[None], "layers.0.bias": offset.float()[None]}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_head(aesthetic_paths, suffix):
    case = tensors("14_aesthetic")
    head = aesthetic.load_head(aesthetic_paths["head"].replace(".pth", suffix))
    embeddings = case["unit_embeddings"].requires_grad_()
    scores = head(embeddings)
    scores.sum().backward()
    assert_close(scores, case["scores"])
    assert_close(embeddings.grad[0], case["grad_embedding"])


def test_aesthetic_features_and_score(aesthetic_paths):
    case = tensors("14_aesthetic")
    scorer = aesthetic.load(aesthetic.Config(**aesthetic_paths))
    pixels = case["direct.pixel_values_4x4"].repeat_interleave(56, 2).repeat_interleave(56, 3)
    assert_close(image_features(scorer.model, pixels, normalise=False), case["direct.clip_image_features"])
    assert_close(scorer.head(image_features(scorer.model, pixels)), case["direct.reward"])


def test_aesthetic_as_alignprop_optimises_it(aesthetic_paths):
    case = tensors("14_aesthetic")
    scorer = aesthetic.load(aesthetic.Config(**aesthetic_paths, preprocess="square"))
    images = case["small48_sym.images"].requires_grad_()
    reward = scorer((images / 2 + 0.5).clamp(0, 1), [""])
    loss = (reward - 10).abs()
    (0.5 * loss.mean()).backward()  # the stored gradient is of the mean over two images
    assert_close(reward, case["small48_sym.reward"])
    assert_close(loss, case["small48_sym.loss"])
    assert_close(images.grad, case["small48_sym.grad_images_of_mean_loss"], rel=GRADIENT)


# ---------------------------------------------------------------- 15


@pytest.fixture(scope="module")
def hps_paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hps")
    return {size: {"path": str(write_hps(folder, size)), "tokenizer": str(TOKENIZER)} for size in (28, 224)}


def test_hps_model_and_gradient(hps_paths):
    case = tensors("15a_hps_model")
    model = hpsv2.load(hpsv2.Config(**hps_paths[28])).model
    pixels = case["pixel_values"].requires_grad_()
    image = image_features(model, pixels)
    text = F.normalize(model.get_text_features(input_ids=case["token_ids"]).pooler_output, dim=-1)
    scores = (image * text[:2]).sum(-1)
    (scores.sum() / 4).backward()  # the stored gradient is of the mean over four images
    assert_close(image_features(model, pixels, normalise=False), case["image_features_unnormalised"][:2])
    assert_close(image, case["image_features"][:2])
    assert_close(text, case["text_features"])
    assert_close(scores, case["hps_score"][:2])
    assert_close(pixels.grad, case["grad_pixels_of_mean_score"], rel=GRADIENT)


def test_hps_text_is_unchanged_by_our_tokenizer(hps_paths):
    case, scorer = tensors("15a_hps_model"), hpsv2.load(hpsv2.Config(**hps_paths[28]))
    cleaned = [hpsv2.clean_text(prompt) for prompt in PROMPTS["15a"]]
    assert_close(text_features(scorer.model, load_tokenizer(str(TOKENIZER)), cleaned), case["text_features"])


def test_hps_layout_survives_a_round_trip(hps_paths, tmp_path):
    model = hpsv2.load(hpsv2.Config(**hps_paths[28])).model
    hpsv2.save_open_clip(model, tmp_path / "again.safetensors")
    again = hpsv2.load(hpsv2.Config(path=str(tmp_path / "again.safetensors"), tokenizer=str(TOKENIZER))).model
    ours, original = hpsv2.to_open_clip(again), tensors("tiny_hps28")
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[name], original[name]) for name in original)


SHAPES = {
    "down_97x61": True,
    "up_23x41": True,
    "halfround_28x64": True,
    "quirk_longest_equals_target_56x40": True,
    "down_97x61_noantialias": False,
}


@pytest.mark.parametrize("name", SHAPES)
def test_hps_preprocessing(name):
    case, antialias = tensors("15b_hps_preprocess"), SHAPES[name]
    name = name.removesuffix("_noantialias")
    expected = case[f"{name}.out_{'antialias' if antialias else 'noantialias'}"][None]
    pixels = hpsv2.hps_pixels(unit(case[f"{name}.uint8_chw"]), 56, antialias)
    height, width = expected.shape[-2:]
    top, left = (56 - height) // 2, (56 - width) // 2
    assert_close(pixels[..., top : top + height, left : left + width], expected)
    border = pixels.clone()
    border[..., top : top + height, left : left + width] = hpsv2.normalise(torch.zeros(1, 3, 1, 1))
    assert_close(border, hpsv2.normalise(torch.zeros(1, 3, 56, 56)))


def test_hps_scores_of_pictures(hps_paths):
    case, scorer = tensors("15c_hps_score_and_loss"), hpsv2.load(hpsv2.Config(**hps_paths[224]))
    images = [unit(case[f"image{i}.uint8_chw"]) for i in range(3)]
    scores = torch.cat([scorer(image, [PROMPTS["15c"][1]]) for image in images])
    assert_close(scores, case["hpsv2_score"])


def test_hps_as_alignprop_optimises_it(hps_paths):
    case = tensors("15c_hps_score_and_loss")
    scorer = hpsv2.load(hpsv2.Config(**hps_paths[224], preprocess="square"))
    images = case["alignprop.images"].requires_grad_()
    score = scorer((images / 2 + 0.5).clamp(0, 1), PROMPTS["15c"][:1])
    ((1 - score).sum() / 3).backward()  # the stored gradient is of the mean over three images
    assert_close(score, case["alignprop.score"])
    assert_close(1 - score, case["alignprop.loss"])
    assert_close(images.grad, case["alignprop.grad_images_of_mean_loss"], rel=GRADIENT)


# ---------------------------------------------------------------- 16


@pytest.fixture(scope="module")
def pick(tmp_path_factory):
    folder = write_clip(tmp_path_factory.mktemp("pickscore") / "clip")
    return pickscore.load(pickscore.Config(path=str(folder)))


def test_pickscore_text(pick):
    case, tokenizer = tensors("16a_pickscore"), load_tokenizer(str(TOKENIZER))
    assert_close(pick.model.logit_scale.exp(), case["logit_scale_exp"])
    for i, prompt in enumerate(PROMPTS["16a"]):
        ids = tokenizer([prompt], padding=True, truncation=True, max_length=77, return_tensors="pt").input_ids
        assert torch.equal(ids, case[f"prompt{i}.input_ids"])
        assert_close(text_features(pick.model, tokenizer, [prompt]), case[f"prompt{i}.text_embs"])


def test_pickscore_of_stored_pixels(pick):
    case = tensors("16a_pickscore")
    image = image_features(pick.model, case["pixel_values"])
    assert_close(image, case["image_embs"])
    for i in range(3):
        cosine = image @ case[f"prompt{i}.text_embs"][0]
        assert_close(cosine, case[f"prompt{i}.cosines"])
        assert_close(pick.model.logit_scale.exp() * cosine, case[f"prompt{i}.scores"], absolute=SCORES)


def test_pickscore_of_pictures(pick):
    """Pillow 13 moves pixels of image 2 by one level; the scores of the others must not have noticed."""
    case, same = tensors("16a_pickscore"), []
    for i in range(4):
        image, stored = unit(case[f"image{i}.uint8_chw"]), case["pixel_values"][i : i + 1]
        pixels = clip_pixels_pil(image, 32)
        assert_close(pixels, stored, absolute=PILLOW_LEVEL if PILLOW >= 13 else 0.0)
        if float((pixels - stored).abs().max()) < 1e-5:
            same.append(i)
            scores = pick(image.expand(3, -1, -1, -1), PROMPTS["16a"])
            expected = torch.stack([case[f"prompt{j}.scores"][i] for j in range(3)])
            assert_close(scores, expected, absolute=SCORES)
    assert same == ([0, 1, 3] if PILLOW >= 13 else [0, 1, 2, 3])


# ---------------------------------------------------------------- what all of them promise


@pytest.fixture(scope="module")
def scorers(aesthetic_paths, hps_paths, tmp_path_factory):
    clip = str(write_clip(tmp_path_factory.mktemp("scorers") / "clip"))
    return {
        "pickscore": pickscore.load(pickscore.Config(path=clip, preprocess="tensor")),
        "pickscore-pil": pickscore.load(pickscore.Config(path=clip)),
        "hpsv2": hpsv2.load(hpsv2.Config(**hps_paths[28], expected_mean=[-1, 1])),
        "aesthetic": aesthetic.load(aesthetic.Config(**aesthetic_paths, preprocess="tensor")),
        "oracle": oracle.load(oracle.Config()),
    }


NAMES = ("pickscore", "pickscore-pil", "hpsv2", "aesthetic", "oracle")
SCENES = ["a small red circle on a white background", "a large blue square on a white background"]


@pytest.fixture
def pictures():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_range_shape_and_number_are_checked(scorers, pictures, name):
    for wrong in (pictures * 2 - 1, pictures + 0.01 + (1 - pictures.max()), pictures.log() * 0 / 0):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            scorers[name](wrong, SCENES)
    with pytest.raises(ValueError, match="1 prompts"):
        scorers[name](pictures, SCENES[:1])
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        scorers[name](pictures[:, :1], SCENES)


@pytest.mark.parametrize("name", NAMES)
def test_scores_follow_their_images(scorers, pictures, name):
    scores = scorers[name](pictures, SCENES)
    assert scores.shape == (2,)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scorers[name](pictures.flip(0), SCENES[::-1]).flip(0), scores, rtol=1e-5, atol=1e-5)
    assert isinstance(scorers[name], Reward)
    assert scorers[name].license
    assert scorers[name].range == ((-1.0, 1.0) if name == "hpsv2" else None)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_pixels_iff_declared(scorers, pictures, name):
    score = scorers[name](pictures.requires_grad_(), SCENES).sum()
    assert score.requires_grad == scorers[name].differentiable
    if scorers[name].differentiable:
        score.backward()
        assert pictures.grad.abs().sum() > 0


def test_autocast_does_not_touch_scores(scorers, pictures):
    expected = scorers["hpsv2"](pictures, SCENES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorers["hpsv2"](pictures, SCENES), expected)


def test_tensor_preprocessing_is_pillows_up_to_rounding(pictures):
    smooth = F.interpolate(pictures, (70, 90), mode="bicubic").clamp(0, 1)
    difference = (clip_pixels(smooth, 32) - clip_pixels_pil(smooth, 32)).abs()
    assert difference.mean() < 0.006
    assert difference.max() < 0.1  # 0.025 of full scale: Pillow also rounds and clamps between its two passes


def test_oracle_explains_itself(scorers, pictures):
    parts = scorers["oracle"].parts(pictures, SCENES)
    score = torch.from_numpy((parts["faithfulness"] * parts["appeal"]) ** 0.5).float()
    torch.testing.assert_close(score, scorers["oracle"](pictures, SCENES))


def test_aesthetic_features_have_unit_length(scorers, pictures):
    features = scorers["aesthetic"].features(pictures)
    assert features.shape == (2, 768)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_the_wrong_activation_is_refused(aesthetic_paths):
    with pytest.raises(ValueError, match="quick_gelu"):
        aesthetic.load(aesthetic.Config(**aesthetic_paths, hidden_act="gelu"))


def test_incomplete_checkpoints_are_refused(tmp_path):
    folder = write_clip(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"visual_projection\.weight"):
        pickscore.load(pickscore.Config(path=str(folder)))
    file = write_hps(tmp_path, 28)
    broken = tensors("tiny_hps28") | {"visual.stranger": torch.zeros(1)}
    del broken["visual.proj"]
    torch.save({"state_dict": broken}, file)
    with pytest.raises(ValueError, match=r"missing \['visual.proj'\], unexpected \['visual.stranger'\]"):
        hpsv2.load(hpsv2.Config(path=str(file), tokenizer=str(TOKENIZER)))


def test_prompts_are_cleaned_as_open_clip_does():
    mojibake = "The \u201cCaf\u00c3\u00a9\u201d &amp;amp; \t a \ufb01sh "
    assert hpsv2.clean_text(mojibake) == 'the "caf\u00e9" & a fish'


def test_half_precision_weights_are_read_as_float32(tmp_path):
    folder = write_clip(tmp_path / "clip")
    weights = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert pickscore.load(pickscore.Config(path=str(folder))).model.dtype == torch.float32
