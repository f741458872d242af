"""What every plug-in owes the rest: rewards, sources and backbones, whatever files there are."""

import inspect
import re
import subprocess
import sys
import typing
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

import tiny_scorers
from attune.config import plugins
from attune.config.plugins import plugin_config
from attune.config.resolve import read_yaml
from attune.config.schema import ConfigError
from attune.config.settings import Model
from attune.config.sources import SourceConfig
from attune.data.rows import Pair, Prompt, Quota, SourceError
from attune.data.splits import SPLITS, count_rows
from attune.interfaces import Reward
from attune.world.grammar import all_scenes
from attune.world.render import render

ROOT = Path(__file__).parents[2]
PROFILES = {path.stem: read_yaml(path) for path in sorted((ROOT / "params").glob("*.yaml"))}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Paths in params.yaml are relative to the repository."""
    monkeypatch.chdir(ROOT)


# ---------------------------------------------------------------- all kinds


HEAVY = {"transformers", "diffusers", "peft", "accelerate"}  # seconds each; torch alone takes one


@pytest.mark.parametrize("kind", ["methods", "rewards", "sources", "backbones"])
def test_plugins_are_quick_to_import(kind):
    """Settings are checked, and a run is planned, before any work: by then all plug-ins may have been imported."""
    code = (
        "import sys; from attune.config import plugins\n"
        f"for name in plugins.available({kind!r}): plugins.load({kind!r}, name)\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
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
def test_a_backbone_is_loaded_by_its_block_and_a_device(name):
    load = plugins.load("backbones", name).load
    assert list(inspect.signature(load).parameters) == ["model", "device", "dtype"]
    assert inspect.signature(load).parameters["dtype"].default is None


@pytest.mark.parametrize("name", plugins.available("backbones"))
def test_a_backbone_can_be_planned_for_before_it_is_here(name):
    module, there = plugins.load("backbones", name), f"owner/name@{'0' * 40}"
    facts = module.facts(Model(backbone=name, path=there))
    assert min(facts.denoiser, facts.text_encoders, facts.autoencoder) > 1e6
    assert facts.resolution in (512, 1024)
    assert module.facts(Model(backbone=name, path=there, resolution=64)).resolution == 64
    for source, patterns in module.downloads(Model(backbone=name, path=there)):
        assert source.commit == "0" * 40
        assert patterns


@pytest.mark.parametrize("name", plugins.available("backbones"))
def test_a_backbone_says_what_it_is_in_diffusers(name):
    """What packages, model cards and the plan ask: classes that there are, and the times of a flow's training."""
    module = plugins.load("backbones", name)
    names = module.in_diffusers(Model(backbone=name, path=f"owner/name@{'0' * 40}"))
    pipeline, denoiser = (getattr(diffusers, kind) for kind in (names.pipeline, names.denoiser))
    arguments = inspect.signature(pipeline).parameters
    assert arguments[names.part].annotation in (denoiser, names.denoiser)
    assert set(names.left_out) <= set(arguments)
    assert hasattr(module, "times") == names.is_flow
    assert names.is_flow == ("FlowMatch" in str(arguments["scheduler"].annotation))


# ---------------------------------------------------------------- rewards


def variants():
    """Every reward, once for each way of preprocessing it offers."""
    for name in plugins.available("rewards"):
        field = plugins.config_class("rewards", name).model_fields.get("preprocess")
        for preprocess in typing.get_args(field.annotation) if field else [None]:
            yield pytest.param((name, preprocess), id=f"{name}-{preprocess}" if preprocess else name)


def load_scorer(name, preprocess, monkeypatch, folder):
    """The scorer of the tiny profile, or a random one where the embedded family has none."""
    monkeypatch.chdir(ROOT)
    embedded = PROFILES["tiny"]["scorers"]
    block = embedded[name] if name in embedded else tiny_scorers.block(name, folder)
    block = block | ({"preprocess": preprocess} if preprocess else {})
    module, config = plugins.load("rewards", name), plugin_config("rewards", name, block, name)
    return module.load(module.Config.model_validate(config.model_dump()), torch.device("cpu"))


@pytest.fixture(scope="module", params=variants())
def scorer(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return load_scorer(*request.param, monkeypatch, tmp_path_factory.mktemp("scorer"))


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


def test_it_declares_what_others_ask_of_it(scorer):
    assert isinstance(scorer.license, str)
    assert scorer.license
    assert isinstance(scorer.differentiable, bool)
    assert scorer.expected_range is None or scorer.expected_range[0] < scorer.expected_range[1]


def shown_blocks():
    """Scorer -> blocks to copy: those of the profiles, and those of docs/scorers.md, for the published weights."""
    page = (ROOT / "docs" / "scorers.md").read_text()
    documented = [YAML(typ="safe").load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    found = {}
    for blocks in [*(values["scorers"] for values in PROFILES.values()), *documented]:
        for name, block in blocks.items():
            found.setdefault(name, []).append(block)
    return found


@pytest.mark.parametrize("name", plugins.available("rewards"))
def test_it_is_shown_how_to_use_it(name):
    blocks = shown_blocks()[name]
    for block in blocks:
        plugin_config("rewards", name, block, f"scorers.{name}")


def with_weights():
    """Scorers that have any: their Config says where. What `python` says is where one's own code is."""
    names = [name for name in plugins.available("rewards") if name != "python"]
    return [name for name in names if plugins.config_class("rewards", name).location_fields()]


@pytest.mark.parametrize("name", with_weights())
def test_the_published_weights_are_documented_pinned_and_guarded(name):
    module = plugins.load("rewards", name)
    configs = [module.Config.model_validate(block) for block in shown_blocks()[name]]
    published = [config for config in configs if config.range_of_mean(module.PUBLISHED)]
    assert published
    for config in published:
        for field, source in config.locations().items():
            hashed = getattr(config, "sha256" if field == "path" else f"{field}_sha256", None)
            assert source.commit or hashed, f"{source} can change unnoticed"


# ---------------------------------------------------------------- sources


def generate_images(prompts, ordinals, desc):
    """Renderings of the world instead of images of the base model."""
    assert len(prompts) == len(ordinals)
    assert len(set(zip(prompts, ordinals, strict=True))) == len(prompts)  # or two would be the same
    scenes = {scene.prompt: scene for scene in all_scenes()}
    images = render([scenes[prompt] for prompt in prompts], np.random.default_rng(1))
    return (images * 255).round().astype(np.uint8)


def documented(name):
    """The source's block in docs/data.md."""
    blocks = re.findall(r"```yaml\n(data:\n.*?)```", (ROOT / "docs/data.md").read_text(), flags=re.DOTALL)
    data = [YAML(typ="safe").load(block)["data"] for block in blocks]
    found = [{k: v for k, v in block.items() if k != "source"} for block in data if block["source"] == name]
    assert found, f"docs/data.md shows no block for source {name}"
    return found


@pytest.mark.parametrize("name", plugins.available("sources"))
def test_the_docs_show_how_to_use_a_source(name):
    for block in documented(name):
        plugin_config("sources", name, block, "data")
    assert issubclass(plugins.load("sources", name).Config, SourceConfig)


@pytest.mark.parametrize("name", sorted(set(plugins.available("sources")) - {"world"}))
def test_data_that_is_not_there_is_noticed_before_a_row_is_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = plugins.load("sources", name)
    block = documented(name)[0] | {"path": str(tmp_path / "nothing/here"), "test_list": None}
    with pytest.raises(SourceError, match="nothing/here"):
        module.read(module.Config.model_validate(block), 0, generate_images, Quota())


@pytest.mark.parametrize("name", plugins.available("sources"))
def test_a_source_is_quick_to_import(name):
    """The plan imports it for its settings. A cold import of pandas or scipy takes longer than the plan may."""
    code = (
        f"import sys, attune.data.sources.{name}; "
        "heavy = {'torch', 'pandas', 'scipy', 'huggingface_hub', 'transformers', 'diffusers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={"PYTHONPATH": "src"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", plugins.available("sources"))
def test_a_source_tells_the_plan_what_it_needs(name, tmp_path, monkeypatch):
    """Without data: only what is there to be read may be missed, and that as `read` would."""
    monkeypatch.chdir(tmp_path)
    module = plugins.load("sources", name)
    assert module.GIVES[0] == "prompts"
    assert set(module.GIVES) <= {"prompts", "pairs", "images"}
    assert isinstance(module.FREE_PROMPTS, bool)
    for block in documented(name):
        config = module.Config.model_validate(block)
        files = module.needs_files(config)
        assert all(isinstance(path, Path) for path in files)
        on_the_hub = "@" in getattr(config, "path", "")
        named = [] if on_the_hub or name == "world" else [config.path]
        listed = [getattr(config, "test_list", None), getattr(config, "validation_list", None)]
        assert {str(path) for path in files} == {path for path in (*named, *listed) if path is not None}
        for ask in (module.split_sizes, module.listed_prompts):
            with suppress(SourceError):
                ask(config)


LISTED = ["a small red ring on a white background", "a cat"]


@pytest.mark.parametrize("name", sorted(set(plugins.available("sources")) - {"world", "prompts"}))
def test_the_prompts_of_a_test_list_are_known_and_its_file_is_needed(name, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(LISTED))
    module = plugins.load("sources", name)
    block = documented(name)[0] | {"path": str(tmp_path), "test_list": str(tmp_path / "list.txt")}
    for folder in ("chosen", "rejected", "liked", "disliked"):
        (tmp_path / folder).mkdir()
    if name in ("table", "ranked"):
        block["path"] = str(tmp_path / "t.jsonl")
        (tmp_path / "t.jsonl").write_text("[]")  # no row, and so no column is missing
    config = module.Config.model_validate(block)
    assert list(module.listed_prompts(config)) == LISTED
    assert tmp_path / "list.txt" in module.needs_files(config)


@pytest.fixture(scope="module")
def rows():
    """What the source of the short profile yields."""
    block = {key: value for key, value in PROFILES["short"]["data"].items() if key != "source"}
    module = plugins.load("sources", PROFILES["short"]["data"]["source"])
    return lambda seed: list(module.read(module.Config.model_validate(block), seed, generate_images, Quota()))


def without_pixels(rows):
    return [replace(row, image_0=None, image_1=None) if isinstance(row, Pair) else row for row in rows]


def test_the_embedded_source_keeps_its_word(rows):
    found = rows(0)
    assert {row.split for row in found if isinstance(row, Prompt)} == set(SPLITS)
    assert {"train", "validation"} <= {row.split for row in found if isinstance(row, Pair)}
    split_of = {row.prompt: row.split for row in found if isinstance(row, Prompt)}
    for row in found:
        assert split_of[row.prompt] == row.split
        if isinstance(row, Pair):
            assert row.image_0.dtype == row.image_1.dtype == np.uint8
            assert row.image_0.shape == row.image_1.shape
            assert not np.array_equal(row.image_0, row.image_1)


def test_the_embedded_source_knows_its_sizes(rows):
    block = {key: value for key, value in PROFILES["short"]["data"].items() if key != "source"}
    module = plugins.load("sources", "world")
    config = module.Config.model_validate(block)
    assert module.split_sizes(config) == count_rows(rows(0), Quota())
    with pytest.raises(SourceError, match=r"data\.test_prompts: 99999 wanted, the grammar has"):
        module.split_sizes(config.model_copy(update={"test_prompts": 99999}))


def test_only_prompts_change_the_prompts_of_the_embedded_source():
    block = {key: value for key, value in PROFILES["short"]["data"].items() if key != "source"}
    module = plugins.load("sources", "world")

    def prompts(**changed):
        config = module.Config.model_validate(block | changed)
        return [row for row in module.read(config, 0, generate_images, Quota()) if isinstance(row, Prompt)]

    assert prompts(temperature=1.0, images_per_prompt=3, pair_prompts=5) == prompts()
    held_out = [row.prompt for row in prompts(train_prompts=12) if row.split != "train"]
    assert held_out == [row.prompt for row in prompts() if row.split != "train"]


def test_a_seed_decides_everything(rows):
    first = rows(0)
    assert without_pixels(rows(0)) == without_pixels(first)
    assert without_pixels(rows(1)) != without_pixels(first)
