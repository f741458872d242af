"""What every plug-in owes the rest: rewards, sources and backbones, whatever files there are."""

import inspect
import subprocess
import sys
import typing
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from attune import plugins
from attune.config import ConfigError, plugin_config, read_params
from attune.interfaces import Reward
from attune.sources import SPLITS, check
from attune.world.grammar import all_scenes
from attune.world.render import render

ROOT = Path(__file__).parents[2]
PROFILES = read_params(ROOT / "params.yaml")["profiles"]
WITH_CONFIG = [(kind, name) for kind in ("methods", "rewards", "sources") for name in plugins.available(kind)]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Paths in params.yaml are relative to the repository."""
    monkeypatch.chdir(ROOT)


# ---------------------------------------------------------------- all kinds


@pytest.mark.parametrize(("kind", "name"), [*WITH_CONFIG, ("preference", "objective")])
def test_config_is_the_same_without_its_module(kind, name):
    module, extracted = plugins.load(kind, name), plugins.config_class(kind, name)
    assert extracted is not module.Config
    assert extracted.model_json_schema() == module.Config.model_json_schema()
    with pytest.raises(ConfigError, match=r"here\.no_such_key"):
        plugin_config(kind, name, {"no_such_key": 1}, "here")


def test_all_of_params_is_checked_without_torch():
    code = (
        "import sys; from attune import config, plugins\n"
        f"for kind, name in {WITH_CONFIG!r}: plugins.config_class(kind, name)\n"
        "config.load()\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={"PYTHONPATH": "src"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["methods", "rewards", "sources", "backbones"])
def test_a_wrong_name_is_answered_with_the_right_ones(kind):
    with pytest.raises(ConfigError) as error:
        plugins.find(kind, "no_such_name", "some.key")
    assert str(error.value).startswith(f"some.key: no {kind} plug-in named 'no_such_name'")
    assert all(name in str(error.value) for name in plugins.available(kind))
    with pytest.raises(ConfigError):
        plugins.find(kind, "__init__", "some.key")


@pytest.mark.parametrize("name", plugins.available("backbones"))
def test_a_backbone_is_loaded_by_path_revision_dtype_and_device(name):
    load = plugins.load("backbones", name).load
    assert list(inspect.signature(load).parameters) == ["path", "revision", "dtype", "device"]


# ---------------------------------------------------------------- rewards


def variants():
    """Every reward, once for each way of preprocessing it offers."""
    for name in plugins.available("rewards"):
        field = plugins.config_class("rewards", name).model_fields.get("preprocess")
        for preprocess in typing.get_args(field.annotation) if field else [None]:
            yield pytest.param((name, preprocess), id=f"{name}-{preprocess}" if preprocess else name)


def load_scorer(name, preprocess, monkeypatch):
    """The scorer of the tiny profile: its block and its weights must be there."""
    monkeypatch.chdir(ROOT)
    block = PROFILES["tiny"]["scorers"][name] | ({"preprocess": preprocess} if preprocess else {})
    module, config = plugins.load("rewards", name), plugin_config("rewards", name, block, name)
    return module.load(module.Config.model_validate(config.model_dump()), torch.device("cpu"))


@pytest.fixture(scope="module", params=variants())
def scorer(request):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return load_scorer(*request.param, monkeypatch)


@pytest.fixture(scope="module")
def pictures():
    """Six pictures of the embedded world, with a little noise, and their prompts."""
    scenes = all_scenes()[:: len(all_scenes()) // 6][:6]
    rng = np.random.default_rng(0)
    images = render(scenes, rng) + rng.uniform(0, 0.2, (6, 32, 32, 3))
    return torch.from_numpy(images).float().clamp(0, 1).permute(0, 3, 1, 2), [s.prompt for s in scenes]


def test_scores_belong_to_their_images(scorer, pictures):
    images, prompts = pictures
    scores = scorer(images, prompts)
    assert isinstance(scorer, Reward)
    assert scores.shape == (6,)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    assert scores.std() > 1e-4  # or the order below would say nothing
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = scorer(images[order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, scores[order], rtol=1e-5, atol=1e-5)
    assert torch.equal(shuffled.argsort(), scores[order].argsort())
    torch.testing.assert_close(scorer(images[:1], prompts[:1]), scores[:1], rtol=1e-5, atol=1e-5)


def test_a_gradient_reaches_the_pixels_iff_declared(scorer, pictures):
    images = pictures[0].clone().requires_grad_()
    total = scorer(images, pictures[1]).sum()
    assert total.requires_grad == scorer.differentiable
    if scorer.differentiable:
        total.backward()
        assert (images.grad.flatten(1).abs().sum(1) > 0).all()  # of every image


@pytest.mark.parametrize("wrong", ["above", "below", "nan", "channels", "prompts"])
def test_what_is_no_image_in_0_1_is_refused(scorer, pictures, wrong):
    images, prompts = pictures[0].clone(), pictures[1]
    if wrong == "channels":
        images = images[:, :1]
    elif wrong == "prompts":
        prompts = prompts[:2]
    else:
        images[2, 1, 3, 4] = {"above": 1.1, "below": -0.1, "nan": torch.nan}[wrong]
    with pytest.raises(ValueError, match=r"\[0, 1\]|\(B, 3, H, W\)|prompts"):
        scorer(images, prompts)


def test_its_licence_is_known(scorer):
    assert scorer.license


@pytest.mark.parametrize("name", plugins.available("rewards"))
def test_a_profile_shows_how_to_use_it(name):
    blocks = {p: values["scorers"][name] for p, values in PROFILES.items() if name in values["scorers"]}
    assert blocks
    for profile, block in blocks.items():
        plugin_config("rewards", name, block, f"profiles.{profile}.scorers.{name}")


# ---------------------------------------------------------------- sources


def paint(prompts, ordinals, title):
    """Pictures of the world stand in for the base model's."""
    assert len(prompts) == len(ordinals)
    assert len(set(zip(prompts, ordinals, strict=True))) == len(prompts)  # or two would be the same
    scenes = {scene.prompt: scene for scene in all_scenes()}
    images = render([scenes[prompt] for prompt in prompts], np.random.default_rng(1))
    return (images * 255).round().astype(np.uint8)


@pytest.fixture(scope="module", params=plugins.available("sources"))
def source(request):
    """A source's module and its block in params.yaml, the short profile's if that one uses it."""
    name = request.param
    blocks = {p: dict(v["data"]) for p, v in PROFILES.items() if v["data"]["source"] == name}
    assert blocks, f"no profile of params.yaml shows how to use source {name}"
    block = blocks.get("short") or next(iter(blocks.values()))
    block = {key: value for key, value in block.items() if key != "source"}
    return plugins.load("sources", name), plugin_config("sources", name, block, "data")


@pytest.fixture(scope="module")
def prepared(source):
    module, config = source
    return module.prepare(module.Config.model_validate(config.model_dump()), 0, paint)


def test_a_source_keeps_its_word(prepared):
    assert check(prepared) is prepared
    assert set(prepared.prompts.split) == set(SPLITS)
    assert {"train", "validation"} <= set(prepared.pairs.split)
    assert prepared.images.dtype == np.uint8
    assert prepared.images.ndim == 4
    assert prepared.images.shape[3] == 3
    rows = prepared.pairs[["image_0", "image_1"]].to_numpy()
    assert rows.min() >= 0
    assert rows.max() < len(prepared.images)
    assert (rows[:, 0] != rows[:, 1]).all()


def test_splits_share_no_prompt(prepared):
    by_split = {split: set(rows.prompt) for split, rows in prepared.prompts.groupby("split")}
    for a, b in combinations(by_split, 2):
        assert not by_split[a] & by_split[b]
    assert not prepared.prompts.prompt.duplicated().any()
    of_prompt = prepared.prompts.set_index("prompt").split
    assert (of_prompt.loc[prepared.pairs.prompt].to_numpy() == prepared.pairs.split.to_numpy()).all()


def test_a_seed_decides_everything(source, prepared):
    module, config = source
    config = module.Config.model_validate(config.model_dump())
    again, other = (module.prepare(config, seed, paint) for seed in (0, 1))
    assert again.prompts.equals(prepared.prompts)
    assert again.pairs.equals(prepared.pairs)
    assert not other.prompts.equals(prepared.prompts)
