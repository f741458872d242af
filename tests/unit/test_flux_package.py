"""Sharing a model of FLUX, and of Stable Diffusion 3 with its T5: as diffusers' pipelines draw with the files."""

import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors import safe_open
from safetensors.torch import save_file

import tiny
import tiny_flow_models
from attune.backbones import flux, sd3
from attune.config.plugins import load
from attune.config.settings import Model, Sampling
from attune.diffusion.ddim import sample
from attune.diffusion.lora_files import ADAPTER_FILE
from attune.diffusion.policy import Policy
from attune.sharing.card import Evidence, card
from attune.sharing.package import Trained, write_package

CPU = torch.device("cpu")
SAMPLING = {"steps": 3, "eta": 0.0, "guidance_scale": 3.5, "batch_size": 2}
PROMPTS = ["a cat", "two owls"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Backbone -> its settings, of tiny pipelines."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("flux", "sd3")}
    return {
        "flux": Model(backbone="flux", path=tiny_flow_models.write_flux_pipeline(places["flux"]), resolution=16),
        "sd3": Model(backbone="sd3", path=tiny_flow_models.write_sd3_pipeline(places["sd3"], with_t5=True), t5=True),
    }


def trained(model, folder, lora):
    backbone = load("backbones", model.backbone).load(model, CPU)
    policy = Policy(backbone, backbone.encode_prompts([""]))
    if lora:
        policy.add_adapter(2, 0)
    else:
        policy.unfreeze()
    tiny.move(policy, 0.1)
    policy.save(folder)
    settings = {"lora": {"rank": 2, "targets": "attention"} if lora else None}
    known = {"run": "dpo", "profile": "short", "method": "dpo", "settings": settings, "trained_on": [], "seed": 0}
    base = {"base": model.model_dump(mode="json"), "from": None, "starts_from": None}
    return Trained(folder, known | base, {"source": "world"})


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_diffusers_draws_with_the_package_what_the_model_draws(bases, tmp_path, name, lora):
    """Both layouts of an adapter, and a whole transformer; FLUX is told its guidance, and its latents are packed."""
    model = bases[name]
    made = trained(model, tmp_path / "model", lora)
    (tmp_path / "package").mkdir()
    arguments = (Evidence(None, "Not scored.", None, SAMPLING), PROMPTS, Sampling(**SAMPLING))
    checks = write_package(tmp_path / "package", made, *arguments, lambda s: load("backbones", name).load(s, CPU))
    assert len(checks) == (2 if lora else 1)
    assert all(check.difference < 1e-4 < 0.01 < check.effect for check in checks)
    text = (tmp_path / "package/README.md").read_text()
    assert "text_encoder_3" not in text
    assert "guidance_scale=3.5" in text
    assert ("load_lora_weights" in text) == lora


def test_the_card_of_a_model_of_flux(bases):
    names = flux.in_diffusers(bases["flux"])
    assert names.tag == "flux-1-dev"
    known = {"run": "dpo", "profile": "flux", "method": "dpo", "trained_on": [], "seed": 0, "starts_from": None}
    base = Model(backbone="flux", path="black-forest-labs/FLUX.1-dev@" + "c" * 40).model_dump(mode="json")
    text = card(known | {"base": base, "settings": {"lora": {"rank": 2, "targets": "attention"}}}, {"source": "world"})
    assert "license_name: flux-1-dev-non-commercial-license" in text
    assert 'FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", revision=' in text


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("density", ["logit_normal", "uniform"])
def test_times_of_flux_have_the_shift_of_the_size(bases, density):
    """The 16 tokens of the tiny one: e^0.459 by diffusers' line, which its table before `set_timesteps` has not."""
    model = bases["flux"].model_copy(update={"density": density})
    told = flux.times(model)
    assert told == {
        "density": density,
        "shift": pytest.approx(1.583, abs=1e-3),
        "sampled_at": "FlowMatchEulerDiscreteScheduler",
    }
    drawn = flux.load(model, CPU).path.training_times(tiny.draws(20_000), 20_000)
    median = 1000 * told["shift"] / (1 + told["shift"])  # of an even half
    assert (drawn < median).double().mean().item() == pytest.approx(0.5, abs=0.015)
    if density == "uniform":
        even = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).sigmas
        assert len(drawn.unique()) > 990
        least = even.min().item()
        assert drawn.min().item() == pytest.approx(
            1000 * told["shift"] * least / (1 + (told["shift"] - 1) * least), rel=1e-4
        )


def test_a_t5_is_a_part_of_the_pipeline_only_where_it_is_read(bases):
    with_t5, without = bases["sd3"], bases["sd3"].model_copy(update={"t5": False})
    assert sd3.in_diffusers(with_t5).left_out == ()
    assert sd3.in_diffusers(without).left_out == ("text_encoder_3", "tokenizer_3")
    parts = sd3.load(with_t5, CPU).pipeline_parts()
    assert parts["text_encoder_3"] is not None
    assert sd3.load(without, CPU).pipeline_parts()["tokenizer_3"] is None


# ---------------------------------------------------------------- adapters


COMFY = re.compile(  # what ComfyUI's comfy/utils.py, flux_to_diffusers, has a place for, and its LoRA reader's ending
    r"transformer\.(transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|"
    r"norm1(_context)?\.linear|ff(_context)?\.net\.(0\.proj|2))|"
    r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)|"
    r"context_embedder|norm_out\.linear|time_text_embed\.\w+\.linear_[12])\.lora_[AB]\.weight"
)


@pytest.mark.parametrize("targets", ["attention", "all", ["attn.to_q", "ff.net.2", "proj_mlp"]])
def test_diffusers_and_comfyui_read_an_adapter(bases, targets, tmp_path):
    policy = tiny_flow_models.adapted(flux.load(bases["flux"], CPU), targets)
    tiny.move(policy, 0.1)
    policy.save(tmp_path)
    with safe_open(tmp_path / ADAPTER_FILE, "pt") as file:
        names = list(file.keys())
    assert all(COMFY.fullmatch(name) for name in names)
    assert len(names) == len(policy.parameters())
    start = tiny_flow_models.noise()
    options = {"num_inference_steps": 5, "guidance_scale": 3.5, "output_type": "latent"}
    options |= {"height": 16, "width": 16, "latents": flux.packed(start)}
    theirs = tiny_flow_models.read(FluxPipeline, bases["flux"].path)
    plain = theirs(PROMPTS, **options).images
    theirs.load_lora_weights(tmp_path)
    expected = theirs(PROMPTS, **options).images
    found = sample(policy, policy.backbone.encode_prompts(PROMPTS), lambda shape: start, 5, 0.0, 3.5)
    torch.testing.assert_close(flux.packed(found), expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-2


OTHERS = (
    *("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_single_blocks_3_linear1.lora_up.weight"),
    *("diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight", "double_blocks.0.processor.qkv_lora1.up.weight"),
    *(
        "lora_unet_joint_blocks_2_x_block_attn_qkv.lora_down.weight",
        "diffusion_model.layers.4.attention.qkv.lora_B.weight",
    ),
)


@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_in_the_names_of_the_models_own_code_is_refused_with_a_remedy(bases, tmp_path, name):
    save_file({name: torch.ones(2, 2)}, tmp_path / "other.safetensors")
    backbone = load("backbones", "flux").load(bases["flux"], CPU)
    policy = Policy(backbone, backbone.encode_prompts([""]))
    with pytest.raises(ValueError, match=rf"other\.safetensors: {re.escape(name)} is a name .*convert_flux_lora\.py"):
        policy.load(tmp_path / "other.safetensors")
