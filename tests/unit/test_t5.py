"""T5 as a text encoder: of Stable Diffusion 3 if it is asked for, read as it is released or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

import tiny
import tiny_flow_models
from attune.backbones import _t5, flux, sd3
from attune.config.settings import Model
from attune.diffusion.policy import Policy
from attune.inspection.tokens import lengths
from tiny_flow_models import PROMPTS, change, noise

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flow_models.write_sd3_pipeline(tmp_path_factory.mktemp("sd3"), with_t5=True)


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    return tiny_flow_models.write_flux_pipeline(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return tiny_flow_models.read(StableDiffusion3Pipeline, folder)


def load(folder, **settings):
    return sd3.load(Model(backbone="sd3", path=str(folder), **({"t5": True} | settings)), CPU)


@torch.no_grad()
def test_all_three_encoders_as_diffusers_does(folder, pipeline):
    ours = load(folder).encode_prompts(PROMPTS).tensors
    theirs, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, device=CPU)
    clips = ours["prompt_embeds"].shape[1]
    torch.testing.assert_close(ours["t5_embeds"], theirs[:, clips:])
    torch.testing.assert_close(ours["text_embeds"], pooled)
    assert ours["t5_embeds"].shape == (2, 256, 48)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_images_are_those_of_diffusers(folder, pipeline, guidance_scale):
    backbone = load(folder, max_sequence_length=30)
    images = tiny_flow_models.drawn(backbone, noise(), guidance_scale)
    options = {
        "latents": noise(),
        "num_inference_steps": 7,
        "guidance_scale": guidance_scale,
        "max_sequence_length": 30,
    }
    theirs = pipeline(PROMPTS, height=16, width=16, output_type="pt", **options).images
    torch.testing.assert_close(images, theirs, rtol=0, atol=1e-4)


@torch.no_grad()
def test_without_being_asked_for_it_is_not_read(folder, tmp_path):
    """Nor fetched, nor counted: its folders may be missing, and zeros take its place."""
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(copied / part)
    plain, full = (Model(backbone="sd3", path=str(copied), t5=t5) for t5 in (False, True))
    assert "t5_embeds" not in sd3.load(plain, CPU).encode_prompts(PROMPTS).tensors
    with pytest.raises(FileNotFoundError, match=r"copy/tokenizer_3"):
        sd3.load(full, CPU)
    places = {str(place) for place, _ in sd3.downloads(full)} - {str(place) for place, _ in sd3.downloads(plain)}
    assert places == {f"{copied}/text_encoder_3", f"{copied}/tokenizer_3"}
    published = [Model(backbone="sd3", path=f"owner/name@{'0' * 40}", t5=t5) for t5 in (False, True)]
    without, with_it = map(sd3.facts, published)
    assert with_it.text_encoders - without.text_encoders == _t5.WEIGHTS
    assert (without.prompt, with_it.prompt) == (0, 256 * 4096)


@torch.no_grad()
def test_it_changes_what_is_predicted_and_is_trained_with(folder):
    """Dropped captions are replaced in it too, and rows are taken of it as of the others."""
    full = load(folder, max_sequence_length=16)
    policy = Policy(full, full.encode_prompts([""]))
    cond = full.encode_prompts(PROMPTS)
    x_t, t = torch.ones(2, 4, 8, 8), torch.tensor([900.0, 30.0])
    zeros = {**cond.tensors, "t5_embeds": torch.zeros_like(cond.tensors["t5_embeds"])}
    predicted = policy.predict(x_t, t, cond)
    assert (predicted - policy.predict(x_t, t, type(cond)(zeros))).abs().max() > 1e-3
    dropped = policy.drop_captions(cond, 0.999999, tiny.draws(2))
    assert torch.equal(dropped.tensors["t5_embeds"], full.encode_prompts(["", ""]).tensors["t5_embeds"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_are_stored_in_the_models_precision(folder, dtype):
    """512 KB a prompt of FLUX per 64 tokens in half precision; nothing is stored of zeros."""
    full = load(folder, dtype=dtype, max_sequence_length=16)
    assert full.encode_prompts(PROMPTS).tensors["t5_embeds"].dtype == getattr(torch, dtype)


@torch.no_grad()
def test_many_prompts_are_read_a_few_at_a_time(flux_folder, monkeypatch):
    """Their attention would not fit otherwise; three of 20 tokens, then the fourth alone."""
    backbone = flux.load(Model(backbone="flux", path=flux_folder, resolution=16, max_sequence_length=20), CPU)
    prompts, seen = ["a cat", "an owl", "bees", "no hen"], []
    whole = backbone.encode_prompts(prompts).tensors["prompt_embeds"]
    monkeypatch.setattr(_t5, "TOKENS_AT_ONCE", 79)
    hook = backbone.t5[1].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    in_parts = backbone.encode_prompts(prompts).tensors["prompt_embeds"]
    hook.remove()
    torch.testing.assert_close(in_parts, whole)
    assert seen == [3, 1]
    monkeypatch.setattr(_t5, "TOKENS_AT_ONCE", 5)
    torch.testing.assert_close(backbone.encode_prompts(prompts).tensors["prompt_embeds"], whole)


# ---------------------------------------------------------------- what it reads of a prompt


def test_it_decides_whether_a_prompt_is_cut(folder, flux_folder):
    """What CLIPs of 16 tokens leave off, it reads."""
    prompt = "an owl and a dog and a cat"
    assert load(folder, t5=False).is_cut(prompt)
    assert not load(folder).is_cut(prompt)
    assert load(folder, max_sequence_length=12).is_cut(prompt)
    options = {"backbone": "flux", "path": flux_folder, "resolution": 16}
    assert not flux.load(Model(**options), CPU).is_cut(prompt)
    assert flux.load(Model(**options, max_sequence_length=12), CPU).is_cut(prompt)


def test_it_decides_what_an_inspection_says_is_cut(folder, flux_folder):
    """ "a cat" are its four letters and two blanks before the words, and the end."""
    for backbone, path, settings in (("sd3", folder, {"t5": True}), ("flux", flux_folder, {})):
        model = Model(backbone=backbone, path=path, max_sequence_length=10, **settings)
        found = lengths(PROMPTS, model)
        assert not found.are_words
        assert (found.limit, found.cut, int(found.counts[0])) == (10, 1, 7)


# ---------------------------------------------------------------- whole or not at all


@pytest.fixture
def copied(flux_folder, tmp_path):
    return Path(shutil.copytree(flux_folder, tmp_path / "copy"))


def load_flux(folder):
    return flux.load(Model(backbone="flux", path=str(folder), resolution=16), CPU)


@pytest.mark.parametrize("ending", ["SelfAttention.q.weight", "relative_attention_bias.weight", "shared.weight"])
def test_a_missing_weight_is_an_error_and_not_a_random_one(copied, ending):
    file = copied / "text_encoder_2/model.safetensors"
    weights = load_file(file)
    kept = {name: value for name, value in weights.items() if not name.endswith(ending)}
    assert len(kept) < len(weights)
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"text_encoder_2 does not fit: missing \[.*{ending}"):
        load_flux(copied)


def test_a_weight_that_is_not_finite_is_an_error(copied):
    file = copied / "text_encoder_2/model.safetensors"
    weights = load_file(file)
    weights["shared.weight"][3] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"text_encoder_2.*not finite"):
        load_flux(copied)


def test_another_network_in_its_place_is_refused(copied):
    change(copied / "text_encoder_2/config.json", model_type="umt5", architectures=["UMT5EncoderModel"])
    with pytest.raises(ValueError, match=r"text_encoder_2/config.json: model_type 'umt5' is not that of a T5"):
        load_flux(copied)


@pytest.mark.parametrize("missing", ["tokenizer.json", "all"])
def test_a_missing_tokenizer_is_refused(copied, missing):
    folder = copied / "tokenizer_2"
    (folder / "tokenizer.json").unlink()
    if missing == "all":
        shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"tokenizer_2"):
        load_flux(copied)


def test_the_authors_own_file_needs_a_package(copied, monkeypatch):
    """Released pipelines have both; transformers would fall back on another kind of file, and fail there."""
    (copied / "tokenizer_2/tokenizer.json").unlink()
    (copied / "tokenizer_2/spiece.model").write_bytes(b"\n\x0e\n\x05<pad>")
    monkeypatch.setattr(_t5, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json; spiece.model needs the package sentencepiece"):
        load_flux(copied)


def test_a_tokenizer_of_another_model_is_refused(copied):
    change(copied / "text_encoder_2/config.json", pad_token_id=3)
    with pytest.raises(ValueError, match=r"tokenizer_2: pad_token is 0 to the tokenizer and 3 to the model"):
        load_flux(copied)
    change(copied / "text_encoder_2/config.json", pad_token_id=0, eos_token_id=5)
    with pytest.raises(ValueError, match=r"tokenizer_2: eos_token is 1 to the tokenizer and 5 to the model"):
        load_flux(copied)


def test_a_tokenizer_with_more_tokens_than_vectors_is_refused(copied):
    """Fewer are usual: 32,100 of 32,128 in T5 1.1."""
    file = copied / "tokenizer_2/tokenizer.json"
    known = json.loads(file.read_text())
    known["model"]["vocab"] += [[f"word{i}", -4.0] for i in range(8)]
    file.write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"tokenizer_2: a tokenizer of 38 tokens for a model of 32"):
        load_flux(copied)


def test_a_transformer_of_another_width_is_refused(folder, tmp_path):
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    _, other = tiny_flow_models.t5(32)
    other.save_pretrained(copied / "text_encoder_3")
    with pytest.raises(ValueError, match=r"text_encoder_3: d_model is 32, joint_attention_dim of the transformer 48"):
        load(copied)
