"""Settings in base models' files that no model works with: refused with their path when the model is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from attune.backbones import sd, sdxl
from attune.config.settings import Model

CPU = torch.device("cpu")


@pytest.fixture(params=["sd", "sdxl"])
def copied(request, tiny_folder, tiny_xl_folder, tmp_path):
    """A copy of a pipeline, to be damaged."""
    return Path(shutil.copytree(tiny_folder if request.param == "sd" else tiny_xl_folder, tmp_path / request.param))


def described(folder, **settings):
    return {"sd": sd, "sdxl": sdxl}[folder.name], Model(backbone=folder.name, path=str(folder), **settings)


def load(folder, **settings):
    backbone, model = described(folder, **settings)
    return backbone.load(model, CPU)


def changed(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


NETWORKS = [
    *(("vae", {"scaling_factor": v}, "scaling_factor .* is not a number") for v in (None, 0, -1, float("nan"), "x")),
    ("vae", {"scaling_factor": True}, "scaling_factor True is not a number above 0"),
    ("vae", {"shift_factor": 0.1}, "shift_factor 0.1 is not supported"),
    ("vae", {"shift_factor": "x"}, "shift_factor 'x' is not supported"),
    ("vae", {"block_out_channels": []}, "cannot be read: IndexError"),
    *(("unet", {"sample_size": v}, "sample_size .* is no number of latents") for v in (0, None, [8, 8], "8", True)),
    ("unet", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised weights"),
    ("text_encoder", {"model_type": "t5"}, "model_type 't5' is not that of a CLIPTextModel"),
    ("text_encoder", {"architectures": ["T5EncoderModel"]}, "architectures names a 'T5EncoderModel'"),
    ("text_encoder", {"architectures": [{}]}, "architectures names a {}, not a CLIPTextModel"),
    ("text_encoder", {"hidden_act": "zzz"}, "cannot be read: KeyError: .*zzz"),
    ("text_encoder", {"vocab_size": "x"}, "cannot be read: Strict.*vocab_size"),
    ("text_encoder", {"quantization_config": {"quant_method": "awq"}}, "quantised weights"),
]


@pytest.mark.parametrize(("part", "values", "says"), NETWORKS)
def test_a_setting_of_a_network_is_refused_with_its_path(copied, part, values, says):
    changed(copied / part / "config.json", **values)
    with pytest.raises(ValueError, match=rf"{copied / part}.*{says}"):
        load(copied)


def test_a_shift_of_nothing_is_none(copied):
    changed(copied / "vae/config.json", shift_factor=0.0)
    load(copied)


def test_a_text_encoder_may_be_described_as_half_of_a_whole_clip(copied):
    changed(copied / "text_encoder/config.json", architectures=["CLIPModel"])
    load(copied)


@pytest.mark.parametrize("values", [{"sample_size": None}, {"sample_size": [8, 8]}])
def test_a_plan_names_the_file_too_unless_the_resolution_is_set(copied, values):
    changed(copied / "unet/config.json", **values)
    backbone, model = described(copied)
    with pytest.raises(ValueError, match=rf"{copied}/unet/config\.json: sample_size"):
        backbone.facts(model)
    backbone, model = described(copied, resolution=16)
    assert backbone.facts(model).resolution == 16
    assert load(copied, resolution=16).resolution == 16


def test_a_plan_names_an_autoencoder_without_channels(copied):
    changed(copied / "vae/config.json", block_out_channels=[])
    backbone, model = described(copied)
    with pytest.raises(ValueError, match=rf"{copied}/vae/config\.json: block_out_channels \[\]"):
        backbone.facts(model)


TOKENIZERS = [
    *(({"model_max_length": v}, rf"model_max_length {v} of its tokenizer is below the encoder's") for v in (2, 5)),
    *(({"model_max_length": v}, "not a number of tokens") for v in ("77", -1, 7.5, 0, True)),
    ({"pad_token": None}, "has no pad_token"),
    ({"padding_side": "left"}, "padding_side of its tokenizer is 'left'|cannot be read"),
    ({"truncation_side": "left"}, "truncation_side of its tokenizer is 'left'|cannot be read"),
]


@pytest.mark.parametrize(("values", "says"), TOKENIZERS)
def test_a_tokenizer_that_cannot_pad_or_cut_is_refused(copied, values, says):
    changed(copied / "tokenizer/tokenizer_config.json", **values)
    with pytest.raises(ValueError, match=rf"{copied}/tokenizer: .*({says})"):
        load(copied)


def test_two_words_of_one_token_are_named(copied):
    file = copied / "tokenizer/tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    one, other = list(vocabulary)[3:5]
    vocabulary[one] = vocabulary[other]
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"{copied}/tokenizer: .* of its tokenizer are both token \d+"):
        load(copied)


SCHEDULERS = [
    ({"timestep_type": ["continuous"]}, r"timestep_type: \['continuous'\]"),
    ({"timestep_type": {}}, r"timestep_type: {}"),
    ({"sigma_data": 0.5}, "a model with sigma_data"),
    ({"sigma_schedule": "karras"}, "a model with sigma_schedule"),
    ({"_class_name": []}, r"a model for \[\]"),
    ({"_class_name": {}}, "a model for {}"),
]


@pytest.mark.parametrize(("values", "says"), SCHEDULERS)
def test_a_schedulers_settings_of_another_family_are_refused(copied, values, says):
    changed(copied / "scheduler/scheduler_config.json", **values)
    with pytest.raises(ValueError, match=rf"{copied}/scheduler/scheduler_config\.json: .*{says}"):
        load(copied)
