"""Options of the scorers: how images are shown, which tokenizer reads, what is pinned, refused or announced."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tiny_scorers
from attune.config import plugins
from attune.world.grammar import all_scenes

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models/embedded"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
BLOCKS = {
    "pickscore": {"path": str(MODELS / "pickscore")},
    "clipscore": {"path": str(MODELS / "aesthetic"), "model": "ViT-tiny/4@32", "hidden_act": "gelu"},
    "aesthetic": {"path": str(MODELS / "aesthetic"), "head": str(MODELS / "aesthetic/head.safetensors")}
    | {"hidden_act": "gelu"},
    "hpsv2": {"version": "2.1", "path": str(MODELS / "hpsv2/open_clip_model.safetensors")}
    | {"tokenizer": str(MODELS / "hpsv2")},
}
PROMPTS = [scene.prompt for scene in all_scenes()[:3]]
WIDE = torch.rand(3, 3, 44, 60, generator=torch.Generator().manual_seed(0))


def build(name, **changes):
    module = plugins.load("rewards", name)
    return module.load(module.Config(**(BLOCKS[name] | changes)), torch.device("cpu"))


def shown(scorer, images):
    """The pixel values that the image tower of a scorer is given, in the units of images."""
    seen = []
    model = scorer.model
    tower = model.vision_model if hasattr(model, "vision_model") else model.vision
    hook = tower.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["pixel_values"]), with_kwargs=True
    )
    scorer(images, PROMPTS)
    hook.remove()
    return seen[0] * STD + MEAN


def by_pillow(images, size):
    """Shortest side to `size` by Pillow's bicubic filter, the other rounded down; then the centre."""
    height, width = images.shape[-2:]
    found = []
    for image in (images * 255).round().byte().permute(0, 2, 3, 1).numpy():
        small = Image.fromarray(image).resize((int(size * width / height), size), Image.Resampling.BICUBIC)
        left = (small.width - size) // 2
        found.append(np.asarray(small.crop((left, 0, left + size, size))))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


# ---------------------------------------------------------------- dtype


@pytest.mark.parametrize("name", BLOCKS)
def test_half_precision_moves_scores_little_and_halves_the_matrices(name):
    """Scores move by a small part of what they differ by, whatever the caller's autocast, and are still float32."""
    images = (
        torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        * torch.linspace(0.2, 1, 16)[:, None, None, None]
    )
    prompts = [PROMPTS[i % 3] for i in range(16)]
    full, half = build(name, dtype="float32"), build(name, dtype="bfloat16")
    expected, found = full(images, prompts), half(images, prompts)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 0.1 * expected.std()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(full(images, prompts), expected)
        assert torch.equal(half(images, prompts), found)
    kinds = {type(m).__name__: m.weight.dtype for m in half.model.modules() if hasattr(m, "weight")}
    assert kinds["Linear"] == kinds["Conv2d"] == torch.bfloat16
    assert kinds["LayerNorm"] == torch.float32


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "pickscore"])
def test_gradients_pass_half_precision(name):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    shown_with = {} if name == "hpsv2" else {"preprocess": "tensor"}
    found = [
        torch.autograd.grad(build(name, dtype=dtype, **shown_with)(images, PROMPTS).sum(), images)[0]
        for dtype in ("float32", "bfloat16")
    ]
    assert F.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0) > 0.98


def test_only_another_dtype_makes_another_protocol():
    module = plugins.load("rewards", "hpsv2")
    default, full, half = (
        module.Config(**(BLOCKS["hpsv2"] | given)).settings()
        for given in ({}, {"dtype": "float32"}, {"dtype": "bfloat16"})
    )
    assert default == full
    assert "dtype" not in full
    assert half == full | {"dtype": "bfloat16"}


# ---------------------------------------------------------------- preprocess, antialias


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic"])
def test_preprocess_of_a_plain_clip(name):
    """pil: Pillow's pixels to the level; tensor: the same but for rounding; square: squeezed, bilinear."""
    expected = by_pillow(WIDE, 32)
    torch.testing.assert_close(shown(build(name, preprocess="pil"), WIDE), expected, atol=1e-5, rtol=0)
    near = shown(build(name, preprocess="tensor"), WIDE)
    assert 1e-4 < (near - expected).abs().mean() < 3e-3  # an 8-bit level is 4e-3
    square = F.interpolate(WIDE, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(shown(build(name, preprocess="square"), WIDE), square, atol=1e-5, rtol=0)
    assert [build(name, preprocess=p).differentiable for p in ("pil", "tensor", "square")] == [False, True, True]
    assert torch.equal(shown(build(name), WIDE), shown(build(name, preprocess="pil"), WIDE))


@pytest.mark.parametrize("antialias", [True, False])
def test_hpsv2_fits_the_longest_side_and_pads_with_black(antialias):
    """60 to 32 makes 44 to 23 (23.47); four black rows above and five below."""
    found = shown(build("hpsv2", antialias=antialias), WIDE)
    inner = F.interpolate(WIDE, (23, 32), mode="bicubic", align_corners=False, antialias=antialias)
    torch.testing.assert_close(found, F.pad(inner, (0, 0, 4, 5)), atol=1e-5, rtol=0)


def test_hpsv2_may_be_shown_a_square():
    square = F.interpolate(WIDE, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(shown(build("hpsv2", preprocess="square"), WIDE), square, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("preprocess", "differentiable"), [("pil", False), ("tensor", True)])
def test_imagereward_is_shown_as_asked(tmp_path, preprocess, differentiable):
    """44 rows become 32 and 60 columns 43; the crop leaves out 11, of which round(5.5) = 6 on the left."""
    module = plugins.load("rewards", "imagereward")
    block = tiny_scorers.write_imagereward(tmp_path) | {"preprocess": preprocess}
    scorer = module.load(module.Config(**block), torch.device("cpu"))
    seen = []
    scorer.model.register_forward_pre_hook(lambda model, args: seen.append(args[0]))
    scorer(WIDE, PROMPTS)
    small = F.interpolate(WIDE, (32, 43), mode="bicubic", align_corners=False, antialias=True)[..., 6:38].clamp(0, 1)
    difference = (seen[0] * STD + MEAN - small).abs().mean().item()
    assert difference < 1e-6 if differentiable else 1e-4 < difference < 3e-3
    assert scorer.differentiable == differentiable


# ---------------------------------------------------------------- tokenizers


def reversed_vocabulary(folder, target):
    """A tokenizer whose words have each other's ids, in reverse; special tokens keep theirs."""
    target.mkdir()
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, target)
    about = json.loads((target / "tokenizer.json").read_text())
    vocabulary = about["model"]["vocab"]
    kept = {token["content"] for token in about["added_tokens"]}
    words = [word for word in vocabulary if word not in kept]
    ids = [vocabulary[word] for word in words]
    about["model"]["vocab"] |= dict(zip(words, reversed(ids), strict=True))
    (target / "tokenizer.json").write_text(json.dumps(about))
    return str(target)


@pytest.mark.parametrize("name", ["pickscore", "hpsv2"])
def test_the_tokenizer_is_the_one_that_is_named(tmp_path, name):
    other = reversed_vocabulary(MODELS / name, tmp_path / "other")
    images = WIDE[..., :32, :32]
    plain, turned = build(name)(images, PROMPTS), build(name, tokenizer=other)(images, PROMPTS)
    assert (plain - turned).abs().min() > 1e-4
    same = build(name, tokenizer=str(MODELS / name))(images, PROMPTS)
    assert torch.equal(plain, same)


# ---------------------------------------------------------------- pins, activation, licence, range


def sha_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


PINS = {
    "hpsv2": (MODELS / "hpsv2/open_clip_model.safetensors", lambda sha: {"sha256": sha}),
    "aesthetic": (MODELS / "aesthetic/head.safetensors", lambda sha: {"head_sha256": sha}),
}


@pytest.mark.parametrize("name", PINS)
def test_a_pinned_file_must_hash_to_its_pin(name):
    file, pin = PINS[name]
    build(name, **pin(sha_of(file)))
    with pytest.raises(ValueError, match=file.name):
        build(name, **pin("0" * 64))


def test_imagerewards_pin(tmp_path):
    module, block = plugins.load("rewards", "imagereward"), tiny_scorers.write_imagereward(tmp_path)
    module.load(module.Config(**block, sha256=sha_of(block["path"])), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"tiny\.pt"):
        module.load(module.Config(**block, sha256="0" * 64), torch.device("cpu"))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_activation_must_be_the_one_stated(name):
    with pytest.raises(ValueError, match="quick_gelu"):
        build(name, hidden_act="quick_gelu")


@pytest.mark.parametrize("name", BLOCKS)
def test_licence_and_range_are_those_stated(name):
    scorer = build(name, license="mine", expected_range=[-1, 2])
    assert (scorer.license, scorer.expected_range) == ("mine", (-1.0, 2.0))


def test_scores_are_what_the_features_say():
    """cos of unit features, 100 cos cut at 0, exp(logit scale) cos, and the affine head, written out."""
    images = WIDE[..., :32, :32]
    hps, pick, aesthetic = (build(name) for name in ("hpsv2", "pickscore", "aesthetic"))
    clip = build("clipscore")
    cosine = (clip.features(images) * clip._text(PROMPTS)).sum(1)
    torch.testing.assert_close(clip(images, PROMPTS), 100 * cosine.clamp(min=0))
    with torch.no_grad():
        picked = (pick._image(images) * pick._text(PROMPTS)).sum(1)
        torch.testing.assert_close(pick(images, PROMPTS), pick.model.logit_scale.exp() * picked)
        torch.testing.assert_close(hps(images, PROMPTS), (hps._image(images) * hps._text(PROMPTS)).sum(1))
        features = aesthetic.features(images)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
        for layer in aesthetic.head.layers.values():
            features = features @ layer.weight.T + layer.bias
        torch.testing.assert_close(aesthetic(images, ["any", "words", "do"]), features[:, 0])
    assert hps(images, PROMPTS).abs().max() <= 1
