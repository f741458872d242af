"""Adapters in kohya's layout: names as sd-scripts has them, and the same pictures in diffusers as in our own policy."""

import json

import pytest
import torch
from safetensors.torch import load_file

from attune.diffusion.lora import add_lora, lora_ranks
from attune.diffusion.lora_files import ADAPTER_FILE
from attune.sharing.kohya import header, sgm_name, to_kohya
from attune.weights import read_header, save_tensors
from drawing import drawn, drawn_by, same_weights

MADE = {"run": "dpo", "method": "dpo", "seed": 0, "base": {"path": "owner/base@" + "0" * 40}}
XL = {  # what matters of SDXL's own configuration
    "addition_embed_type": "text_time",
    "cross_attention_dim": 2048,
    "layers_per_block": 2,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
SGM = {  # from sd-scripts, library/sdxl_model_util.py: make_unet_conversion_map
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": "input_blocks.4.1.transformer_blocks.1.attn1.to_q",
    "down_blocks.2.resnets.1.time_emb_proj": "input_blocks.8.0.emb_layers.1",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.resnets.2.conv_shortcut": "output_blocks.2.0.skip_connection",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2": "output_blocks.4.1.transformer_blocks.0.ff.net.2",
    "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
}


@pytest.mark.parametrize("module", SGM)
def test_modules_of_sdxl_have_the_names_of_sd_scripts(module):
    assert sgm_name(module, XL) == SGM[module]


def test_a_module_without_a_name_is_told():
    with pytest.raises(ValueError, match=r"mid_block\.attentions\.3\.x has no name in kohya's layout of SDXL"):
        sgm_name("mid_block.attentions.3.x", XL)


def as_kohya(policy, folder):
    """The policy's adapter, saved as ours and then as kohya's."""
    policy.save(folder)
    unet = dict(policy.denoiser.config)
    tensors = to_kohya(load_file(folder / ADAPTER_FILE), unet)
    told = header(lora_ranks(policy.denoiser), unet, policy.backbone.prediction_type, policy.backbone.resolution, MADE)
    file = folder / "kohya" / "dpo.safetensors"
    save_tensors(tensors, file, told)
    return file


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_diffusers_generates_the_same_with_kohyas_file(new, pipeline, tmp_path, targets):
    policy = new(moved=0.1, rank=3, targets=targets)
    file, before = as_kohya(policy, tmp_path), drawn_by(pipeline)
    pipeline.load_lora_weights(file)
    after = drawn_by(pipeline)
    torch.testing.assert_close(after, drawn(policy).clamp(0, 1), rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 0.01
    assert lora_ranks(pipeline.unet) == lora_ranks(policy.denoiser)
    again = new(adapter=False)
    again.load(file)
    assert same_weights(again, policy)


def test_ranks_that_differ_are_kept(new, pipeline, tmp_path):
    """Convolutions of 3 x 3 and of 1 x 1, linear layers and embeddings, of ranks 1 to 4.

    With an alpha for each module diffusers generates something else: it loses those of attention.
    """
    policy = new(adapter=False)
    layers = sorted(lora_ranks(new(targets="all").denoiser))
    add_lora(policy.denoiser, {name: 1 + i % 4 for i, name in enumerate(layers)})
    generator = torch.Generator().manual_seed(3)
    for weight in policy.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    file = as_kohya(policy, tmp_path)
    pipeline.load_lora_weights(file)
    torch.testing.assert_close(drawn_by(pipeline), drawn(policy).clamp(0, 1), rtol=0, atol=1e-5)
    again = new(adapter=False)
    again.load(file)
    assert lora_ranks(again.denoiser) == lora_ranks(policy.denoiser)
    torch.testing.assert_close(drawn(again), drawn(policy), rtol=0, atol=1e-5)
    assert read_header(file)["ss_network_dim"] == "4"


@pytest.mark.parametrize(
    ("unet", "predicts", "version", "architecture"),
    [
        ({"cross_attention_dim": 768}, "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        ({"cross_attention_dim": 1024}, "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        ({"cross_attention_dim": 1024}, "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        (XL, "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_header_tells_programs_which_base_it_is_for(unet, predicts, version, architecture):
    told = header({"a": 4, "b": 2}, unet, predicts, 768, MADE)
    assert (told["ss_base_model_version"], told["modelspec.architecture"]) == (version, architecture)
    assert (told["ss_network_module"], told["ss_network_dim"], told["ss_network_alpha"]) == ("networks.lora", "4", "4")
    assert told["modelspec.prediction_type"] == ("v" if predicts == "v_prediction" else "epsilon")
    assert (told["modelspec.sai_model_spec"], told["modelspec.resolution"]) == ("1.0.0", "768x768")
    assert json.loads(json.dumps(told)) == told
    assert all(isinstance(value, str) for value in told.values())
