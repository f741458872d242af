"""What every file of attune/backbones owes the rest, on a small pipeline of its kind."""

import copy

import pytest
import torch

import tiny
import tiny_flow_models
from attune import fsdp
from attune.build import device
from attune.config import plugins
from attune.config.settings import Model
from attune.diffusion.ddim import sample
from attune.diffusion.lora import target_modules
from attune.diffusion.policy import Policy
from attune.methods import sft
from attune.spm.noising import one_step_latents
from attune.world.grammar import all_scenes

WRITERS = {
    "sd": tiny.write_pipeline,
    "sdxl": tiny.write_xl_pipeline,
    "sd3": tiny_flow_models.write_sd3_pipeline,
    "flux": tiny_flow_models.write_flux_pipeline,
    "z_image": tiny_flow_models.write_z_image_pipeline,
}
PROMPTS = ["a cat", "two owls"]
T5_OR_LLM = ("sd3", "flux", "z_image")  # read as many tokens of a prompt as they are told
OVERFLOW = ("z_image",)  # in float16
pytestmark = pytest.mark.parametrize("name", plugins.available("backbones"))


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Loads a backbone on its pipeline, which is written once; `bases(name, dtype=...)` with settings of its block."""
    folders = {}

    def load(name, **settings):
        if name not in folders:
            folders[name] = WRITERS[name](tmp_path_factory.mktemp(name))
        read = {"max_sequence_length": 32} if name in T5_OR_LLM else {}
        model = Model(backbone=name, path=folders[name], resolution=16, **(read | settings))
        return plugins.load("backbones", name).load(model, device())

    return load


@pytest.fixture
def adapted(bases):
    """A policy with an adapter that has left its start; `adapted(name, targets=...)`."""

    def make(name, targets="attention", **settings):
        backbone = bases(name, **settings)
        policy = Policy(backbone, backbone.encode_prompts([""]))
        policy.add_adapter(rank=2, seed=0, targets=targets)
        tiny.move(policy, 0.1)
        return policy

    return make


def inputs(policy, rows=2):
    x_t = tiny.draws(rows).noise((rows, *policy.backbone.latent_shape)).to(policy.device)
    times = torch.linspace(900, 100, rows).round().long()
    return x_t, times, policy.backbone.encode_prompts(PROMPTS[:rows])


def test_it_says_what_it_is(name, bases):
    backbone, module = bases(name), plugins.load("backbones", name)
    facts = module.facts(backbone.model)
    assert backbone.guidance == facts.guidance
    assert backbone.guidance in ("cfg", "embedded", "none")
    assert backbone.resolution == facts.resolution == 16
    assert facts.denoiser == sum(value.numel() for value in backbone.denoiser.state_dict().values())
    assert backbone.prediction_type in ("epsilon", "v_prediction", "flow")
    places = [place for place, _ in module.downloads(backbone.model)]
    assert all(place.place.startswith(backbone.model.path) for place in places)


@torch.no_grad()
def test_images_and_latents(name, bases):
    backbone = bases(name)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    latents = backbone.encode_images(images)
    assert latents.shape == (3, *backbone.latent_shape)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(backbone.encode_images(images[1:2]), latents[1:2], rtol=1e-4, atol=1e-4)
    assert backbone.decode_latents(latents).shape == images.shape


@torch.no_grad()
def test_a_row_does_not_see_the_others(name, adapted):
    policy = adapted(name)
    x_t, t, cond = inputs(policy)
    together = policy.predict(x_t, t, cond, 2.5)
    for row in range(2):
        alone = policy.predict(x_t[[row]], t[[row]], cond[[row]], 2.5)
        torch.testing.assert_close(alone, together[[row]], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_guidance_and_the_prompt_change_the_prediction(name, adapted):
    policy = adapted(name)
    x_t, t, cond = inputs(policy)
    plain = policy.predict(x_t, t, cond)
    assert (policy.predict(x_t, t, cond[[1, 0]]) - plain).abs().max() > 1e-3
    guided = policy.predict(x_t, t, cond, 4.0)
    assert policy.backbone.guidance == "none" or (guided - plain).abs().max() > 1e-3


@torch.no_grad()
def test_the_preference_model_is_shown_what_one_step_predicts(name, adapted):
    """Of a flow x_0 = x_s - s v, of latents noised to s; the prediction is the policy's own."""
    policy = adapted(name)
    if policy.backbone.prediction_type != "flow":
        pytest.skip("no flow")
    z, t, cond = inputs(policy)
    x_0, s = z.flip(0), t.view(-1, 1, 1, 1) / 1000
    x_t = (1 - s) * x_0 + s * z
    found = one_step_latents(policy.predict, policy.backbone.path, x_0, t, z, cond)
    torch.testing.assert_close(found, x_t - s * policy.predict(x_t, t, cond))


@torch.no_grad()
def test_what_is_let_go_of_is_read_again(name, bases):
    backbone = bases(name)
    before, z = backbone.encode_prompts(PROMPTS), torch.zeros(1, *backbone.latent_shape)
    image = backbone.decode_latents(z)
    backbone.release()
    again = backbone.encode_prompts(PROMPTS)
    assert all(torch.equal(again.tensors[key], value) for key, value in before.tensors.items())
    assert torch.equal(backbone.decode_latents(z), image)


def test_a_prompt_that_is_too_long_is_known_to_be(name, bases):
    backbone = bases(name)
    assert not backbone.is_cut("a cat")
    assert backbone.is_cut(" ".join(["owl"] * 40))


def test_checkpointing_changes_memory_alone(name, adapted):
    """A network that is trained is called in training mode as in evaluation, so nothing is drawn twice."""
    gradients = []
    for checkpointed in (False, True):
        policy = adapted(name, "all")
        if checkpointed:
            policy.denoiser.enable_gradient_checkpointing()
        policy.predict(*inputs(policy)).square().mean().backward()
        gradients.append([weight.grad for weight in policy.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert (plain is None) == (again is None)
        if plain is not None:
            torch.testing.assert_close(again, plain)
    assert sum(g is not None and bool(g.any()) for g in gradients[0]) > len(gradients[0]) / 2


@torch.no_grad()
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_merged_adapters_predict_alike(name, adapted, targets):
    policy = adapted(name, targets)
    apart = policy.predict(*inputs(policy))
    with policy.merged():
        torch.testing.assert_close(policy.predict(*inputs(policy)), apart, rtol=1e-3, atol=1e-4)
    with policy.reference():
        assert (policy.predict(*inputs(policy)) - apart).abs().max() > 1e-3
    assert torch.equal(policy.predict(*inputs(policy)), apart)


@torch.no_grad()
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_an_adapter_is_saved_and_read_again(name, adapted, bases, targets, tmp_path):
    policy = adapted(name, targets)
    policy.save(tmp_path)
    again = Policy(bases(name), policy.uncond)
    again.load(tmp_path)
    assert torch.equal(again.predict(*inputs(again)), policy.predict(*inputs(policy)))


@torch.no_grad()
def test_a_whole_denoiser_is_saved_and_read_again(name, bases, tmp_path):
    backbone = bases(name)
    policy = Policy(backbone, backbone.encode_prompts([""]))
    policy.unfreeze()
    tiny.move(policy, 0.05)
    policy.save(tmp_path)
    again = Policy(bases(name), policy.uncond)
    again.load(tmp_path)
    tiny.assert_same(again.predict(*inputs(again)), policy.predict(*inputs(policy)))


def test_every_linear_layer_but_the_ends_takes_an_adapter(name, bases):
    """Those of the attentions are among them; left out are the two next to the latents, coming in and going out."""
    backbone = bases(name)
    every = set(target_modules(backbone.denoiser, "all", backbone.lora_targets))
    assert set(target_modules(backbone.denoiser, "attention", backbone.lora_targets)) < every
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = {layer for layer, module in backbone.denoiser.named_modules() if isinstance(module, kinds)}
    assert len(layers - every) == 2


def test_its_blocks_are_cut_where_every_weight_is_trained(name, bases):
    denoiser = bases(name).denoiser
    inside = {
        id(weight)
        for module in denoiser.modules()
        if type(module).__name__ in fsdp.BLOCKS
        for weight in module.parameters()
    }
    weights = list(denoiser.parameters())
    outside = sum(weight.numel() for weight in weights if id(weight) not in inside)
    assert outside < 0.35 * sum(weight.numel() for weight in weights)  # of published ones, which are deeper, 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_inside_alone(name, adapted, dtype):
    if dtype == "float16" and name in OVERFLOW:
        with pytest.raises(ValueError, match="float16 ends at 65,504"):
            adapted(name, dtype=dtype)
        return
    policy, exact = adapted(name, dtype=dtype), adapted(name)
    predicted = policy.predict(*inputs(policy))
    assert predicted.dtype == torch.float32
    predicted.square().mean().backward()
    assert {weight.grad.dtype for weight in policy.parameters() if weight.grad is not None} == {torch.float32}
    with torch.no_grad():
        error = predicted - exact.predict(*inputs(exact))
    assert 0 < error.square().mean().sqrt() < 0.05 * predicted.square().mean().sqrt()


def test_every_weight_in_float32_computes_in_half_precision(name, bases):
    """As full fine-tuning does, under autocast. FLUX rounds 1000 w in half precision as it does 1000 s."""
    backbone = bases(name)
    policy = Policy(backbone, backbone.encode_prompts([""]), torch.bfloat16)
    policy.unfreeze()
    predicted = policy.predict(*inputs(policy))
    exact = Policy(copy.copy(backbone), policy.uncond).predict(*inputs(policy))
    predicted.square().mean().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in policy.parameters())
    assert 0 < (predicted - exact).norm() < 0.1 * exact.norm()


def test_it_is_trained_and_draws_images(name, bases):
    """Prompts of the embedded world, whose words are letters to these tokenizers like any."""
    backbone = bases(name)
    data = tiny.prepared(backbone)
    policy = Policy(backbone, backbone.encode_prompts([""]))
    policy.add_adapter(rank=2, seed=0, targets="attention")
    config = sft.Config(**(tiny.PLAIN | {"lora": {"rank": 2}, "lr": 1e-3, "batches": 2, "batch_size": 2}))
    before = tiny.fingerprint(policy.denoiser)
    history = tiny.run(sft.Method(config, policy), data)
    assert tiny.fingerprint(policy.denoiser) == before
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in history)
    cond = backbone.encode_prompts([scene.prompt for scene in all_scenes()[:2]])
    latents = sample(policy, cond, tiny.draws(2).noise, 3, 1.0, 2.0)
    assert latents.isfinite().all()
    assert latents.shape == (2, *backbone.latent_shape)
