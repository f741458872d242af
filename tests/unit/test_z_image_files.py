"""Z-Image's files and settings: what is read, and what is refused before anything long."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import params
import tiny_flow_models
from attune.backbones import z_image
from attune.config import resolve
from attune.config.settings import Model
from attune.inspection.tokens import lengths
from attune.planning import base_problems

CPU = torch.device("cpu")
PROMPTS = ["a cat", "two owls"]
SCHEDULER, TRANSFORMER = "scheduler/scheduler_config.json", "transformer/config.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flow_models.write_z_image_pipeline(tmp_path_factory.mktemp("z_image"))


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the pipeline, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def load(folder, **settings):
    block = {"backbone": "z_image", "path": str(folder), "resolution": 16, "max_sequence_length": 64} | settings
    return z_image.load(Model(**block), CPU)


def test_facts_are_counted_in_the_files_that_are_here(folder):
    backbone = load(folder)
    facts = z_image.facts(Model(backbone="z_image", path=folder))
    assert facts.resolution == 2 * 128
    assert z_image.facts(Model(backbone="z_image", path=f"a/b@{'0' * 40}")).resolution == 1024
    assert facts.multiple == 4
    networks = {"denoiser": backbone.denoiser, "text_encoders": backbone.text_encoder, "autoencoder": backbone.vae}
    for name, network in networks.items():
        assert getattr(facts, name) == sum(weight.numel() for weight in network.parameters())


def test_downloads_are_all_that_is_read(folder, tmp_path):
    for part, patterns in z_image.downloads(Model(backbone="z_image", path=folder)):
        for file in (file for pattern in patterns for file in Path(part.place).glob(pattern)):
            copy = tmp_path / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    ours, whole = load(tmp_path).encode_prompts(PROMPTS), load(folder).encode_prompts(PROMPTS)
    assert all(torch.equal(value, whole.tensors[name]) for name, value in ours.tensors.items())


@torch.no_grad()
def test_many_prompts_are_read_a_few_at_a_time(folder, monkeypatch):
    """Their states of all layers would not fit beside the model; three of 64 tokens, then the fourth alone."""
    backbone, prompts, seen = load(folder), ["a cat", "an owl", "bees", "no hen"], []
    whole = backbone.encode_prompts(prompts).tensors["prompt_embeds"]
    monkeypatch.setattr(z_image, "TOKENS_AT_ONCE", 3 * 64 + 1)
    backbone.text_encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    torch.testing.assert_close(backbone.encode_prompts(prompts).tensors["prompt_embeds"], whole)
    assert seen == [3, 1]
    monkeypatch.setattr(z_image, "TOKENS_AT_ONCE", 5)
    torch.testing.assert_close(backbone.encode_prompts(prompts).tensors["prompt_embeds"], whole)


def test_an_inspection_counts_tokens_with_the_chat_around_them(folder):
    found = lengths(["a cat", "a" * 50], Model(backbone="z_image", path=folder, max_sequence_length=64))
    assert found.counts.tolist() == [19 + 5, 19 + 50]
    assert (found.limit, found.cut, found.unit) == (64, 1, "tokens")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_missing_weights_are_an_error(copied, part):
    (file,) = (copied / part).glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensors[name] for name in sorted(tensors)[1:]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{copied / part} does not fit: missing"):
        load(copied)


def test_float16_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model\.dtype: float16 ends at 65,504, .* write bfloat16"):
        load(tmp_path, dtype="float16")
    int8 = Model(backbone="z_image", path=str(tmp_path)).model_copy(update={"quantize": "int8"})
    with pytest.raises(ValueError, match=r"model\.quantize: int8 computes in float16, .* write nf4"):
        z_image.load(int8, CPU)


@pytest.mark.parametrize("name", ["Z-Image-Turbo", "z_image_turbo_bf16"])
def test_turbo_is_refused_by_its_name_before_anything_is_read(tmp_path, name):
    with pytest.raises(ValueError, match=rf"model\.path: .*{name} was distilled .*; train Tongyi-MAI/Z-Image"):
        load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="scheduler"):
        load(tmp_path / "Z-Image-De-Turbo")


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"path": f"Tongyi-MAI/Z-Image-Turbo@{'f' * 40}"}, "model.path: Tongyi-MAI/Z-Image-Turbo@f+ was distilled"),
        ({"dtype": "float16"}, "model.dtype: float16 ends at 65,504"),
        ({"resolution": 1000}, "model.resolution: 1000 is not a multiple of 16"),
    ],
)
def test_the_plan_tells_it_before_anything_is_here(tmp_path, monkeypatch, block, says):
    monkeypatch.chdir(Path(__file__).parents[2])
    given, profile = params.shipped("z_image_24gb")
    assert list(base_problems.base(resolve.load(params.write(tmp_path, given, profile)))) == []
    profile["model"] |= block
    (problem,) = base_problems.base(resolve.load(params.write(tmp_path, given, profile)))
    assert re.match(rf"params/\w+\.yaml:{says}", problem)


def test_turbo_is_refused_by_its_schedulers_shift(copied):
    tiny_flow_models.change(copied / SCHEDULER, shift=3.0)
    with pytest.raises(ValueError, match=r"copy \(its scheduler's shift is 3.0, as Z-Image-Turbo's\) was distilled"):
        load(copied)
    load(copied.rename(copied.with_name("Z-Image-De-Turbo")))


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        (SCHEDULER, {"_class_name": "DDIMScheduler"}, "'DDIMScheduler' is no flow"),
        (SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting is not supported"),
        (TRANSFORMER, {"_class_name": "SD3Transformer2DModel"}, "describes a SD3Transformer2DModel, not a ZImage"),
        ("text_encoder/config.json", {"vocab_size": 200}, "text_encoder cannot be read|does not fit"),
        ("vae/config.json", {"shift_factor": "x"}, "shift_factor 'x' is not supported"),
    ],
)
def test_files_that_say_something_else_are_refused(copied, file, values, says):
    tiny_flow_models.change(copied / file, **values)
    with pytest.raises(ValueError, match=says):
        load(copied)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ nonsense", "cannot be used"),
        ("<|im_start|>user<|im_end|>", "leaves out the prompt"),
        (None, "cannot be used"),
    ],
)
def test_a_chat_template_without_the_prompt_is_refused(copied, template, says):
    file = copied / "tokenizer/chat_template.jinja"
    file.unlink() if template is None else file.write_text(template)
    with pytest.raises(ValueError, match=rf"{copied / 'tokenizer'}: its chat template {says}"):
        load(copied)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"all_patch_size": [4]}, r"patches \[\(4, 1\)\] without \(2, 1\)"),
        ({"cap_feat_dim": 24}, "cap_feat_dim 24, but its text encoder has 16"),
        ({"siglip_feat_dim": 8}, "Z-Image-Omni"),
    ],
)
def test_transformers_of_another_kind_are_refused(folder, values, says):
    config = {**load(folder).denoiser.config, **values}
    with pytest.raises(ValueError, match=says):
        z_image.check_transformer(config, 16, "config.json")


@pytest.mark.parametrize("resolution", [18, 68])
def test_sizes_without_positions_are_refused(folder, resolution):
    assert load(folder, resolution=64).latent_shape == (4, 32, 32)
    with pytest.raises(ValueError, match=rf"model\.resolution: {resolution} is not a multiple of 4 up to 64"):
        load(folder, resolution=resolution)


def test_prompts_without_positions_are_refused(folder):
    load(folder, max_sequence_length=224)
    with pytest.raises(ValueError, match=r"model\.max_sequence_length: 225, but there are positions for 224 tokens"):
        load(folder, max_sequence_length=225)
    z_image.check_positions([258, 16, 16], 256, 8, 16)  # the image stands at 257, after 1 to 256
    with pytest.raises(ValueError, match="there are positions for 224 tokens"):
        z_image.check_positions([257, 16, 16], 256, 8, 16)
