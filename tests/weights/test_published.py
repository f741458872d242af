"""The published scorers give the published numbers: `pytest -m weights`, for who has the files (docs/scorers.md)."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attune.rewards import aesthetic, clipscore, hpsv2, imagereward, pickscore

pytestmark = pytest.mark.weights

CAT = "A cat with two horns on its head"


@pytest.fixture(autouse=True, scope="module")
def all_cores():
    """These networks are large; all other tests have one thread (conftest.py)."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


def given(*names: str) -> list[str]:
    """Paths from ATTUNE_<name>; skips the test if one is not set."""
    variables = [f"ATTUNE_{name}" for name in names]
    if missing := [variable for variable in variables if not os.environ.get(variable)]:
        pytest.skip(f"{', '.join(missing)} not set")
    return [os.environ[variable] for variable in variables]


def picture(file: str | Path) -> torch.Tensor:
    """An image file as (1, 3, H, W) in [0, 1]."""
    array = np.asarray(Image.open(file).convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(
    ("version", "variable", "prompt", "expected"),
    [("2.0", "HPSV2_0", CAT, 0.2876), ("2.1", "HPSV2_1", "cat with horn", 0.288)],
)
def test_hpsv2(version, variable, prompt, expected):
    """Values that users of the authors' package reported (issues 27 and 30), in half precision and some resize."""
    weights, tokenizer, image = given(variable, "CLIP_TOKENIZER", "HPSV2_IMAGE")
    scorer = hpsv2.load(hpsv2.Config(version=version, path=weights, tokenizer=tokenizer))
    assert scorer(picture(image), [prompt]).item() == pytest.approx(expected, abs=5e-3)


def test_imagereward():
    """The four images of the authors' README; decoders and Pillow's resize move the third digit."""
    weights, tokenizer, folder = given("IMAGEREWARD", "BERT_TOKENIZER", "IMAGEREWARD_IMAGES")
    scorer = imagereward.load(imagereward.Config(path=weights, tokenizer=tokenizer))
    prompt = "a generating of an ocean with clouds and birds, day time, low depth field effect"
    scores = [scorer(picture(Path(folder) / f"{n}.webp"), [prompt]).item() for n in (1, 2, 3, 4)]
    assert scores == pytest.approx([0.5812, 0.2745, -1.4132, -2.0296], abs=0.02)


def test_pickscore():
    """No published value for one image: in range for its prompt, and lower for a wrong one."""
    weights, tokenizer, image = given("PICKSCORE", "CLIP_TOKENIZER", "HPSV2_IMAGE")
    scorer = pickscore.load(pickscore.Config(path=weights, tokenizer=tokenizer))
    right, wrong = (scorer(picture(image), [prompt]).item() for prompt in (CAT, "a bowl of soup"))
    assert 17 < right < 25
    assert wrong < right - 1


def test_clipscore_and_aesthetic():
    """As for PickScore."""
    clip, head, image = given("CLIP_L", "AESTHETIC_HEAD", "HPSV2_IMAGE")
    scorer = clipscore.load(clipscore.Config(model="ViT-L/14", path=clip))
    right, wrong = (scorer(picture(image), [prompt]).item() for prompt in (CAT, "a bowl of soup"))
    assert 15 < right < 40
    assert wrong < right - 3
    assert 3 < aesthetic.load(aesthetic.Config(path=clip, head=head))(picture(image), [CAT]).item() < 9
