"""Base models: as diffusers' own pipelines encode and draw, in every precision, and whole or not at all."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from attune.backbones import sd, sdxl
from attune.config import plugins
from attune.config.settings import Model
from attune.diffusion import process
from attune.diffusion.ddim import sample
from attune.diffusion.policy import Policy
from attune.hub import HubError

CPU = torch.device("cpu")
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PROMPTS = ["a cat", "two owls and a dog that is far too long for the tokenizer", "no hen"]


@pytest.fixture(params=PIPELINES)
def name(request):
    return request.param


@pytest.fixture
def folder(name, tiny_folder, tiny_xl_folder):
    return {"sd": tiny_folder, "sdxl": tiny_xl_folder}[name]


@pytest.fixture
def load(name, folder):
    """Loads the backbone under test with settings of its block."""

    def load(**settings):
        return plugins.load("backbones", name).load(Model(**({"backbone": name, "path": folder} | settings)), CPU)

    return load


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the pipeline, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def pipeline(name, folder):
    pipeline = PIPELINES[name].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def x_t(n=3, size=8):
    return torch.randn(n, 4, size, size, generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------- as diffusers does it


@torch.no_grad()
def encoded(pipeline, prompts, negative=None):
    """What a pipeline makes of prompts, and of no or some negative prompt: under our names."""
    options = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    found = pipeline.encode_prompt(prompts, negative_prompt=negative, **options)
    if len(found) == 2:
        return [{"prompt_embeds": value} for value in found]
    return [
        {"prompt_embeds": embeds, "text_embeds": pooled} for embeds, pooled in zip(found[:2], found[2:], strict=True)
    ]


def equal(ours, theirs):
    assert ours.tensors.keys() == theirs.keys()
    return all(torch.equal(ours.tensors[name], value) for name, value in theirs.items())


def test_prompts_are_encoded_as_diffusers_does(load, pipeline):
    cond, null = encoded(pipeline, PROMPTS)
    assert equal(load().encode_prompts(PROMPTS), cond)
    assert equal(load().encode_prompts([""] * 3), null)


def test_the_empty_prompt_of_sdxl(tiny_xl_folder, tmp_path):
    """All zeros, also between others, unless the pipeline says that the empty prompt is encoded like any."""
    zeros = sdxl.load(Model(backbone="sdxl", path=tiny_xl_folder), CPU).encode_prompts(["a cat", "", "bees"])
    for value in zeros.tensors.values():
        assert not value[1].any()
        assert value[0].any()
        assert value[2].any()
    folder = tiny.write_xl_pipeline(tmp_path, zeros_for_empty_prompt=False)
    _, null = encoded(StableDiffusionXLPipeline.from_pretrained(folder), ["a cat"])
    assert null["text_embeds"].any()
    assert equal(sdxl.load(Model(backbone="sdxl", path=folder), CPU).encode_prompts([""]), null)


def test_the_second_tokenizer_pads_with_its_own_token(tiny_xl_folder):
    (first, _), (second, _) = sdxl.load(Model(backbone="sdxl", path=tiny_xl_folder), CPU).encoders
    assert second.pad_token_id == 0
    assert second.pad_token == "!"
    assert first.pad_token_id == first.eos_token_id


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_images_are_those_of_diffusers(load, pipeline, guidance_scale):
    backbone, start = load(), x_t(2)
    policy = Policy(backbone, backbone.encode_prompts([""]))
    latents = sample(policy, backbone.encode_prompts(PROMPTS[:2]), lambda shape: start, 7, 0.0, guidance_scale)
    with torch.no_grad():
        images = backbone.decode_latents(latents).clamp(0, 1)
    options = {"latents": start, "num_inference_steps": 7, "guidance_scale": guidance_scale, "eta": 0.0}
    torch.testing.assert_close(images, pipeline(PROMPTS[:2], output_type="pt", **options).images, rtol=0, atol=1e-5)


def test_latents_are_those_of_diffusers(load, pipeline):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = pipeline.vae.encode(images * 2 - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert torch.equal(load().encode_images(images), theirs)
    drawn = [load().encode_images(images, torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], theirs)


class AsVelocity(nn.Module):
    """A denoiser that says in velocity what another says in epsilon."""

    def __init__(self, denoiser, path):
        super().__init__()
        self.denoiser, self.path = denoiser, path

    def forward(self, x, t, **kwargs):
        output, at = self.denoiser(x, t, **kwargs), self.path.level(t, x)
        x_0 = process.predict_x0(x, output.sample, at)
        return type(output)(at.alpha * output.sample - at.sigma * x_0)


@torch.no_grad()
def test_velocity_and_epsilon_mean_the_same_x0(load):
    backbone, t = load(), torch.tensor([1, 501, 951])
    cond = backbone.encode_prompts(PROMPTS)
    velocity = copy.copy(backbone)
    velocity.prediction_type = "v_prediction"
    wrapped = AsVelocity(backbone.denoiser, backbone.path)
    at = backbone.path.level(t, x_t())
    x_0, again = (
        process.predict_x0(x_t(), model.predict(denoiser, x_t(), t, cond), at)
        for model, denoiser in ((backbone, backbone.denoiser), (velocity, wrapped))
    )
    torch.testing.assert_close(again, x_0, rtol=1e-4, atol=1e-4)


def test_the_prediction_type_is_read_from_the_scheduler(tmp_path):
    folder = tiny.write_pipeline(tmp_path / "v", "v_prediction")
    assert sd.load(Model(backbone="sd", path=folder), CPU).prediction_type == "v_prediction"
    folder = tiny.write_pipeline(tmp_path / "x0", "sample")
    with pytest.raises(ValueError, match="prediction_type 'sample' is not supported"):
        sd.load(Model(backbone="sd", path=folder), CPU)


# ---------------------------------------------------------------- size


class Seen(nn.Module):
    """Remembers what a denoiser was told besides its text."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.rows, self.time_ids = denoiser, [], []

    def forward(self, x, t, **kwargs):
        self.rows.append(len(x))
        self.time_ids.append(kwargs["added_cond_kwargs"]["time_ids"])
        return self.denoiser(x, t, **kwargs)


@torch.no_grad()
def test_a_schedule_that_ends_in_pure_noise_is_refused(load, copied):
    """With a_T = 0 there is no x_0 in x_T, and predicting it would divide by zero."""
    file = copied / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(ValueError, match="zero SNR"):
        load(path=str(copied))


def test_time_ids_are_of_every_row_and_of_the_resolution(tiny_xl_folder):
    backbone = sdxl.load(Model(backbone="sdxl", path=tiny_xl_folder, resolution=32), CPU)
    policy = Policy(backbone, backbone.encode_prompts([""]))
    policy.module = Seen(policy.denoiser)
    cond, t = backbone.encode_prompts(PROMPTS), torch.tensor([1, 501, 951])
    policy.predict(x_t(size=16), t, cond)
    policy.predict(x_t(size=16), t, cond, 5.0)  # guidance doubles the batch
    policy.predict(x_t(6, 16), t.repeat(2), cond.repeat(2))
    assert policy.module.rows == [3, 6, 6]
    for rows, time_ids in zip(policy.module.rows, policy.module.time_ids, strict=True):
        assert time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * rows


@torch.no_grad()
def test_a_row_does_not_see_the_others(load):
    backbone, t = load(), torch.tensor([1, 501, 951])
    cond = backbone.encode_prompts(PROMPTS)
    together = backbone.predict(backbone.denoiser, x_t(), t, cond)
    for row in range(3):
        alone = backbone.predict(backbone.denoiser, x_t()[[row]], t[[row]], cond[[row]])
        torch.testing.assert_close(alone, together[[row]], rtol=1e-4, atol=1e-5)


def test_resolution_and_latents(load):
    assert (load().resolution, load().latent_shape) == (16, (4, 8, 8))
    larger = load(resolution=24)
    assert (larger.resolution, larger.latent_shape) == (24, (4, 12, 12))
    assert larger.encode_images(torch.rand(1, 3, 24, 24)).shape == (1, 4, 12, 12)
    with pytest.raises(ValueError, match=r"model\.resolution: 17 is not a multiple of 2"):
        load(resolution=17)


# ---------------------------------------------------------------- precision and another autoencoder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_with_an_adapter_in_full(load, dtype):
    """Noise and latents stay float32 outside the denoiser; gradients arrive in float32, finite, everywhere."""
    backbone, full, t = load(dtype=dtype), load(), torch.tensor([1, 501, 951])
    policy = Policy(backbone, backbone.encode_prompts([""]))
    policy.add_adapter(2, 0)
    tiny.move(policy, 0.1)
    assert {weight.dtype for weight in backbone.denoiser.parameters()} == {getattr(torch, dtype), torch.float32}
    cond = backbone.encode_prompts(PROMPTS)
    noise_pred = policy.predict(x_t(), t, cond, 2.0)
    assert noise_pred.dtype == torch.float32
    noise_pred.square().mean().backward()
    gradients = [weight.grad for weight in policy.parameters()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)
    with torch.no_grad():
        images = backbone.decode_latents(x_t())
        assert images.dtype == torch.float32
        assert torch.equal(images, full.decode_latents(x_t()))  # the autoencoder is not halved
        halved, exact = (b.predict(b.denoiser, x_t(), t, b.encode_prompts(PROMPTS)) for b in (load(dtype=dtype), full))
    error = (halved - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < {"bfloat16": 0.05, "float16": 0.01}[dtype]


def test_another_autoencoder_takes_its_place(load, tmp_path):
    torch.manual_seed(8)
    other = tiny.autoencoder()
    other.save_pretrained(tmp_path)
    plain, replaced, halved = load(), load(vae=str(tmp_path)), load(vae=str(tmp_path), vae_dtype="bfloat16")
    with torch.no_grad():
        expected = other.eval().decode(x_t() / other.config.scaling_factor).sample / 2 + 0.5
        assert torch.equal(replaced.decode_latents(x_t()), expected)
        assert not torch.allclose(plain.decode_latents(x_t()), expected, atol=1e-2)
        images = halved.decode_latents(x_t())
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, rtol=0, atol=0.05)
    assert not torch.equal(images, expected)
    assert halved.encode_images(torch.rand(1, 3, 16, 16)).dtype == torch.float32


# ---------------------------------------------------------------- whole or not at all


PARTS = {
    "unet": ("diffusion_pytorch_model", "conv_in.weight"),
    "vae": ("diffusion_pytorch_model", "decoder.conv_in.weight"),
    "text_encoder": ("model", "final_layer_norm.weight"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_weight_is_an_error_and_not_a_random_one(load, copied, part):
    file, ending = PARTS[part]
    file = copied / part / f"{file}.safetensors"
    weights = load_file(file)
    key = next(name for name in weights if name.endswith(ending))
    del weights[key]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{part} does not fit: missing \['.*{ending}'\], unexpected \[\]"):
        load(path=str(copied))


@pytest.mark.parametrize("part", PARTS)
def test_pickles_are_not_read(load, copied, part):
    file = next((copied / part).glob("*.safetensors"))
    torch.save(load_file(file), copied / part / ("pytorch_model.bin" if part == "text_encoder" else f"{file.stem}.bin"))
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(path=str(copied))


def test_an_autoencoder_of_another_kind_is_refused(load, tmp_path):
    shifted = tiny.autoencoder()
    shifted.register_to_config(latents_mean=[0.1] * 4)
    shifted.save_pretrained(tmp_path / "shifted")
    with pytest.raises(ValueError, match="with latents_mean and latents_std is not supported"):
        load(vae=str(tmp_path / "shifted"))
    config = {**tiny.WIDTHS, "sample_size": 16, "latent_channels": 8}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    type(shifted)(**config, **types).save_pretrained(tmp_path / "eight")
    with pytest.raises(ValueError, match=r"model\.vae has 8 latent channels, the denoiser 4"):
        load(vae=str(tmp_path / "eight"))


def test_a_name_that_is_nothing_is_refused(load):
    with pytest.raises(FileNotFoundError, match=r"no folder no-such-model/scheduler; one on the Hub is written"):
        load(path="no-such-model")


@torch.no_grad()
def test_a_hub_id_means_the_commit_it_is_pinned_to(load, folder, on_the_hub):
    name, commit = on_the_hub(folder)
    here, there = load(), load(path=f"{name}@{commit}", vae=f"{name}/vae@{commit}")
    assert equal(here.encode_prompts(PROMPTS), there.encode_prompts(PROMPTS).tensors)
    assert torch.equal(here.decode_latents(x_t()), there.decode_latents(x_t()))
    with pytest.raises(HubError, match=r"owner/name/scheduler@f{40} is not in the cache and could not be fetched"):
        load(path=f"{name}@{'f' * 40}")


@pytest.mark.parametrize("missing", ["", "tokenizer.json"])
def test_an_empty_tokenizer_is_refused(load, copied, missing):
    """transformers would make one that knows no word, and every prompt would be the same."""
    gone = copied / "tokenizer" / missing
    gone.unlink() if missing else shutil.rmtree(gone)
    with pytest.raises(FileNotFoundError, match="copy/tokenizer"):
        load(path=str(copied))


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_not_finite_are_refused(load, copied, part):
    file, ending = PARTS[part]
    file = copied / part / f"{file}.safetensors"
    weights = load_file(file)
    key = next(name for name in weights if name.endswith(ending))
    weights[key].view(-1)[0] = torch.inf
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{part}/\w+\.safetensors: .*{ending} holds values that are not finite"):
        load(path=str(copied))


def test_facts_are_counted_in_the_files_that_are_here(name, load, folder):
    facts, backbone = plugins.load("backbones", name).facts(Model(backbone=name, path=folder)), load()
    assert facts.resolution == backbone.resolution
    assert facts.denoiser == sum(weight.numel() for weight in backbone.denoiser.parameters())
    assert facts.autoencoder == sum(weight.numel() for weight in backbone.vae.parameters())


def test_downloads_are_all_that_is_read(name, load, folder, tmp_path):
    """A copy of only those files loads as the whole does."""
    module, source = plugins.load("backbones", name), Model(backbone=name, path=folder)
    for part, patterns in module.downloads(source):
        for file in (file for pattern in patterns for file in Path(part.place).glob(pattern)):
            copy_of = tmp_path / file.relative_to(folder)
            copy_of.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy_of)
    assert equal(load(path=str(tmp_path)).encode_prompts(PROMPTS), load().encode_prompts(PROMPTS).tensors)


def test_every_part_is_frozen_and_evaluating(load):
    networks = [value for value in vars(load()).values() if isinstance(value, nn.Module)]
    networks += [encoder for _, encoder in getattr(load(), "encoders", ())]
    assert len(networks) >= 3
    for network in networks:
        assert not network.training
        assert not any(weight.requires_grad for weight in network.parameters())


def test_conditioning_is_batch_first(load):
    cond = load().encode_prompts(PROMPTS)
    assert dataclasses.is_dataclass(cond)
    assert {len(value) for value in cond.tensors.values()} == {3}
