"""PickScore against the authors' code: case 16a."""

import PIL
import pytest
import torch
from golden.reading import PROMPTS, TOKENIZER, tensors, write_clip

from attune.clip.model import image_features, load_tokenizer, text_features
from attune.clip.pixels import clip_pixels_pil
from attune.rewards import pickscore

pytestmark = pytest.mark.parity

SCORES = 2e-4
PILLOW = int(PIL.__version__.split(".")[0])
PILLOW_LEVEL = 0.0155  # one 8-bit level in normalised units: what Pillow 13 moved against the version used


def unit(uint8_chw: torch.Tensor) -> torch.Tensor:
    """A stored 8-bit image as (1, 3, H, W) in [0, 1]."""
    return uint8_chw[None].float() / 255


@pytest.fixture(scope="module")
def pick(tmp_path_factory):
    folder = write_clip(tmp_path_factory.mktemp("pickscore") / "clip")
    return pickscore.load(pickscore.Config(path=str(folder)))


def test_pickscore_text(table, pick):
    case, tokenizer = tensors("16a_pickscore"), load_tokenizer(str(TOKENIZER))
    table.close("16a", "temperature", pick.model.logit_scale.exp(), case["logit_scale_exp"])
    for i, prompt in enumerate(PROMPTS["16a"]):
        ids = tokenizer([prompt], padding=True, truncation=True, max_length=77, return_tensors="pt").input_ids
        table.exact("16a", "token ids", ids, case[f"prompt{i}.input_ids"])
        text = text_features(pick.model, tokenizer, [prompt])
        table.close("16a", "text features", text, case[f"prompt{i}.text_embs"])


def test_pickscore_of_stored_pixels(table, pick):
    case = tensors("16a_pickscore")
    image = image_features(pick.model, case["pixel_values"])
    table.close("16a", "image features", image, case["image_embs"])
    for i in range(3):
        cosine = image @ case[f"prompt{i}.text_embs"][0]
        table.close("16a", "cosines", cosine, case[f"prompt{i}.cosines"])
        scores = pick.model.logit_scale.exp() * cosine
        table.close("16a", "scores of stored pixels", scores, case[f"prompt{i}.scores"], absolute=SCORES)


def test_pickscore_of_pictures(table, pick):
    """Pillow 13 moves pixels of image 2 by one level; the scores of the others must not have noticed."""
    case, same = tensors("16a_pickscore"), []
    for i in range(4):
        image, stored = unit(case[f"image{i}.uint8_chw"]), case["pixel_values"][i : i + 1]
        pixels = clip_pixels_pil(image, 32)
        table.close("16a", "pixels", pixels, stored, absolute=PILLOW_LEVEL if PILLOW >= 13 else 0.0)
        if float((pixels - stored).abs().max()) < 1e-5:
            same.append(i)
            scores = pick(image.expand(3, -1, -1, -1), PROMPTS["16a"])
            expected = torch.stack([case[f"prompt{j}.scores"][i] for j in range(3)])
            table.close("16a", "scores of pictures", scores, expected, absolute=SCORES)
    assert same == ([0, 1, 3] if PILLOW >= 13 else [0, 1, 2, 3])
