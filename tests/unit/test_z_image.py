"""Z-Image as a base: prompts and images as diffusers' own pipeline makes them, and what is trained and refused."""

import json
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from safetensors.torch import load_file, save_file

import stages
import tiny
import tiny_flow_models
from attune import fsdp
from attune.backbones import z_image
from attune.config.settings import Model, Sampling
from attune.data.batches import PromptBatch
from attune.data.store import PreparedData
from attune.diffusion.ddim import sample
from attune.diffusion.policy import Policy
from attune.methods import dpo, draft, spo
from attune.sharing.card import Evidence
from attune.sharing.package import Trained, write_package
from tiny_flow_models import adapted, noise
from trainables import Light

CPU = torch.device("cpu")
PROMPTS = ["a cat", "two owls and a dog, which have many more tokens than the cat has"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flow_models.write_z_image_pipeline(tmp_path_factory.mktemp("z_image"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return tiny_flow_models.read(ZImagePipeline, folder)


@pytest.fixture
def backbone(folder):
    return load(folder)


def load(folder, **settings):
    block = {"backbone": "z_image", "path": str(folder), "resolution": 16, "max_sequence_length": 128} | settings
    return z_image.load(Model(**block), CPU)


@pytest.fixture
def policy(backbone):
    return adapted(backbone)


# ---------------------------------------------------------------- as diffusers does it


@torch.no_grad()
def test_prompts_are_encoded_as_diffusers_does(backbone, pipeline):
    """diffusers has a list of prompts, each as long as it is; here their ends are filled with zeros."""
    theirs, null = pipeline.encode_prompt(list(PROMPTS), CPU, max_sequence_length=128)
    for prompts, expected in ((PROMPTS, theirs), (["", ""], null)):
        ours = backbone.encode_prompts(prompts).tensors
        for states, own, their in zip(ours["prompt_embeds"], ours["prompt_mask"], expected, strict=True):
            assert torch.equal(states[own], their)
            assert not states[~own].any()
            assert own.tolist() == sorted(own.tolist(), reverse=True)
    assert len(theirs[0]) < 32 < 64 < len(theirs[1])


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_images_are_those_of_diffusers(backbone, pipeline, guidance_scale):
    """From prompts of different lengths in one batch. diffusers' guidance is off at 0, ours at 1."""
    images = tiny_flow_models.drawn(backbone, noise(), guidance_scale, PROMPTS)
    options = {"latents": noise(), "num_inference_steps": 7, "guidance_scale": guidance_scale - 1, "output_type": "pt"}
    theirs = pipeline(list(PROMPTS), height=16, width=16, **options).images
    assert theirs.std() > 0.05
    torch.testing.assert_close(images, theirs, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_row_does_not_depend_on_those_beside_it(backbone, folder):
    """Nor on how many tokens a longer prompt might have had."""
    inputs = noise(), torch.tensor([900.0, 30.0])
    together = backbone.predict(backbone.denoiser, *inputs, backbone.encode_prompts(PROMPTS))
    short = load(folder, max_sequence_length=96)
    for row, prompt in enumerate(PROMPTS):
        cond = short.encode_prompts([prompt])
        alone = short.predict(short.denoiser, *(value[row : row + 1] for value in inputs), cond)
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_a_prompt_is_cut_where_its_chat_is_too_long(backbone):
    around = 19  # tokens of the chat template
    assert not backbone.is_cut("a" * (128 - around))
    assert backbone.is_cut("a" * (129 - around))
    assert backbone.is_cut("a" * 1_000_000)
    long, cut = backbone.encode_prompts(["a" * 130, "a" * 500]).tensors["prompt_embeds"]
    assert torch.equal(long, cut)


def test_latents_are_shifted_and_scaled(backbone, pipeline):
    tiny_flow_models.assert_latents_are_those_of(pipeline.vae, backbone, scaling=0.3611, shift=0.1159)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_a_run_visits_the_times_of_diffusers_pipeline(backbone, steps):
    """Shifted once: what the scheduler chooses on its own, for Stable Diffusion 3, it shifts twice."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps))
    times = backbone.path.sampling_times(steps)
    torch.testing.assert_close(times[:-1], scheduler.timesteps)
    assert times[-1] == 0
    scheduler.set_timesteps(steps)
    assert steps == 1 or not torch.allclose(times[:-1], scheduler.timesteps, atol=1)


def test_steps_that_cannot_be_are_refused(backbone):
    with pytest.raises(ValueError, match=r"sampling steps must lie in 1\.\.999, got 1000"):
        backbone.path.sampling_times(1000)


def test_training_times_lie_on_the_schedulers_own_table(backbone):
    """A normal logit is a place in the table of 1000 unshifted sigmas, which holds them shifted by 6."""
    table = FlowMatchEulerDiscreteScheduler(shift=6.0).sigmas * 1000
    drawn = backbone.path.training_times(tiny.draws(20_000), 20_000).sort().values
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        unshifted = torch.special.ndtri(torch.tensor(share)).sigmoid()
        expected = table[round(1000 * (1 - unshifted.item()))].item()
        assert drawn[int(share * len(drawn))].item() == pytest.approx(expected, abs=8)


# ---------------------------------------------------------------- what is trained


def test_an_adapter_is_put_on_every_attention(policy):
    """Of the refiners of image and prompt too."""
    names = {name.split(".lora_A")[0] for name, _ in policy.denoiser.named_parameters() if ".lora_A" in name}
    assert {"noise_refiner.0.attention.to_q", "context_refiner.0.attention.to_v"} <= names
    assert "layers.1.attention.to_out.0" in names
    assert len(names) == 4 * 4


def test_all_layers_are_all_but_those_next_to_the_latents(backbone):
    policy = adapted(backbone, "all")
    names = {name.split(".lora_A")[0] for name, _ in policy.denoiser.named_parameters() if ".lora_A" in name}
    assert {"layers.0.feed_forward.w2", "cap_embedder.1", "all_final_layer.2-1.adaLN_modulation.1"} <= names
    assert not {"all_x_embedder.2-1", "all_final_layer.2-1.linear"} & names


def pairs(policy, backbone):
    config = dpo.Config(batches=1, batch_size=6, lora={"rank": 2}, beta=2000)
    method, data = dpo.Method(config, policy), tiny.prepared(backbone)
    (minibatch,) = tiny.minibatches(method, data.rows_for(method.consumes)[1](range(6)))
    return method, minibatch


def test_dpo_starts_at_ln_2_and_teaches_every_adapter(policy, backbone):
    method, minibatch = pairs(policy, backbone)
    loss, metrics = method.loss(minibatch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    for name, weight in policy.denoiser.named_parameters():
        assert not weight.requires_grad or weight.grad.any() == (".lora_B." in name), name  # B is zero, so A waits
    tiny.move(policy, 0.01)
    method.loss(minibatch)[0].backward()
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in policy.parameters())


def test_errors_are_of_the_velocity(policy, backbone):
    """The sign that Z-Image gives its prediction does not reach a method."""
    _, m = pairs(policy, backbone)
    s = (m.t / 1000).view(-1, 1, 1, 1)
    x_t = (1 - s) * m.x_0 + s * m.noise
    own = [row[mask] for row, mask in zip(*m.cond.tensors.values(), strict=True)]
    with torch.no_grad():
        theirs = policy.denoiser(list(x_t.unsqueeze(2)), (1000 - m.t) / 1000, own).sample
        torch.testing.assert_close(policy.predict(x_t, m.t, m.cond), -torch.stack(theirs).squeeze(2))
    assert torch.equal(backbone.path.target(m.x_0, m.noise), m.noise - m.x_0)


def test_gradient_checkpointing_changes_no_gradient(policy, backbone):
    method, minibatch = pairs(policy, backbone)
    tiny.move(policy, 0.01)
    method.loss(minibatch)[0].backward()
    plain = [weight.grad.clone() for weight in policy.parameters()]
    policy.denoiser.enable_gradient_checkpointing()
    policy.denoiser.zero_grad()
    method.loss(minibatch)[0].backward()
    for weight, expected in zip(policy.parameters(), plain, strict=True):
        torch.testing.assert_close(weight.grad, expected)


def test_rewards_reach_the_adapter(policy, backbone):
    config = draft.Config(
        batches=1, batch_size=2, lora={"rank": 2}, steps=4, rewards={"light": 1.0}, guidance_scale=2.0, backprop_steps=2
    )
    method = draft.Method(config, policy, {"light": Light()})
    (minibatch,) = tiny.minibatches(method, PromptBatch(PROMPTS, backbone.encode_prompts(PROMPTS)))
    method.loss(minibatch)[0].backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in policy.parameters())


def test_spo_rolls_out_and_compares(policy, backbone):
    config = spo.Config(batches=1, batch_size=2, lora={"rank": 2}, steps=4, start_step=0, threshold=0.0)
    method = spo.Method(config, policy, tiny.brightness)
    batch = PromptBatch(PROMPTS, backbone.encode_prompts(PROMPTS))
    loss, metrics = method.loss(method.rollout(batch, tiny.draws(2).noise, tiny.draws(2).integers))
    assert loss.item() == pytest.approx(spo.LOSS_AT_REFERENCE, abs=1e-5)
    assert metrics["ratio_chosen"].item() == pytest.approx(1, abs=1e-5)


def test_an_adapter_is_saved_and_read_again(policy, backbone, folder, tmp_path):
    """Ours reads it back bit for bit, and diffusers' own pipeline draws what ours does with it."""
    tiny.move(policy, 0.1)
    policy.save(tmp_path)
    again = Policy(load(folder), policy.uncond)
    again.load(tmp_path)
    cond = backbone.encode_prompts(PROMPTS)
    inputs = (noise(), torch.tensor([900.0, 30.0]), cond)
    with torch.no_grad():
        assert torch.equal(again.predict(*inputs), policy.predict(*inputs))
        with again.reference():
            assert not torch.allclose(again.predict(*inputs), policy.predict(*inputs), atol=1e-2)
    theirs = tiny_flow_models.read(ZImagePipeline, folder)
    theirs.load_lora_weights(tmp_path)
    options = {"latents": noise(), "num_inference_steps": 5, "guidance_scale": 0.0, "output_type": "latent"}
    expected = theirs(list(PROMPTS), height=16, width=16, **options).images
    found = sample(policy, cond, lambda shape: noise(), 5, 0.0, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_with_fsdp_all_blocks_are_put_together_one_after_another(backbone):
    blocks = [module for module in backbone.denoiser.modules() if type(module).__name__ in fsdp.BLOCKS]
    inside = {id(weight) for block in blocks for weight in block.parameters()}
    outside = {name.split(".")[0] for name, w in backbone.denoiser.named_parameters() if id(w) not in inside}
    assert outside == {
        "all_x_embedder",
        "all_final_layer",
        "t_embedder",
        "cap_embedder",
        "x_pad_token",
        "cap_pad_token",
    }


def test_half_precision_stays_inside(folder):
    backbone = load(folder, dtype="bfloat16")
    cond = backbone.encode_prompts(PROMPTS)
    assert cond.tensors["prompt_embeds"].dtype == torch.bfloat16
    with torch.no_grad():
        predicted = backbone.predict(backbone.denoiser, noise(), torch.tensor([900.0, 30.0]), cond)
    assert predicted.dtype == torch.float32
    assert predicted.isfinite().all()


def test_the_commands_prepare_train_and_draw(folder, tmp_path):
    """Prompts lie on disk with where each ends, and a training reads them as they were encoded."""
    model = {"backbone": "z_image", "path": folder, "resolution": 16, "max_sequence_length": 64}
    runs = {"base": {"after": "data"}, "dpo": {"method": "dpo", "after": "data"}}
    block = {"batches": 2, "batch_size": 4, "lr": 1e-3, "lora": {"rank": 2}}
    made = stages.write(tmp_path, runs, model=model, preference=..., methods__dpo=block)
    with stages.inside(made):
        stages.write_plans()
        stages.call("prepare")
        stages.call("align", run="dpo")
        stages.call("generate", run="dpo")
    data = PreparedData.read(made / "data/short/prepared", "train")
    encoded = load(folder, max_sequence_length=64).encode_prompts(data.prompts[:3]).tensors
    assert data.cond.tensors["prompt_mask"].dtype == torch.bool
    for name, rows in data.cond.tensors.items():
        torch.testing.assert_close(rows[[0, 1, 2]], encoded[name], rtol=1e-5, atol=1e-5)
    known = json.loads((made / "models/short/dpo/run.json").read_text())
    assert known["times"]["shift"] == 6.0
    assert list((made / "models/short/dpo").glob("*.safetensors"))


def test_adapters_as_other_trainers_write_them_are_read(policy, folder, tmp_path):
    """ai-toolkit and DiffSynth-Studio call the transformer what ComfyUI calls it; alpha is half of the rank here."""
    tiny.move(policy, 0.1)
    policy.save(tmp_path / "ours")
    (file,) = (tmp_path / "ours").glob("*.safetensors")
    theirs = {name.replace("transformer.", "diffusion_model."): value for name, value in load_file(file).items()}
    for name in [name for name in theirs if ".lora_B." in name]:
        theirs[name] *= 2
        theirs[name.replace("lora_B.weight", "alpha")] = torch.tensor(1.0)
    save_file(theirs, tmp_path / "theirs.safetensors")
    again = Policy(load(folder), policy.uncond)
    again.load(tmp_path / "theirs.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), policy.parameters(), strict=True))


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_package_is_read_by_diffusers_as_the_model(backbone, folder, tmp_path, targets):
    """Both files of it, and the card tells diffusers' users a guidance of one less."""
    policy = adapted(load(folder), targets)
    tiny.move(policy, 0.1)
    policy.save(tmp_path / "model")
    known = {"run": "dpo", "profile": "short", "method": "dpo", "trained_on": [], "seed": 0, "from": None}
    known |= {"settings": {"lora": {"rank": 2, "targets": targets}}, "starts_from": None}
    known["base"] = backbone.model.model_dump(mode="json")
    sampling = {"steps": 3, "eta": 0.0, "guidance_scale": 4.5, "batch_size": 2}
    trained, evidence = Trained(tmp_path / "model", known, {"source": "world"}), Evidence(None, "", None, sampling)
    (tmp_path / "package").mkdir()
    checks = write_package(
        tmp_path / "package", trained, evidence, PROMPTS, Sampling(**sampling), lambda model: z_image.load(model, CPU)
    )
    assert [check.layout for check in checks] == ["diffusers/pytorch_lora_weights.safetensors", "dpo.safetensors"]
    assert all(check.difference < 1e-4 < 0.01 < check.effect for check in checks)
    written = (tmp_path / "package/README.md").read_text()
    assert "pipeline = ZImagePipeline.from_pretrained(" in written
    assert "guidance_scale=3.5, height=16, width=16, max_sequence_length=128" in written
