"""What is held in memory, and in which precision: encoders and autoencoder, adapters, decoding in parts."""

import copy
import dataclasses
from argparse import Namespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import tiny
from attune.backbones import _memory, flux, sd, sd3, sdxl, z_image
from attune.backbones._memory import ModelOffload, in_parts
from attune.backbones._quantise import quantise
from attune.backbones.sd import load as load_sd
from attune.build import device, load_learner
from attune.config import plugins
from attune.config.settings import Model
from attune.diffusion.lora import add_lora, target_modules
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning
from attune.methods import dpo
from attune.planning import costs
from attune.training import step
from attune.training.step import to_floats
from trainables import Line

CPU = torch.device("cpu")
PARTS = {"sd": ("text_encoder", "vae"), "sdxl": ("encoders", "vae")}


def held(backbone):
    return [name for name in ("text_encoder", "encoders", "vae") if name in vars(backbone)]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_what_was_released_is_read_again_and_gives_the_same(kind, new_policy, new_xl_policy):
    backbone = {"sd": new_policy, "sdxl": new_xl_policy}[kind](adapter=False).backbone
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).to(backbone.device)
    with torch.no_grad():
        images, cond = backbone.decode_latents(latents), backbone.encode_prompts(["a cat"])
    assert held(backbone) == sorted(PARTS[kind], key=["text_encoder", "encoders", "vae"].index)
    backbone.release()
    assert held(backbone) == []
    with torch.no_grad():
        assert torch.equal(backbone.decode_latents(latents), images)
        assert held(backbone) == ["vae"]
        again = backbone.encode_prompts(["a cat"])
    assert all(torch.equal(value, again.tensors[name]) for name, value in cond.tensors.items())


def test_a_full_training_holds_its_encoders_in_the_models_precision(tiny_folder):
    config = dpo.Config(**(tiny.PLAIN | {"lr": 1e-3, "batches": 1, "batch_size": 1}))
    policy = load_learner(config, Model(backbone="sd", path=tiny_folder, dtype="bfloat16"), seed=0)
    backbone = policy.backbone
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    assert {weight.dtype for weight in backbone.text_encoder.parameters()} == {torch.bfloat16}
    assert (policy.autocast, backbone.dtype) == (torch.bfloat16, torch.float32)


# ---------------------------------------------------------------- adapters


def half_policy(folder: str, **model) -> Policy:
    backbone = load_sd(Model(backbone="sd", path=folder, dtype="bfloat16", **model), CPU)
    policy = Policy(backbone, backbone.encode_prompts([""]))
    policy.add_adapter(4, 0, "all")
    tiny.move(policy, 0.1)
    return policy


def predicted(policy: Policy) -> torch.Tensor:
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return policy.predict(x_t, torch.tensor([101, 801]), policy.backbone.encode_prompts(["a cat", "a dog"]))


def dtypes_of_factors(policy: Policy) -> set[torch.dtype]:
    """What the factors of adapters gave while the policy predicted."""
    seen, hooks = set(), []
    for name, module in policy.denoiser.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            hooks.append(module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype)))
    predicted(policy)
    for hook in hooks:
        hook.remove()
    return seen


def test_adapters_compute_as_their_base_does_and_keep_float32_weights(tiny_folder):
    policy = half_policy(tiny_folder)
    assert dtypes_of_factors(policy) == {torch.bfloat16}
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    predicted(policy).square().mean().backward()
    assert {weight.grad.dtype for weight in policy.parameters()} == {torch.float32}


def test_adapters_in_float32_are_a_setting(tiny_folder):
    exact = half_policy(tiny_folder, lora_dtype="float32")
    assert dtypes_of_factors(exact) == {torch.float32}
    with torch.no_grad():
        ours, theirs = predicted(half_policy(tiny_folder)), predicted(exact)
    assert 0 < (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_loaded_adapter_computes_like_a_new_one(tiny_folder, tmp_path):
    policy = half_policy(tiny_folder)
    policy.save(tmp_path)
    loaded = half_policy(tiny_folder)
    loaded.load(tmp_path)
    assert dtypes_of_factors(loaded) == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(predicted(loaded), predicted(policy))


def test_the_reference_is_without_an_adapter_that_was_loaded_later(new_policy, tmp_path):
    """The layers that are switched off are remembered, and must not be those of an adapter that is gone."""
    new_policy(moved=0.3).save(tmp_path)
    policy = new_policy(moved=0.1)
    with policy.reference(), torch.no_grad():
        base = predicted(policy)
    policy.load(tmp_path)
    with policy.reference(), torch.no_grad():
        assert torch.equal(predicted(policy), base)
    assert not torch.equal(predicted(policy), base)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("nf4", 0.2)])
def test_a_quantised_base_takes_an_adapter(kind, error, caplog):
    """Its calls leave no warnings, of which int8 has one for every layer."""
    pytest.importorskip("bitsandbytes")
    place = device()
    sizes = {"block_out_channels": (64, 64), "cross_attention_dim": 64, "layers_per_block": 1, "sample_size": 8}
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**sizes, down_block_types=down, up_block_types=up, attention_head_dim=8)
    unet = unet.to(torch.bfloat16).eval().requires_grad_(False)
    drawn = [torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor([500]), torch.randn(1, 7, 64).bfloat16()]
    inputs = [value.to(place) for value in drawn]
    plain = copy.deepcopy(unet).to(place)(*inputs).sample
    unet = quantise(unet, kind, place)
    assert {"int8": torch.int8, "nf4": torch.uint8}[kind] in {weight.dtype for weight in unet.parameters()}
    add_lora(unet, dict.fromkeys(target_modules(unet, "attention", ["to_q", "to_v"]), 2))
    predicted = unet(*inputs).sample
    assert 0 < (predicted - plain).norm() < error * plain.norm()
    assert not [record for record in caplog.records if "MatMul8bitLt" in record.getMessage()]
    predicted.square().mean().backward()
    gradients = [weight.grad for name, weight in unet.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(g.isfinite().all() and g.any() for g in gradients)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantising_draws_no_weights(kind, monkeypatch):
    """bitsandbytes' layers would: for the 12 billion of FLUX it took a minute and 48 GB of the host's memory."""
    pytest.importorskip("bitsandbytes")
    made: list[str] = []
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda layer: made.append(layer.weight.device.type))
    network = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(64, 8, bias=False))
    made.clear()
    first, small, unbiased = quantise(network.requires_grad_(False), kind, CPU)
    assert made == ["meta", "meta"]
    assert (type(small), unbiased.bias) == (nn.Linear, None)
    assert first.bias.device == CPU


def test_a_quantised_base_needs_its_package_and_an_adapter(tiny_folder, monkeypatch):
    monkeypatch.setattr("attune.config.settings.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="nf4 needs the package bitsandbytes"):
        Model(backbone="sd", path=tiny_folder, quantize="nf4")
    model = Model(backbone="sd", path=tiny_folder).model_copy(update={"quantize": "nf4"})
    config = dpo.Config(**(tiny.PLAIN | {"lr": 1e-3, "batches": 1, "batch_size": 1}))
    with pytest.raises(ValueError, match=r"model\.quantize: weights in nf4 cannot be trained"):
        load_learner(config, model, seed=0)


def test_no_whole_denoiser_takes_the_place_of_a_quantised_one(new_policy, tiny_folder):
    policy = new_policy()
    policy.backbone.model = policy.backbone.model.model_copy(update={"quantize": "nf4"})
    with pytest.raises(ValueError, match=r"model\.quantize: .* is a whole denoiser"):
        policy.load(tiny_folder)


# ---------------------------------------------------------------- decoding


def test_decoding_is_in_parts_and_changes_nothing(new_policy, monkeypatch):
    backbone = new_policy(adapter=False).backbone
    backbone.vae = copy.deepcopy(backbone.vae)
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3)).to(backbone.device)
    sizes: list[int] = []
    backbone.vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        whole = backbone.decode_latents(latents)
        monkeypatch.setattr(_memory, "MAX_PIXELS", 2 * 16 * 16 + 1)  # of images of 16 px
        assert torch.allclose(backbone.decode_latents(latents), whole, atol=1e-5)
    assert sizes == [5, 2, 2, 1]
    backbone.decode_latents(latents.requires_grad_()).sum().backward()
    assert sizes[-1] == 5


def test_one_image_larger_than_the_budget_is_decoded():
    assert in_parts(lambda rows: rows + 1, torch.zeros(3, 1), 2**40).tolist() == [[1], [1], [1]]


# ---------------------------------------------------------------- model offload


class Noted(nn.Linear):
    """Says where it is moved."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.places: list[str] = []

    def to(self, place):
        self.places.append(str(place))
        return self


def test_one_network_at_a_time_is_on_the_gpu():
    offload, first, second = ModelOffload(torch.device("cuda"), offload=True), Noted(), Noted()
    for network in (first, first, second, first):
        assert offload.onload(network) is network
    assert (offload.load_to, first.places, second.places) == (CPU, ["cuda", "cpu", "cuda"], ["cuda", "cpu"])


@pytest.mark.parametrize(("place", "wanted"), [("cuda", False), ("cpu", True)])
def test_networks_stay_where_there_is_one_place(place, wanted):
    offload, network = ModelOffload(torch.device(place), wanted), Noted()
    assert offload.onload(network) is network
    assert (offload.load_to.type, network.places) == (place, [])


# ---------------------------------------------------------------- transfers


def test_numbers_and_tensors_are_read_in_their_order():
    values = [torch.tensor(0.1, requires_grad=True), 0.1, torch.tensor([3]), 2]
    assert to_floats(values) == [torch.tensor(0.1).item(), 0.1, 3.0, 2.0]
    assert to_floats([1, 2.5]) == [1.0, 2.5]


def test_the_schedule_lies_where_the_model_does(new_policy):
    backbone = new_policy(adapter=False).backbone
    assert backbone.path.alphas_cumprod.device == backbone.device
    assert isinstance(backbone.encode_prompts([""]), Conditioning)


# ---------------------------------------------------------------- what is planned

IN_HALF = Namespace(model=Model(backbone="sd", path="x", dtype="bfloat16", vae_dtype="bfloat16"))


@pytest.mark.parametrize(
    ("weights", "rank", "pairs", "resolution", "checkpointing", "measured"),
    [
        (sd.NOMINAL, 4, 8, 512, False, 14.79),
        (sdxl.NOMINAL, 64, 1, 1024, False, 17.11),
        (sd3.NOMINAL, 32, 1, 1024, False, 20.50),
        (flux.facts(Model(backbone="flux", path=f"a/b@{40 * '0'}")), 32, 1, 1024, True, 27.30),
        (dataclasses.replace(z_image.NOMINAL, text=64 * 4), 32, 1, 768, True, 14.62),
    ],
)
def test_planned_memory_is_near_what_a_gpu_needed(weights, rank, pairs, resolution, checkpointing, measured):
    """GiB of DPO with a LoRA on a H100, reports/gpu.md; the autoencoder, which a training lets go of, was there too."""
    config = dpo.Config(lora={"rank": rank}, batch_size=pairs, gradient_checkpointing=checkpointing)
    facts = dataclasses.replace(weights, resolution=resolution)
    kept = (weights.denoiser + weights.autoencoder) * 2 + weights.adapter * rank * costs.STATE[config.optimizer]
    planned = kept + costs._activations(config, 2 * pairs, IN_HALF, facts)
    assert planned / 2**30 == pytest.approx(measured, rel=0.03)


def test_planned_memory_with_checkpointing_is_near_what_a_cpu_needed():
    """GiB of one pair of SD 1.5 in a process of its own, docs/full_size.md; libraries are 0.6 of them."""
    config = dpo.Config(lora={"rank": 4}, batch_size=1, gradient_checkpointing=True)
    kept = sd.NOMINAL.denoiser * 2 + sd.NOMINAL.adapter * 4 * costs.STATE[config.optimizer]
    planned = kept + costs._activations(config, 2, IN_HALF, dataclasses.replace(sd.NOMINAL, resolution=512))
    assert planned / 2**30 + 0.6 == pytest.approx(3.27, rel=0.05)


@pytest.mark.parametrize(
    ("name", "changes", "kind", "images"),
    [
        ("dpo", {"batch_size": 3}, "pairs", 6),
        ("sft", {"batch_size": 3}, "pairs", 3),
        ("kto", {"batch_size": 3}, "pairs", 6),
        ("kto", {"batch_size": 3}, "images", 3),
        ("spo", {"minibatch_size": 5, "guidance_scale": 5.0}, "prompts", 10),
        ("spo", {"minibatch_size": 5, "guidance_scale": 1.0, "inner_steps": 2}, "prompts", 10),
        ("alignprop", {}, "prompts", None),
    ],
)
def test_images_at_once(name, changes, kind, images):
    config = plugins.load("methods", name).Config(**changes)
    assert costs._images_at_once(config, name, kind, doubled=True) == images


def test_guidance_that_a_denoiser_is_told_shows_it_no_image_twice():
    config = plugins.load("methods", "spo").Config(minibatch_size=5, guidance_scale=5.0)
    assert costs._images_at_once(config, "spo", "prompts", doubled=False) == 5


def test_a_model_of_another_shape_is_not_guessed(tiny_folder):
    assert sd.facts(Model(backbone="sd", path=tiny_folder)).activations is None
    published = Model(backbone="sd", path="owner/name@" + "0" * 40)
    assert sd.facts(published).activations == sd.NOMINAL.activations


# ---------------------------------------------------------------- switches


def test_channels_last_is_another_order_of_the_same_numbers(tiny_folder):
    ordered, plain = (
        load_sd(Model(backbone="sd", path=tiny_folder, channels_last=last), CPU) for last in (True, False)
    )
    for network in (ordered.denoiser.conv_in, ordered.vae.decoder.conv_in):
        assert network.weight.is_contiguous(memory_format=torch.channels_last)
    x_t, cond = torch.randn(2, 4, 8, 8), plain.encode_prompts(["a cat", "a dog"])
    with torch.no_grad():
        ours, theirs = (b.predict(b.denoiser, x_t, torch.tensor([5, 900]), cond) for b in (ordered, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ordered.decode_latents(x_t), plain.decode_latents(x_t), rtol=1e-4, atol=1e-5)


def test_a_training_does_not_offload(tiny_folder):
    """A backward pass would find the denoiser elsewhere."""
    config = dpo.Config(**(tiny.PLAIN | {"lora": {"rank": 2}, "lr": 1e-3, "batches": 1, "batch_size": 1}))
    model = Model(backbone="sd", path=tiny_folder, offload=True)
    assert not load_learner(config, model, seed=0).backbone.model.offload


def test_tf32_is_asked_for_where_there_is_a_gpu(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        step.allow_tf32(True)
        step.allow_tf32(False)
    assert said == ["high", "highest"]


def test_the_settings_of_a_training_reach_torch(monkeypatch):
    said: list[object] = []
    monkeypatch.setattr(step, "allow_tf32", said.append)
    monkeypatch.setattr(nn.Module, "compile", lambda module, mode=None: said.append(mode))
    Line([1.0]).train(1, tf32=True, compile="reduce-overhead")
    Line([1.0]).train(1, compile=True)
    assert said == [True, "reduce-overhead", False, None]
