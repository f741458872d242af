"""Scorers as they are loaded and used: beyond what contract and parity tests say of each."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from attune.clip.open_clip import VIT_H_14, clip_config, from_open_clip, key_map, load_open_clip, to_open_clip
from attune.clip.pixels import clip_pixels, clip_pixels_pil
from attune.rewards import aesthetic, clipscore, hpsv2, oracle, pickscore

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded"
HPS = {
    "version": "2.1",
    "path": str(EMBEDDED / "hpsv2/open_clip_model.safetensors"),
    "tokenizer": str(EMBEDDED / "hpsv2"),
}
PICKSCORE = {"path": str(EMBEDDED / "pickscore")}
AESTHETIC = {
    "path": str(EMBEDDED / "aesthetic"),
    "head": str(EMBEDDED / "aesthetic/head.safetensors"),
    "hidden_act": "gelu",
}
CLIPSCORE = {"model": "ViT-tiny/4@32", "path": str(EMBEDDED / "aesthetic"), "hidden_act": "gelu"}
PROMPTS = ["a small red circle on a white background", "a large blue square on a white background"]


@pytest.fixture
def pictures():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def copy(source: str, folder: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED / source, folder / source))


# ---------------------------------------------------------------- numbers


def test_clipscore_is_a_hundred_cosines_and_never_negative(pictures):
    scorer = clipscore.load(clipscore.Config(**CLIPSCORE))
    assert scorer.features(pictures).norm(dim=1).tolist() == pytest.approx([1, 1])
    text = torch.stack([scorer.features(pictures)[0], -scorer.features(pictures)[1]])
    scorer._text = lambda prompts: text  # a prompt that means exactly the picture, and one that means the opposite
    assert scorer(pictures, PROMPTS).tolist() == pytest.approx([100, 0])


def test_clipscore_is_pickscore_without_the_learnt_scale(pictures):
    """Both are cosines of the same kind of model: shown the same weights they differ by a factor."""
    plain = clipscore.load(clipscore.Config(model="ViT-tiny/4@32", path=PICKSCORE["path"], hidden_act="gelu"))
    pick = pickscore.load(pickscore.Config(**PICKSCORE))
    expected = (100 * pick(pictures, PROMPTS) / pick.model.logit_scale.exp()).clamp(min=0)
    torch.testing.assert_close(plain(pictures, PROMPTS), expected)


def test_a_clip_of_another_name_is_refused():
    with pytest.raises(ValueError, match="is no ViT-L/14: patches 4, images 32"):
        clipscore.load(clipscore.Config(**CLIPSCORE | {"model": "ViT-L/14"}))


def test_oracle_explains_itself(pictures):
    scorer = oracle.load(oracle.Config())
    parts = scorer.parts(pictures, PROMPTS)
    score = torch.from_numpy((parts["faithfulness"] * parts["appeal"]) ** 0.5).float()
    torch.testing.assert_close(score, scorer(pictures, PROMPTS))


def test_prompts_are_cleaned_as_open_clip_does():
    mojibake = "The \u201cCaf\u00c3\u00a9\u201d &amp;amp; \t a \ufb01sh "
    assert hpsv2.clean_text(mojibake) == 'the "caf\u00e9" & a fish'


def test_tensor_preprocessing_is_pillows_up_to_rounding(pictures):
    smooth = F.interpolate(pictures, (70, 90), mode="bicubic").clamp(0, 1)
    difference = (clip_pixels(smooth, 32) - clip_pixels_pil(smooth, 32)).abs()
    assert difference.mean() < 0.006
    assert difference.max() < 0.1  # 0.025 of full scale: Pillow also rounds and clamps between its two passes


@pytest.mark.parametrize("preprocess", ["tensor", "pil"])
def test_the_callers_autocast_does_not_reach_the_scores(pictures, preprocess):
    config = pickscore.Config(**PICKSCORE, preprocess=preprocess)
    expected, fresh = pickscore.load(config)(pictures, PROMPTS), pickscore.load(config)  # fresh: no text cached
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fresh(pictures, PROMPTS), expected)


# ---------------------------------------------------------------- what is refused


def test_the_wrong_activation_is_refused():
    for load, block in ((aesthetic, AESTHETIC), (pickscore, PICKSCORE), (hpsv2, HPS), (clipscore, CLIPSCORE)):
        with pytest.raises(ValueError, match=r"has hidden_act \['gelu'\], expected 'quick_gelu'"):
            load.load(load.Config(**block | {"hidden_act": "quick_gelu"}))


def test_incomplete_checkpoints_are_refused(tmp_path):
    folder = copy("pickscore", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"visual_projection\.weight"):
        pickscore.load(pickscore.Config(path=str(folder)))
    file = copy("hpsv2", tmp_path) / "open_clip_model.safetensors"
    broken = load_file(file) | {"visual.stranger": torch.zeros(1)}
    del broken["visual.proj"]
    save_file(broken, file)
    with pytest.raises(ValueError, match=r"missing \['visual.proj'\], unexpected \['visual.stranger'\]"):
        hpsv2.load(hpsv2.Config(**HPS | {"path": str(file)}))


def test_half_precision_weights_are_read_as_float32():
    for module, block in ((pickscore, PICKSCORE), (hpsv2, HPS), (aesthetic, AESTHETIC)):
        stored = Path(block["path"])
        file = stored / "model.safetensors" if stored.is_dir() else stored
        assert torch.float16 in {tensor.dtype for tensor in load_file(file).values()}
        assert {parameter.dtype for parameter in module.load(module.Config(**block)).model.parameters()} == {
            torch.float32
        }


# ---------------------------------------------------------------- open_clip's layout


def test_the_released_layout_has_686_tensors_that_become_910():
    """open_clip's ViT-H-14, by name and number: 32 vision and 24 text layers, query, key and value fused."""
    names = key_map(32, 24)
    assert len(names) == 686
    assert sum(len(targets) for targets in names.values()) == 910
    assert len({target for targets in names.values() for target in targets}) == 910


def test_the_released_layout_is_pickscores_architecture():
    """986,109,441 parameters, gelu in both towers, features read at the end token."""

    class Tokenizer:
        bos_token_id, eos_token_id = 49406, 49407

        def __len__(self):
            return 49408

    config = clip_config(VIT_H_14, Tokenizer())
    with torch.device("meta"):
        model = CLIPModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441
    assert {name for targets in key_map(32, 24).values() for name in targets} == set(model.state_dict())
    assert config.vision_config.num_attention_heads == 16
    assert config.text_config.hidden_act == config.vision_config.hidden_act == "gelu"
    assert config.text_config.eos_token_id == 49407


def test_prefixes_and_constants_of_mirrors_do_not_matter():
    tokenizer = hpsv2.load_tokenizer(HPS["tokenizer"])
    model = load_open_clip(Path(HPS["path"]), tokenizer)
    stored = to_open_clip(model)
    mirror = {f"module.model.{name}": tensor for name, tensor in stored.items()}
    mirror |= {"attn_mask": torch.zeros(2, 2), "model.text.position_ids": torch.arange(3)}
    depth = model.config.vision_config.num_hidden_layers, model.config.text_config.num_hidden_layers
    ours = from_open_clip(mirror, *depth)
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())
    assert all(tensor.is_contiguous() for tensor in ours.values())
