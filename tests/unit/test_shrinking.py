"""Large images made small: every scorer, the preference model and the data show what Pillow's filters or none make.

The images change from pixel to pixel. An antialiased filter averages over them, one without picks some of them, and the
two differ by a tenth of the range and more: a flag set wrongly cannot hide.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attune.clip.pixels import MEAN, STD
from attune.data.images import resize_center_crop
from attune.rewards import aesthetic, clipscore, hpsv2, imagereward, pickscore
from attune.spm.model import StepAwareReward, from_clip, training_pixels
from tiny_scorers import write_imagereward

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded"
LARGE, SMALL = 100, 32  # pixels; the embedded scorers take 32
PROMPTS = ["a small red circle on a white background"] * 2
ROUNDED = 0.012  # three of 255 levels: Pillow rounds 8-bit images between its two passes
EXACT = 1e-5
BLOCKS = {
    pickscore: {"path": str(EMBEDDED / "pickscore")},
    clipscore: {"model": "ViT-tiny/4@32", "path": str(EMBEDDED / "aesthetic"), "hidden_act": "gelu"},
    aesthetic: {
        "path": str(EMBEDDED / "aesthetic"),
        "head": str(EMBEDDED / "aesthetic/head.safetensors"),
        "hidden_act": "gelu",
    },
    hpsv2: {
        "version": "2.1",
        "path": str(EMBEDDED / "hpsv2/open_clip_model.safetensors"),
        "tokenizer": str(EMBEDDED / "hpsv2"),
    },
}


@pytest.fixture(scope="module")
def images():
    """A checkerboard of single pixels, and noise: whole 8-bit levels between 64 and 192, so no filter leaves [0, 1]."""
    rows, columns = np.indices((LARGE, LARGE))
    board = np.where((rows + columns) % 2, 64, 192)
    noise = np.random.default_rng(0).integers(64, 193, (3, LARGE, LARGE))
    return torch.from_numpy(np.stack([np.stack([board] * 3), noise])).float() / 255


def by_pillow(images: torch.Tensor, filter: Image.Resampling) -> torch.Tensor:
    """Each channel resized as a float image, for which Pillow rounds nothing; its filters are antialiased."""
    channels = [Image.fromarray(channel.numpy()).resize((SMALL, SMALL), filter) for channel in images.flatten(0, 1)]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).unflatten(0, images.shape[:2])


def by_four_pixels(images: torch.Tensor) -> torch.Tensor:
    """Keys' cubic convolution with a = -0.75 on the four nearest pixels of each axis: no antialias."""
    a, places = -0.75, (torch.arange(SMALL) + 0.5) * LARGE / SMALL - 0.5
    weights = torch.zeros(SMALL, LARGE)
    for row, place in enumerate(places.tolist()):
        for pixel in range(int(place) - 1, int(place) + 3):
            d = abs(place - pixel)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[row, min(max(pixel, 0), LARGE - 1)] += near if d <= 1 else far
    return weights @ images @ weights.T


def shown(vision: torch.nn.Module, score: object) -> torch.Tensor:
    """The pixels, in [0, 1], that a vision tower is given when something is scored."""
    seen = []
    hook = vision.embeddings.patch_embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    score()
    hook.remove()
    return seen[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def test_the_filters_are_told_apart_by_these_images(images):
    bicubic, bilinear = (by_pillow(images, f) for f in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR))
    for one, other in ((bicubic, by_four_pixels(images)), (bilinear, by_four_pixels(images))):
        assert ((one - other).abs().amax((1, 2, 3)) > 0.1).all()
    assert (bicubic - bilinear)[1].abs().max() > 2 * ROUNDED


PREPARED = [(module, how) for module in (pickscore, clipscore, aesthetic) for how in ("pil", "tensor", "square")]
PREPARED += [(imagereward, "pil"), (imagereward, "tensor")]


@pytest.mark.parametrize(("scorer", "preprocess"), PREPARED, ids=lambda value: getattr(value, "__name__", value))
def test_scorers_shrink_as_pillow_does(images, scorer, preprocess, tmp_path):
    block = write_imagereward(tmp_path) if scorer is imagereward else BLOCKS[scorer]
    loaded = scorer.load(scorer.Config(**block, preprocess=preprocess))
    vision = loaded.model.vision if scorer is imagereward else loaded.model.vision_model
    filter = Image.Resampling.BILINEAR if preprocess == "square" else Image.Resampling.BICUBIC
    difference = shown(vision, lambda: loaded(images, PROMPTS)) - by_pillow(images, filter)
    assert difference.abs().max() < (ROUNDED if preprocess == "pil" else EXACT)


@pytest.mark.parametrize("scorer", [clipscore, aesthetic], ids=lambda m: m.__name__[15:])
def test_features_are_of_the_same_pixels(images, scorer):
    loaded = scorer.load(scorer.Config(**BLOCKS[scorer], preprocess="tensor"))
    pixels = shown(loaded.model.vision_model, lambda: loaded.features(images))
    assert (pixels - by_pillow(images, Image.Resampling.BICUBIC)).abs().max() < EXACT


def test_hpsv2_shrinks_as_its_settings_say(images):
    for settings, expected in (
        ({}, by_pillow(images, Image.Resampling.BICUBIC)),
        ({"antialias": False}, by_four_pixels(images)),
        ({"preprocess": "square"}, by_pillow(images, Image.Resampling.BILINEAR)),
    ):
        loaded = hpsv2.load(hpsv2.Config(**BLOCKS[hpsv2], **settings))
        pixels = shown(loaded.model.vision_model, lambda loaded=loaded: loaded(images, PROMPTS))
        assert (pixels - expected).abs().max() < EXACT


def test_the_preference_model_shrinks_without_antialias_as_its_authors_do(images):
    reward = StepAwareReward(*from_clip(str(EMBEDDED / "pickscore")))
    expected = by_four_pixels(images)
    pixels = shown(reward.model.model.vision_model, lambda: reward(images, PROMPTS, torch.tensor([1, 501])))
    assert (pixels - expected).abs().max() < EXACT
    trained = training_pixels(images, SMALL) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert (trained - expected).abs().max() < EXACT


def test_data_is_shrunk_as_pillow_does(images):
    expected = by_pillow(images, Image.Resampling.BICUBIC)
    for image, small in zip(images, expected, strict=True):
        array = (image * 255).round().byte().permute(1, 2, 0).numpy()
        found = resize_center_crop(Image.fromarray(array), SMALL).transpose(2, 0, 1) / 255
        assert np.abs(found - small.numpy()).max() < ROUNDED
