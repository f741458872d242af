"""Base models and scorers in folders of others: what is no such file, and parts that do not fit each other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attune.backbones import sd, sdxl
from attune.clip.model import load_tokenizer
from attune.config.settings import Model
from attune.rewards import clipscore, hpsv2, imagereward, pickscore
from attune.spm import model as spm
from tiny_scorers import write_imagereward

CPU = torch.device("cpu")
EMBEDDED = Path(__file__).parents[2] / "models" / "embedded"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
PAGE = "\n<!DOCTYPE html><html>Login required</html>"
ANSWER = '{"error": "Repository not found"}'


@pytest.fixture(params=["sd", "sdxl"])
def copied(request, tiny_folder, tiny_xl_folder, tmp_path):
    """A copy of a pipeline, to be damaged."""
    return Path(shutil.copytree(tiny_folder if request.param == "sd" else tiny_xl_folder, tmp_path / request.param))


def load(folder, **settings):
    backbone = {"sd": sd, "sdxl": sdxl}[folder.name]
    return backbone.load(Model(backbone=folder.name, path=str(folder), **settings), CPU)


def changed(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ---------------------------------------------------------------- something else in its place

FILES = [
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
]
SAYS = {POINTER: "is a pointer of git-lfs", PAGE: "is a web page", "": "is empty"}


@pytest.mark.parametrize("content", SAYS, ids=["pointer", "page", "empty"])
@pytest.mark.parametrize("name", FILES)
def test_what_lies_in_a_files_place_is_told_with_its_path(copied, name, content):
    (copied / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{copied / name} {SAYS[content]}"):
        load(copied)


@pytest.mark.parametrize("name", [name for name in FILES if "tokenizer_config" not in name])
def test_a_servers_answer_is_no_model(copied, name):
    (copied / name).write_text(ANSWER)
    with pytest.raises(ValueError, match=f"{copied / Path(name).parent}"):
        load(copied)


@pytest.mark.parametrize("name", FILES[:3])
def test_a_download_that_broke_off_is_named(copied, name):
    (copied / name).write_bytes((copied / name).read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{copied / name} is damaged"):
        load(copied)


def test_a_model_in_one_file_is_not_a_folder(tmp_path):
    save_file({"model.diffusion_model.out.weight": torch.ones(2)}, tmp_path / "v1-5.safetensors")
    with pytest.raises(ValueError, match=r"v1-5\.safetensors is one file; a folder in diffusers' layout is needed"):
        sd.load(Model(backbone="sd", path=str(tmp_path / "v1-5.safetensors")), CPU)


def test_a_lost_shard_is_named(copied):
    file = copied / "unet/diffusion_pytorch_model.safetensors"
    weights = sorted(load_file(file).items())
    shards = {f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors": dict(weights[n::2]) for n in range(2)}
    for name, part in shards.items():
        save_file(part, copied / "unet" / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {key: n for n, part in shards.items() for key in part}}
    (copied / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    assert load(copied).denoiser.conv_in.weight.shape[1] == 4
    (copied / "unet" / min(shards)).unlink()
    with pytest.raises(FileNotFoundError, match=r"unet: there is no diffusion_pytorch_model-00001-of-00002"):
        load(copied)


def test_the_one_variant_that_is_there_is_named(copied):
    file = copied / "unet/diffusion_pytorch_model.safetensors"
    file.rename(copied / "unet/diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is no diffusion_pytorch_model\.safetensors, only .*\.fp16\."):
        load(copied)


def test_a_configuration_of_another_network_is_refused(copied):
    changed(copied / "unet/config.json", _class_name="SD3Transformer2DModel")
    with pytest.raises(ValueError, match=r"unet/config\.json describes a SD3Transformer2DModel, not a UNet2DCondition"):
        load(copied)


def test_weights_that_only_this_precision_loses_are_told_from_bad_ones(copied):
    file = copied / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] = 1e6  # above float16's 65504
    save_file(weights, file, metadata={"format": "pt"})
    load(copied, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"conv_in\.bias is not finite in float16, only as stored: set another dtype"):
        load(copied, dtype="float16")


# ---------------------------------------------------------------- schedulers


@pytest.mark.parametrize(
    "name", ["PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DDPM", "LCM"]
)
def test_every_sampler_of_the_family_means_the_same_schedule(copied, name):
    expected = load(copied).path.alphas_cumprod
    changed(copied / "scheduler/scheduler_config.json", _class_name=f"{name}Scheduler", timestep_spacing="trailing")
    assert torch.equal(load(copied).path.alphas_cumprod, expected)


OTHERS = [
    ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "a model for 'EDMEulerScheduler'"),
    ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "a model for 'EDMDPMSolverMultistepScheduler'"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "a model for 'FlowMatchEulerDiscrete"),
    ({"_class_name": "CogVideoXDDIMScheduler"}, "a model for 'CogVideoXDDIMScheduler'"),
    ({"_class_name": None}, "a model for None"),
    ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "a model with use_flow_sigmas"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "a model with timestep_type: contin"),
    ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction' is not supported"),
    ({"prediction_type": "sample"}, "prediction_type 'sample' is not supported"),
    ({"beta_schedule": "mine"}, "its schedule cannot be computed: mine"),
    ({"beta_end": "0.012"}, "its schedule cannot be computed"),
    ({"num_train_timesteps": 0}, "its schedule cannot be computed"),
    ({"num_train_timesteps": 100}, "its last step keeps 58% of the signal"),
    ({"beta_end": float("nan")}, "its schedule is none"),
    ({"trained_betas": [0.1, -0.2, 0.9]}, "its schedule is none"),
    ({"trained_betas": [0.1, 2.0]}, "its schedule is none"),
]


@pytest.mark.parametrize(("values", "says"), OTHERS)
def test_a_scheduler_of_another_family_is_refused_with_its_path(copied, values, says):
    changed(copied / "scheduler/scheduler_config.json", **values)
    with pytest.raises(ValueError, match=rf"{copied}/scheduler/scheduler_config\.json: {says}"):
        load(copied)


# ---------------------------------------------------------------- tokenizers


def test_a_prompt_is_as_long_as_the_encoder_reads(copied):
    """Without tokenizer_config.json transformers would pad to 10^30 tokens, which it takes for not at all."""
    expected = load(copied).encode_prompts(["a cat"]).tensors["prompt_embeds"]
    file = copied / "tokenizer/tokenizer_config.json"
    values = json.loads(file.read_text())
    for length in ({}, {"model_max_length": 512}):
        file.write_text(json.dumps({k: v for k, v in values.items() if k != "model_max_length"} | length))
        assert torch.equal(load(copied).encode_prompts(["a cat"]).tensors["prompt_embeds"], expected)


def last_tokenizer(folder):
    return folder / ("tokenizer_2" if folder.name == "sdxl" else "tokenizer")


def more_words(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["zzz</w>"] = 1 + max(values["model"]["vocab"].values())
    (folder / "tokenizer.json").write_text(json.dumps(values))


def another_end(folder):
    changed(folder / "tokenizer_config.json", eos_token="a")


def an_unknown_end(folder):
    changed(folder / "tokenizer_config.json", eos_token="<nowhere>")


MISFITS = [
    (more_words, r"a tokenizer of \d+ tokens for a model of \d+"),
    (an_unknown_end, r"a tokenizer of \d+ tokens for a model of \d+"),
    (another_end, r"its tokenizer ends texts with token \d+, the model with \d+"),
]


@pytest.mark.parametrize(("damage", "says"), MISFITS)
def test_a_tokenizer_of_another_model_is_refused(copied, damage, says):
    damage(last_tokenizer(copied))
    with pytest.raises(ValueError, match=rf"{last_tokenizer(copied)}: {says}"):
        load(copied)


def pick(folder):
    path = shutil.copytree(EMBEDDED / "pickscore", folder / "pick")
    return path, lambda: pickscore.load(pickscore.Config(path=str(path)))


def clip_score(folder):
    path = shutil.copytree(EMBEDDED / "pickscore", folder / "clip")
    config = clipscore.Config(model="ViT-tiny/4@32", path=str(path), hidden_act="gelu")
    return path, lambda: clipscore.load(config)


def hps(folder):
    path = shutil.copytree(EMBEDDED / "hpsv2", folder / "hps")
    weights = str(EMBEDDED / "hpsv2/open_clip_model.safetensors")
    return path, lambda: hpsv2.load(hpsv2.Config(version="2.1", path=weights, tokenizer=str(path)))


def step_aware(folder):
    path = shutil.copytree(EMBEDDED / "pickscore", folder / "spm")
    return path, lambda: spm.from_clip(str(path))


@pytest.mark.parametrize("scorer", [pick, clip_score, hps, step_aware], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("damage", "says"), [*MISFITS[:2], (another_end, "ends texts with|of another")])
def test_a_scorers_tokenizer_must_fit_it(tmp_path, scorer, damage, says):
    folder, score = scorer(tmp_path)
    score()
    damage(folder)
    with pytest.raises(ValueError, match=rf"{folder}.*({says})"):
        score()


def test_imagerewards_tokenizer_must_mark_where_a_text_begins_and_ends(tmp_path):
    block = write_imagereward(tmp_path)
    tokenizer = imagereward.load_bert_tokenizer(block["tokenizer"])
    tokenizer.save_pretrained(tmp_path / "bert_2")
    shutil.copy(tmp_path / "bert/vocab.txt", tmp_path / "bert_2")
    changed(tmp_path / "bert_2/tokenizer_config.json", cls_token="[SEP]")
    with pytest.raises(ValueError, match=r"bert_2.*does not put a text between a start and an end token"):
        imagereward.load(imagereward.Config(**block | {"tokenizer": str(tmp_path / "bert_2")}))


def test_a_tokenizer_that_knows_no_text_is_refused(tmp_path):
    """Its words have no letters that a text could have, so all texts are the same unknown token."""
    folder = Path(shutil.copytree(EMBEDDED / "pickscore", tmp_path / "pick"))
    values = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"] for token in values["added_tokens"]}
    vocabulary = values["model"]["vocab"]
    values["model"]["vocab"] = {w if w in special else f"\u4e00{n}": n for w, n in vocabulary.items()}
    values["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="pick: its tokenizer makes the same tokens of every word"):
        load_tokenizer(str(folder))
