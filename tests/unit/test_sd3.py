"""A flow model as a base: as diffusers' own pipeline encodes and draws, and every kind of training on it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

import tiny
import tiny_flow_models
from attune.backbones import sd3
from attune.config.settings import Model
from attune.data.batches import PromptBatch
from attune.diffusion.ddim import sample
from attune.diffusion.noised import policy_error
from attune.diffusion.policy import Policy
from attune.methods import dpo, draft, kto, mapo, refl, sft, spin, spo
from tiny_flow_models import PROMPTS, adapted, noise
from trainables import Light

CPU = torch.device("cpu")
LAST = 1000 * 0.00893  # the time of every run's last step at shift 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flow_models.write_sd3_pipeline(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return read(folder)


def read(folder):
    return tiny_flow_models.read(StableDiffusion3Pipeline, folder, text_encoder_3=None, tokenizer_3=None)


@pytest.fixture
def backbone(folder):
    return load(folder)


def load(folder, **settings):
    return sd3.load(Model(backbone="sd3", path=str(folder), **settings), CPU)


@pytest.fixture
def policy(backbone):
    return adapted(backbone)


@pytest.fixture
def data(backbone):
    return tiny.prepared(backbone)


# ---------------------------------------------------------------- as diffusers does it


@torch.no_grad()
def test_prompts_are_encoded_as_diffusers_does(backbone, pipeline):
    """Both CLIPs fill a corner of what the transformer is shown; all else is zeros, added when it is called."""
    theirs, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS, None, None, device=CPU)
    for prompts, wide, vectors in ((PROMPTS, theirs, pooled), (["", ""], null, null_pooled)):
        ours = backbone.encode_prompts(prompts).tensors
        length, width = ours["prompt_embeds"].shape[1:]
        assert torch.equal(ours["prompt_embeds"], wide[:, :length, :width])
        assert torch.equal(ours["text_embeds"], vectors)
        assert not wide[:, length:].any()
        assert not wide[..., width:].any()
        assert wide.shape[1] == length + 256


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_images_are_those_of_diffusers(backbone, pipeline, guidance_scale):
    images = tiny_flow_models.drawn(backbone, noise(), guidance_scale)
    options = {"latents": noise(), "num_inference_steps": 7, "guidance_scale": guidance_scale, "output_type": "pt"}
    theirs = pipeline(PROMPTS, height=16, width=16, **options).images
    assert theirs.std() > 0.05
    torch.testing.assert_close(images, theirs, rtol=0, atol=1e-4)


def test_latents_are_shifted_and_scaled(backbone, pipeline):
    tiny_flow_models.assert_latents_are_those_of(pipeline.vae, backbone, scaling=1.5305, shift=0.0609)


def test_an_adapter_is_put_on_every_attention(policy):
    """Of images and of text, the second one of the first block too; the last block makes no text."""
    names = {name.split(".lora_A")[0] for name, _ in policy.denoiser.named_parameters() if ".lora_A" in name}
    assert {"transformer_blocks.0.attn2.to_q", "transformer_blocks.0.attn.to_add_out"} <= names
    assert len(names) == 8 + 4 + 7


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "'DDIMScheduler' is no flow"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting is not supported"),
        ("scheduler/scheduler_config.json", {"shift": 0}, "shift 0 is no number"),
        ("scheduler/scheduler_config.json", {"shift": "3"}, "shift '3' is no number"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1.5}, "num_train_timesteps 1.5 is no number"),
        ("vae/config.json", {"shift_factor": "x"}, "shift_factor 'x' is not supported"),
        ("vae/config.json", {"shift_factor": True}, "shift_factor True is not supported"),
        ("vae/config.json", {"shift_factor": float("nan")}, "shift_factor nan is not supported"),
    ],
)
def test_files_that_say_something_else_are_refused(folder, tmp_path, file, values, says):
    copied = tiny_flow_models.change(Path(shutil.copytree(folder, tmp_path / "copy")) / file, **values)
    with pytest.raises(ValueError, match=rf"{copied}.*{says}"):
        load(tmp_path / "copy")


@pytest.mark.parametrize("key", ["pooled_projection_dim", "joint_attention_dim"])
def test_text_encoders_of_other_widths_are_refused(folder, tmp_path, key):
    """Of vectors that are too wide the transformer would see a part, as diffusers' pipeline shows it."""
    config = SD3Transformer2DModel.load_config(folder, subfolder="transformer") | {key: 24}
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    SD3Transformer2DModel.from_config(config).save_pretrained(copied / "transformer")
    with pytest.raises(ValueError, match=rf"{copied / 'text_encoder'}, .* {key}( of the transformer is)? 24"):
        load(copied)


@pytest.mark.parametrize("resolution", [18, 40])
def test_sizes_without_positions_are_refused(folder, resolution):
    assert load(folder, resolution=32).latent_shape == (4, 16, 16)
    with pytest.raises(ValueError, match=rf"model.resolution: {resolution} is not a multiple of 4 up to 32"):
        load(folder, resolution=resolution)


# ---------------------------------------------------------------- training


ON_IMAGES = {"sft": sft, "dpo": dpo, "kto": kto, "mapo": mapo, "spin": spin}


@pytest.mark.parametrize("name", ON_IMAGES)
def test_errors_are_of_the_velocity(policy, data, name):
    """Every method that learns from images: the loss falls by its own gradient, at any s and without a division."""
    module = ON_IMAGES[name]
    options = {"steps": 4} if name == "spin" else {}
    config = module.Config(batches=1, batch_size=6, lora={"rank": 2}, lr=1e-3, caption_dropout=0.0, **options)
    method = module.Method(config, policy)
    (minibatch,) = tiny.minibatches(method, data.rows_for(method.consumes)[1](range(6)))
    m = minibatch
    s = (m.t / 1000).view(-1, 1, 1, 1)
    assert ((s > 0) & (s < 1)).all()
    with torch.no_grad():
        predicted = policy.predict((1 - s) * m.x_0 + s * m.noise, m.t, m.cond)
        expected = (predicted - (m.noise - m.x_0)).square().mean((1, 2, 3))
        torch.testing.assert_close(policy_error(policy, m), expected)
    before, _ = method.loss(minibatch)
    before.backward()
    with torch.no_grad():
        norm = torch.stack([w.grad.norm() for w in policy.parameters() if w.grad is not None]).norm()
        for weight in policy.parameters():
            weight -= 1e-3 / norm * weight.grad if weight.grad is not None else 0
        after, _ = method.loss(minibatch)
    assert after < before


def rollout(policy, backbone, **options):
    config = spo.Config(batches=1, batch_size=2, lora={"rank": 2}, steps=6, threshold=0.0, **options)
    method = spo.Method(config, policy, tiny.brightness)
    batch = PromptBatch(PROMPTS, backbone.encode_prompts(PROMPTS))
    return method, method.rollout(batch, tiny.draws(2).noise, tiny.draws(2).integers)


@pytest.mark.parametrize(("start", "inner", "pairs"), [(0, 0, 5), (3, 0, 2), (0, 1, 5), (1, 1, 4), (2, 2, 3)])
def test_spo_compares_every_step_that_adds_noise(policy, backbone, start, inner, pairs):
    """Of six steps the last has none: no candidates differ there, and nothing has a density."""
    method, found = rollout(policy, backbone, start_step=start, inner_steps=inner)
    times = backbone.path.sampling_times(6)
    assert times[-2].item() == pytest.approx(LAST, rel=1e-3)
    assert sorted(set(found.t.tolist()), reverse=True) == times[start : start + pairs].tolist()
    chosen, rejected = method.log_probs(found)
    assert torch.stack([chosen, rejected]).isfinite().all()
    loss, metrics = method.loss(found)
    loss.backward()
    assert loss.item() == pytest.approx(spo.LOSS_AT_REFERENCE, abs=1e-5)
    assert metrics["ratio_chosen"].item() == pytest.approx(1, abs=1e-5)
    assert all(w.grad is None or w.grad.isfinite().all() for w in policy.parameters())
    assert any(w.grad is not None and w.grad.any() for w in policy.parameters())


def test_spo_judges_an_image_at_the_time_it_was_predicted_at(policy, backbone):
    """The last step, which adds no noise, ends at what the network predicts where it begins."""
    judged_at = []

    def judge(images, prompts, t):
        judged_at.extend(t.unique().tolist())
        return tiny.brightness(images, prompts, t)

    config = spo.Config(batches=1, batch_size=2, lora={"rank": 2}, steps=6, start_step=2, threshold=0.0)
    method = spo.Method(config, policy, judge)
    batch = PromptBatch(PROMPTS, backbone.encode_prompts(PROMPTS))
    method.rollout(batch, tiny.draws(2).noise, tiny.draws(2).integers)
    assert judged_at == backbone.path.sampling_times(6)[3:6].tolist()


def test_spo_says_when_no_step_is_left_to_compare(policy, backbone):
    with pytest.raises(ValueError, match="start_step must be less than 5"):
        rollout(policy, backbone, start_step=5)


@pytest.mark.parametrize(
    ("module", "options"), [(draft, {"n_renoised": 2}), (refl, {}), (draft, {"backprop_steps": 3})]
)
def test_rewards_reach_the_adapter(policy, backbone, module, options):
    """Through the Euler steps of a flow, its one-step prediction, and images noised to its last step."""
    config = module.Config(
        batches=1, batch_size=2, lora={"rank": 2}, steps=4, rewards={"light": 1.0}, guidance_scale=2.0, **options
    )
    method = module.Method(config, policy, {"light": Light()})
    batch = PromptBatch(PROMPTS, backbone.encode_prompts(PROMPTS))
    (minibatch,) = tiny.minibatches(method, batch)
    loss, _ = method.loss(minibatch)
    loss.backward()
    assert loss.isfinite()
    assert any(w.grad is not None and w.grad.any() for w in policy.parameters())


def test_a_whole_transformer_is_saved_and_read_again(backbone, folder, tmp_path):
    policy = Policy(backbone, backbone.encode_prompts([""]))
    policy.unfreeze()
    tiny.move(policy, 0.1)
    policy.save(tmp_path)
    again = Policy(load(folder), policy.uncond)
    again.load(tmp_path)
    inputs = (noise(), torch.tensor([900.0, 30.0]), backbone.encode_prompts(PROMPTS))
    with torch.no_grad():
        assert torch.equal(again.predict(*inputs), policy.predict(*inputs))
    scheduler = Path(shutil.copytree(folder, tmp_path / "pipeline")) / "scheduler/scheduler_config.json"
    again.load(tmp_path / "pipeline")
    scheduler.write_text(json.dumps({"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="predicts 'epsilon', the base model flow"):
        again.load(tmp_path / "pipeline")


def test_an_adapter_is_saved_and_read_again(policy, backbone, folder, tmp_path):
    """Ours reads it back bit for bit, and diffusers' own pipeline draws what ours does with it."""
    tiny.move(policy, 0.1)
    policy.save(tmp_path)
    again = Policy(load(folder), policy.uncond)
    again.load(tmp_path)
    cond = backbone.encode_prompts(PROMPTS)
    with torch.no_grad():
        inputs = (noise(), torch.tensor([900.0, 30.0]), cond)
        assert torch.equal(again.predict(*inputs), policy.predict(*inputs))
    theirs = read(folder)
    theirs.load_lora_weights(tmp_path)
    options = {"latents": noise(), "num_inference_steps": 5, "guidance_scale": 1.0, "output_type": "latent"}
    expected = theirs(PROMPTS, height=16, width=16, **options).images
    found = sample(policy, cond, lambda shape: noise(), 5, 0.0, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
