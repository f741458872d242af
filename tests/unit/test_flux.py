"""FLUX.1-dev as a base: as diffusers' own pipeline encodes and draws, and every kind of training on it."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import T5Config, T5EncoderModel

import tiny
import tiny_flow_models
from attune.backbones import _t5, flux
from attune.config.settings import Model
from attune.data.batches import PromptBatch
from attune.diffusion.lora import target_modules
from attune.diffusion.noised import policy_error
from attune.methods import alignprop, dpo, draft, kto, mapo, refl, sft, spin, spo
from tiny_flow_models import PROMPTS, adapted, noise
from trainables import Light

CPU = torch.device("cpu")
TOKENS = 24  # of a prompt, so that the second is cut


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flow_models.write_flux_pipeline(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return tiny_flow_models.read(FluxPipeline, folder)


def load(folder, **settings):
    given = {"resolution": 16, "max_sequence_length": TOKENS} | settings
    return flux.load(Model(backbone="flux", path=str(folder), **given), CPU)


@pytest.fixture
def backbone(folder):
    return load(folder)


@pytest.fixture
def policy(backbone):
    return adapted(backbone)


# ---------------------------------------------------------------- as diffusers does it


@torch.no_grad()
def test_prompts_are_encoded_as_diffusers_does(backbone, pipeline):
    theirs, pooled, _ = pipeline.encode_prompt(PROMPTS, None, device=CPU, max_sequence_length=TOKENS)
    ours = backbone.encode_prompts(PROMPTS).tensors
    torch.testing.assert_close(ours["prompt_embeds"], theirs)
    torch.testing.assert_close(ours["text_embeds"], pooled)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 3.5])
@pytest.mark.parametrize("side", [8, 12])
def test_images_are_those_of_diffusers(folder, pipeline, guidance_scale, side):
    """The shift depends on the size, and so does the place that each token is told."""
    backbone = load(folder, resolution=2 * side)
    images = tiny_flow_models.drawn(backbone, noise(side=side), guidance_scale)
    options = {"num_inference_steps": 7, "guidance_scale": guidance_scale, "max_sequence_length": TOKENS}
    options |= {"latents": flux.packed(noise(side=side)), "output_type": "pt"}
    theirs = pipeline(PROMPTS, height=2 * side, width=2 * side, **options).images
    assert theirs.std() > 0.05
    torch.testing.assert_close(images, theirs, rtol=0, atol=1e-4)


def test_as_many_tokens_as_the_pipeline_reads(folder, pipeline):
    """512 of them; what 256 pixels are here are 1024 of FLUX, whose autoencoder makes a latent of 8 pixels."""
    backbone = load(folder, resolution=None, max_sequence_length=None)
    assert (backbone.resolution, backbone.latent_shape) == (256, (4, 128, 128))
    assert backbone.encode_prompts(["a cat"]).tensors["prompt_embeds"].shape == (1, 512, 32)
    assert flux.facts(backbone.model).resolution == 256


def test_latents_are_shifted_and_scaled(backbone, pipeline):
    tiny_flow_models.assert_latents_are_those_of(pipeline.vae, backbone, scaling=0.3611, shift=0.1159)


def test_latents_that_are_packed_are_unpacked_again():
    """As the pipeline packs them: a token's four channels of each latent channel are its two rows of two."""
    latents = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    tokens = flux.packed(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert tokens[0, 1, :4].tolist() == [2, 3, 8, 9]
    assert torch.equal(flux.unpacked(tokens, 2), latents)


class Recorder(nn.Module):
    """A denoiser that remembers its inputs beside the latents."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.seen = denoiser, []

    def forward(self, tokens, **inputs):
        self.seen.append({"rows": len(tokens), "s": inputs["timestep"].tolist(), "w": inputs["guidance"].tolist()})
        return self.denoiser(tokens, **inputs)


@torch.no_grad()
def test_guidance_is_told_in_one_call(policy, backbone):
    """Also of 1, which is a number like any to it; times are s and not 1000 s."""
    policy.module = Recorder(policy.denoiser)
    inputs = (noise(), torch.tensor([900.0, 30.0]), backbone.encode_prompts(PROMPTS))
    policy.predict(*inputs)
    policy.predict(*inputs, 3.5)
    s = pytest.approx([0.9, 0.03])
    assert policy.module.seen == [{"rows": 2, "s": s, "w": [1, 1]}, {"rows": 2, "s": s, "w": [3.5, 3.5]}]


# ---------------------------------------------------------------- times


def test_training_sees_the_times_of_its_size(folder):
    """Half of them lie above the shift of s = 1/2, and sampling visits even sigmas under the same shift."""
    for resolution, tokens in ((16, 16), (128, 1024)):
        path = load(folder, resolution=resolution).path
        mu = 0.5 + 0.65 * (tokens - 256) / 3840
        middle = 1000 / (1 + math.exp(-mu))
        times = path.training_times(tiny.draws(4000), 4000)
        assert (times > middle).float().mean().item() == pytest.approx(0.5, abs=0.03)
        assert path.sampling_times(2).tolist() == pytest.approx([1000, middle, 0], rel=1e-4)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"_class_name": "DDIMScheduler"}, "'DDIMScheduler' is no flow"),
        ({"use_dynamic_shifting": False}, "use_dynamic_shifting must be true"),
        ({"time_shift_type": "linear"}, "time_shift_type exponential"),
        ({"max_shift": "1.15"}, "max_shift '1.15' is no number"),
        ({"base_shift": float("nan")}, "base_shift nan is no number"),
        ({"max_image_seq_len": 256}, r"its shift for 16 tokens, e\^inf, is no number of 0.01 to 100"),
        ({"base_shift": 50}, "is no number of 0.01 to 100"),
        ({"shift_terminal": 0.1}, "shift_terminal is not supported"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas is not supported"),
        ({"num_train_timesteps": True}, "num_train_timesteps True is no number"),
    ],
)
def test_a_scheduler_that_says_something_else_is_refused(folder, tmp_path, values, says):
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = tiny_flow_models.change(copied / "scheduler/scheduler_config.json", **values)
    with pytest.raises(ValueError, match=rf"{file}.*{says}"):
        load(tmp_path / "copy")


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("transformer", {"guidance_embeds": False}, "guidance_embeds is not true, so .* FLUX.1-dev"),
        ("transformer", {"guidance_embeds": "yes"}, "guidance_embeds is not true"),
        ("transformer", {"_class_name": "SD3Transformer2DModel"}, "describes a SD3Transformer2DModel, not a Flux"),
        ("transformer", {"in_channels": 96}, "4 latent channels, the denoiser 24"),  # of a model that edits images
        ("transformer", {"in_channels": 18}, "4 latent channels, the denoiser 4.5"),
        ("transformer", {"joint_attention_dim": 40}, "vectors of 32 numbers, joint_attention_dim of .* is 40"),
        ("transformer", {"pooled_projection_dim": 8}, "vectors of 16 numbers, pooled_projection_dim of .* is 8"),
    ],
)
def test_another_model_is_refused_before_its_transformer_is_read(folder, tmp_path, part, values, says):
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = tiny_flow_models.change(copied / part / "config.json", **values)
    for weights in file.parent.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "copy")


def test_a_pipeline_without_a_transformer_says_so(folder, tmp_path):
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copied / "transformer/config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"copy/transformer: there is no config.json"):
        load(copied)


def test_a_size_that_is_no_number_of_tokens_is_refused(folder):
    assert load(folder, resolution=20).latent_shape == (4, 10, 10)
    with pytest.raises(ValueError, match=r"model.resolution: 18 is not a multiple of 4, the pixels of a token"):
        load(folder, resolution=18)


def test_numbers_of_the_published_model():
    """Counted where tensors have shapes and no memory; all linear layers can be held in 4 bits."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        xxl = {"vocab_size": 32_128, "d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64}
        encoder = T5EncoderModel(T5Config(**xxl, feed_forward_proj="gated-gelu", is_encoder_decoder=False))
    assert sum(weight.numel() for weight in transformer.parameters()) == flux.NOMINAL.denoiser
    assert sum(weight.numel() for weight in encoder.parameters()) == _t5.WEIGHTS
    layers = dict(transformer.named_modules())
    names = target_modules(transformer, "attention", flux.Flux.lora_targets)
    assert len(names) == 19 * 8 + 38 * 3
    assert sum(layers[name].in_features + layers[name].out_features for name in names) == flux.NOMINAL.adapter
    assert all(layer.in_features % 64 == 0 for layer in layers.values() if isinstance(layer, nn.Linear))
    facts = flux.facts(Model(backbone="flux", path=f"owner/name@{'0' * 40}", max_sequence_length=128))
    assert (facts.guidance, facts.prompt) == ("embedded", 128 * 4096)


# ---------------------------------------------------------------- training


ON_IMAGES = {"sft": sft, "dpo": dpo, "kto": kto, "mapo": mapo, "spin": spin}


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("name", ON_IMAGES)
def test_losses_of_given_images_are_told_the_guidance_that_is_set(policy, backbone, name, guidance):
    """Errors of velocity under it, of policy and reference; what SPIN samples is told its own."""
    policy.module = recorder = Recorder(policy.denoiser)
    options = {"steps": 3, "guidance_scale": 6.0} if name == "spin" else {}
    given = {} if guidance == 1 else {"embedded_guidance": guidance}
    config = ON_IMAGES[name].Config(batches=1, batch_size=6, lora={"rank": 2}, lr=1e-3, **options, **given)
    method = ON_IMAGES[name].Method(config, policy)
    data = tiny.prepared(backbone)
    (m,) = tiny.minibatches(method, data.rows_for(method.consumes)[1](range(6)))
    assert [seen["w"][0] for seen in recorder.seen] == [6.0] * 3 * (name == "spin")
    recorder.seen.clear()
    loss, _ = method.loss(m)
    loss.backward()
    calls = 1 if name in ("sft", "mapo") else 2
    assert [set(seen["w"]) for seen in recorder.seen] == [{guidance}] * calls
    with torch.no_grad():
        s = (m.t / 1000).view(-1, 1, 1, 1)
        predicted = policy.predict((1 - s) * m.x_0 + s * m.noise, m.t, m.cond, guidance)
        expected = (predicted - (m.noise - m.x_0)).square().mean((1, 2, 3))
    torch.testing.assert_close(policy_error(policy, m, guidance), expected)
    assert all(w.grad is None or w.grad.isfinite().all() for w in policy.parameters())


def test_spo_is_told_its_sampling_guidance_in_rollout_and_loss(policy, backbone):
    policy.module = recorder = Recorder(policy.denoiser)
    config = spo.Config(batches=1, batch_size=2, lora={"rank": 2}, steps=4, threshold=0.0, start_step=1)
    method = spo.Method(config, policy, tiny.brightness)
    batch = PromptBatch(PROMPTS, backbone.encode_prompts(PROMPTS))
    found = method.rollout(batch, tiny.draws(2).noise, tiny.draws(2).integers)
    rolled_out = len(recorder.seen)
    loss, metrics = method.loss(found)
    loss.backward()
    assert len(recorder.seen) > rolled_out
    assert {w for seen in recorder.seen for w in seen["w"]} == {5.0}  # SPO's, a setting of the method
    assert loss.item() == pytest.approx(spo.LOSS_AT_REFERENCE, abs=1e-5)
    assert metrics["ratio_chosen"].item() == pytest.approx(1, abs=1e-5)
    assert any(w.grad is not None and w.grad.any() for w in policy.parameters())


@pytest.mark.parametrize("module", [alignprop, draft, refl])
def test_rewards_reach_the_adapter_through_sampling(policy, backbone, module):
    policy.module = recorder = Recorder(policy.denoiser)
    options = {"rewards": {"light": 1.0}, "guidance_scale": 3.5, "steps": 3}
    config = module.Config(batches=1, batch_size=2, lora={"rank": 2}, **options)
    method = module.Method(config, policy, {"light": Light()})
    (minibatch,) = tiny.minibatches(method, PromptBatch(PROMPTS, backbone.encode_prompts(PROMPTS)))
    loss, _ = method.loss(minibatch)
    loss.backward()
    assert {w for seen in recorder.seen for w in seen["w"]} == {3.5}
    assert any(w.grad is not None and w.grad.any() for w in policy.parameters())
