"""The policy: adapter on, adapter off, guidance, files."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from attune.config.settings import Lora
from attune.diffusion.ddim import sample
from attune.diffusion.lora import ADAPTER_FILE
from attune.diffusion.policy import fingerprint
from attune.interfaces import Conditioning


@pytest.fixture
def inputs(policy):
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(3, 4, 8, 8, generator=generator)
    return x_t, torch.tensor([1, 501, 951]), policy.backbone.encode_prompts(["a cat", "a dog", "two owls"])


def test_the_reference_is_the_base_bit_for_bit(new_policy, inputs):
    base = new_policy(adapter=False).predict_noise(*inputs)
    policy = new_policy(moved=0.3)
    with policy.reference():
        reference = policy.predict_noise(*inputs)
    assert torch.equal(reference, base)
    assert not reference.requires_grad
    assert not torch.allclose(policy.predict_noise(*inputs), base, atol=1e-3)


def test_a_fresh_adapter_changes_nothing(new_policy, inputs):
    predicted = new_policy().predict_noise(*inputs)
    assert torch.equal(predicted, new_policy(adapter=False).predict_noise(*inputs))
    assert predicted.requires_grad


def test_the_adapter_is_on_again_after_an_error(new_policy, inputs):
    policy = new_policy(moved=0.3)
    before, trainable = policy.predict_noise(*inputs), len(policy.parameters())
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(policy.predict_noise(*inputs), before)
    assert len(policy.parameters()) == trainable > 0
    assert torch.is_grad_enabled()


def test_a_graph_survives_a_look_at_the_reference(new_policy, inputs):
    policy = new_policy(moved=0.1)
    loss = policy.predict_noise(*inputs).square().mean()
    with policy.reference():
        policy.predict_noise(*inputs)
    loss.backward()
    assert all(weight.grad is not None for weight in policy.parameters())


def test_only_the_adapter_trains(policy):
    trained = {name for name, weight in policy.denoiser.named_parameters() if weight.requires_grad}
    assert len(trained) == len(policy.parameters())
    assert all("lora_" in name for name in trained)
    ends = {name.partition(".lora_")[0].split("attn")[-1][2:] for name in trained}
    assert ends == {"to_q", "to_k", "to_v", "to_out.0"}


def test_rank_targets_seed_and_start(new_policy):
    policy = new_policy(rank=3, seed=1, targets=["to_q"])
    weights = {n: w for n, w in policy.denoiser.named_parameters() if w.requires_grad}
    assert all(".to_q.lora_" in name for name in weights)
    for name, weight in weights.items():
        if "lora_B" in name:
            assert not weight.any()
        else:
            assert weight.shape[0] == 3
            assert weight.std().item() == pytest.approx(1 / 3, rel=0.5)  # Gaussian of std 1 / rank
    same, other = (new_policy(rank=3, seed=seed, targets=["to_q"]) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))


def test_alpha_equals_rank(new_policy):
    """Scaling 1 whatever the rank, so the file can be read without knowing alpha."""
    layers = [m for m in new_policy(rank=3).denoiser.modules() if hasattr(m, "scaling")]
    assert layers
    assert all(layer.scaling == {"default": 1.0} for layer in layers)


def test_the_adapter_is_float32_on_a_half_precision_base(new_policy):
    policy = new_policy(adapter=False)
    policy.denoiser.to(torch.bfloat16)
    policy.add_adapter(2, 0)
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}


def test_guidance_by_its_definition(policy, inputs):
    """uncond + w (cond - uncond), from separate calls; w = 1 is the conditional prediction, w = 0 the unconditional."""
    x_t, t, cond = inputs
    with torch.no_grad():
        conditional = policy.predict_noise(x_t, t, cond)
        uncond = policy.predict_noise(x_t, t, policy.uncond.expand(3))
        for w in (0.0, 1.0, 3.0):
            expected = uncond + w * (conditional - uncond)
            torch.testing.assert_close(policy.predict_noise(x_t, t, cond, w), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(conditional, uncond, atol=1e-3)


class Wrapper(nn.Module):
    """As a distributed wrapper: forwards, and counts."""

    def __init__(self, module):
        super().__init__()
        self.module, self.rows = module, []

    def forward(self, x_t, *args, **kwargs):
        self.rows.append(len(x_t))
        return self.module(x_t, *args, **kwargs)


def test_the_wrapped_module_is_what_is_called(policy, inputs):
    """Calling the bare network would train the ranks of a distributed run apart."""
    policy.module = Wrapper(policy.denoiser)
    policy.predict_noise(*inputs)
    policy.predict_noise(*inputs, 3.0)
    with policy.reference():
        policy.predict_noise(*inputs)
    assert policy.module.rows == [3, 6, 3]


# ---------------------------------------------------------------- adapters in files


@pytest.fixture(params=["sd", "sdxl"])
def new(request, new_policy, new_xl_policy):
    """Makes policies on the tiny SD, then on the tiny SDXL."""
    return {"sd": new_policy, "sdxl": new_xl_policy}[request.param]


@pytest.fixture
def pipeline(new, new_policy, tiny_folder, tiny_xl_folder):
    """diffusers' own pipeline of the same base."""
    kind, folder = (
        (StableDiffusionPipeline, tiny_folder) if new is new_policy else (StableDiffusionXLPipeline, tiny_xl_folder)
    )
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


START = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6))


def drawn(policy):
    """An image, as the evaluation draws it."""
    cond = policy.backbone.encode_prompts(["a cat"])
    with torch.no_grad():
        return policy.backbone.decode_latents(sample(policy, cond, lambda shape: START, 4, 0.0, 3.0))


def drawn_by(pipeline):
    options = {"latents": START, "num_inference_steps": 4, "guidance_scale": 3.0, "eta": 0.0}
    return pipeline("a cat", output_type="pt", **options).images


def same_weights(policy, other):
    state, again = policy.denoiser.state_dict(), other.denoiser.state_dict()
    return state.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in state.items())


def test_save_and_load_give_every_tensor_back(new, tmp_path):
    """Into the bare base, which learns rank and targets from the file; or in the place of another adapter."""
    saved = new(moved=0.1, rank=3, targets="all")
    saved.save(tmp_path)
    for loaded in (new(adapter=False), new(seed=9)):
        base = drawn(new(adapter=False))
        loaded.load(tmp_path)
        assert same_weights(loaded, saved)
        assert torch.equal(drawn(loaded), drawn(saved))
        assert (drawn(loaded) - base).abs().max() > 0.01
        assert len(loaded.parameters()) == len(saved.parameters())
        assert torch.equal(drawn(saved), drawn(loaded))


def test_plain_diffusers_draws_the_same_with_the_file(new, tmp_path, pipeline):
    policy = new(moved=0.1, targets="all")
    policy.save(tmp_path)
    assert all(name.startswith("unet.") for name in load_file(tmp_path / ADAPTER_FILE))
    before = drawn_by(pipeline)
    pipeline.load_lora_weights(tmp_path)
    after = drawn_by(pipeline)
    torch.testing.assert_close(after, drawn(policy).clamp(0, 1), rtol=0, atol=1e-4)
    assert (after - before).abs().max() > 0.01


def renamed(policy, name):
    """The adapter's tensors under other names, in float32 copies."""
    return {name(key): value.clone() for key, value in get_peft_model_state_dict(policy.denoiser).items()}


def kohya(key):
    """`mid_block.attn1.to_q.lora_A.weight` as `lora_unet_mid_block_attn1_to_q.lora_down.weight`."""
    module, _, side = key.partition(".lora_")
    return f"lora_unet_{module.replace('.', '_')}.lora_{ {'A': 'down', 'B': 'up'}[side[0]] }.weight"


def test_kohya_files_mean_alpha_over_rank(new, tmp_path, pipeline):
    """Rank 4 at alpha 1: a quarter of what the tensors alone would do, in diffusers as here."""
    policy = new(moved=0.2, rank=4)
    weights = renamed(policy, kohya)
    names = {key.partition(".")[0] for key in weights}
    save_file(weights | {f"{name}.alpha": torch.tensor(1.0) for name in names}, tmp_path / "some.safetensors")
    loaded = new(adapter=False)
    loaded.load(tmp_path)
    for name, value in policy.denoiser.named_parameters():
        if "lora_B" in name:
            value.data *= 0.25
    assert same_weights(loaded, policy)
    pipeline.load_lora_weights(tmp_path / "some.safetensors")
    torch.testing.assert_close(drawn(loaded).clamp(0, 1), drawn_by(pipeline), rtol=0, atol=1e-4)


def test_alpha_may_differ_from_module_to_module(new_policy, tmp_path):
    policy = new_policy(moved=0.2, rank=4)
    weights = renamed(policy, kohya)
    names = sorted({key.partition(".")[0] for key in weights})
    alphas = {f"{name}.alpha": torch.tensor(2.0 ** (i % 3)) for i, name in enumerate(names)}
    save_file(weights | alphas, tmp_path / "some.safetensors")
    loaded = new_policy(adapter=False)
    loaded.load(tmp_path / "some.safetensors")
    found = get_peft_model_state_dict(loaded.denoiser)
    for key, value in get_peft_model_state_dict(policy.denoiser).items():
        scale = alphas[f"{kohya(key).partition('.')[0]}.alpha"] / 4 if "lora_B" in key else 1
        assert torch.equal(found[key], value * scale)


def test_ranks_may_differ_from_module_to_module(new_policy, tmp_path):
    policy = new_policy(moved=0.2, rank=4)
    weights = renamed(policy, lambda key: f"unet.{key}")
    name = next(iter(weights)).partition(".lora_")[0]
    weights[f"{name}.lora_A.weight"] = weights[f"{name}.lora_A.weight"][:1].clone()
    weights[f"{name}.lora_B.weight"] = weights[f"{name}.lora_B.weight"][:, :1].clone()
    save_file(weights, tmp_path / "some.safetensors")
    loaded = new_policy(adapter=False)
    loaded.load(tmp_path)
    found = get_peft_model_state_dict(loaded.denoiser)
    assert found.keys() == {key.removeprefix("unet.") for key in weights}
    assert all(torch.equal(found[key.removeprefix("unet.")], value) for key, value in weights.items())
    scalings = {s for m in loaded.denoiser.modules() for s in getattr(m, "scaling", {}).values()}
    assert scalings == {1.0}


def test_peft_files_mean_alpha_over_rank(new_policy, tmp_path):
    policy = new_policy(moved=0.2, rank=4)
    save_file(renamed(policy, lambda key: f"base_model.model.{key}"), tmp_path / "adapter_model.safetensors")
    loaded = new_policy(adapter=False)
    with pytest.raises(FileNotFoundError, match=r"alpha is unknown without adapter_config\.json"):
        loaded.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    loaded.load(tmp_path)
    for name, value in policy.denoiser.named_parameters():
        if "lora_B" in name:
            value.data *= 2
    assert same_weights(loaded, policy)


def test_diffusers_metadata_means_alpha_over_rank(new_policy, tmp_path, tiny_folder):
    policy = new_policy(moved=0.2, rank=4)
    layers, metadata = get_peft_model_state_dict(policy.denoiser), {"r": 4, "lora_alpha": 2}
    StableDiffusionPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=metadata)
    loaded = new_policy(adapter=False)
    loaded.load(tmp_path)
    halved = {key: value / 2 if "lora_B" in key else value for key, value in layers.items()}
    found = get_peft_model_state_dict(loaded.denoiser)
    assert found.keys() == halved.keys()
    assert all(torch.equal(found[key], value) for key, value in halved.items())


DAMAGE = {
    "half a pair": (lambda w, k: w.pop(k), "to_q is .* its A and B are"),
    "nothing of that name": (
        lambda w, k: w.update({"unet.attn9.to_q.lora_B.weight": torch.zeros(8, 2)}),
        "attn9.to_q",
    ),
    "another shape": (lambda w, k: w.update({k: torch.ones(2, 99)}), "its A and B are"),
    "a text encoder": (
        lambda w, k: w.update({"text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(2, 16)}),
        "also changes a text encoder",
    ),
    "DoRA": (lambda w, k: w.update({k.replace("lora_A", "dora_scale"): torch.ones(8)}), "DoRA"),
    "a bias": (lambda w, k: w.update({k.replace("A.weight", "B.bias"): torch.ones(8)}), "fits nothing"),
    "nothing at all": (lambda w, k: [value.zero_() for value in w.values()], "changes nothing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_does_not_fit_is_refused_and_nothing_is_lost(new_policy, tmp_path, name):
    damage, says = DAMAGE[name]
    new_policy(moved=0.1).save(tmp_path)
    weights = load_file(tmp_path / ADAPTER_FILE)
    damage(weights, next(key for key in weights if "to_q.lora_A" in key))
    save_file(weights, tmp_path / ADAPTER_FILE)
    policy = new_policy(moved=0.2)
    before = tiny.weights(policy)
    with pytest.raises(ValueError, match=says):
        policy.load(tmp_path)
    after = tiny.weights(policy)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_an_adapter_of_another_model_is_refused(new_policy, new_xl_policy, tmp_path):
    new_xl_policy(moved=0.1).save(tmp_path)
    with pytest.raises(ValueError, match=r"fits nothing in the denoiser|its A and B are"):
        new_policy(adapter=False).load(tmp_path)


def test_what_is_no_safetensors_is_never_read(policy, tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(FileNotFoundError, match=r"pickles such as pytorch_lora_weights\.bin are never read"):
        policy.load(tmp_path)
    with pytest.raises(ValueError, match="only safetensors are read"):
        policy.load(tmp_path / "pytorch_lora_weights.bin")


def test_which_of_several_files_must_be_said(new_policy, tmp_path):
    saved = new_policy(moved=0.1)
    for name in ("a", "b"):
        save_file(renamed(saved, kohya), tmp_path / f"{name}.safetensors")
    policy = new_policy(adapter=False)
    with pytest.raises(ValueError, match=r"several things to load, name one: a\.safetensors, b\.safetensors"):
        policy.load(tmp_path)
    policy.load(tmp_path / "a.safetensors")
    assert same_weights(policy, saved)
    saved.save(tmp_path)  # a name that diffusers looks for is enough
    policy.load(tmp_path)
    whole = new_policy(adapter=False)
    whole.unfreeze()
    whole.save(tmp_path)
    with pytest.raises(ValueError, match=r"name one: pytorch_lora_weights\.safetensors, unet"):
        policy.load(tmp_path)


def test_what_is_on_the_hub_must_be_pinned(policy, tmp_path):
    with pytest.raises(ValueError, match="owner/name is not here, and on the Hub it needs its full commit"):
        policy.load("owner/name")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        policy.load(tmp_path / "missing")


def test_an_adapter_and_a_denoiser_from_the_hub(new_policy, tmp_path, on_the_hub):
    saved, tuned = new_policy(moved=0.1), new_policy(adapter=False)
    saved.save(tmp_path / "lora")
    tuned.unfreeze()
    tiny.move(tuned, 0.01)
    tuned.save(tmp_path / "whole")
    for folder, name, source, expected in (
        ("lora", "owner/lora", "owner/lora", saved),
        ("lora", "owner/files", f"owner/files/{ADAPTER_FILE}", saved),
        ("whole", "owner/whole", "owner/whole", tuned),
    ):
        _, commit = on_the_hub(tmp_path / folder, name)
        loaded = new_policy(adapter=False)
        loaded.load(f"{source}@{commit}")
        assert same_weights(loaded, expected)


# ---------------------------------------------------------------- targets


def adapted(policy):
    return {name.partition(".lora_")[0] for name, weight in policy.denoiser.named_parameters() if weight.requires_grad}


def test_all_is_every_layer_but_the_first_and_the_last(new):
    layers = {n for n, m in new(adapter=False).denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= layers
    assert adapted(new(targets="all")) == layers - {"conv_in", "conv_out"}


def test_a_target_that_fits_nothing_is_named(new_policy):
    with pytest.raises(ValueError, match=r"lora\.targets: no Linear or Conv2d of the denoiser is called 'to_x'"):
        new_policy(targets=["to_q", "to_x"])
    with pytest.raises(ValueError, match="'o_q'"):  # the ending of a name, not of a word
        new_policy(targets=["o_q"])


# ---------------------------------------------------------------- full fine-tuning


def test_the_reference_stays_when_every_weight_moves(new, tmp_path):
    base, policy = drawn(new(adapter=False)), new(adapter=False)
    policy.unfreeze()
    assert len(policy.parameters()) == len(list(policy.denoiser.parameters()))
    assert torch.equal(drawn(policy), base)
    before = fingerprint(policy.reference_model)
    tiny.move(policy, 0.01)
    assert fingerprint(policy.reference_model) == before
    assert not torch.allclose(drawn(policy), base, atol=1e-3)
    with policy.reference():
        assert torch.equal(drawn(policy), base)
        assert not torch.is_grad_enabled()


def test_the_policy_is_back_after_an_error_in_the_reference(new_policy, inputs):
    policy = new_policy(adapter=False)
    policy.unfreeze()
    tiny.move(policy, 0.01)
    before = policy.predict_noise(*inputs)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(policy.predict_noise(*inputs), before)
    assert before.requires_grad


def test_a_whole_denoiser_is_saved_and_loaded(new, tmp_path, pipeline):
    base, saved = drawn(new(adapter=False)), new(adapter=False)
    saved.unfreeze()
    tiny.move(saved, 0.01)
    saved.save(tmp_path)
    for place in (tmp_path, tmp_path / "unet"):  # as a pipeline holds it, and by itself
        loaded = new()
        loaded.load(place)
        assert same_weights(loaded, saved)
        assert torch.equal(drawn(loaded), drawn(saved))
        with loaded.reference():
            assert torch.equal(drawn(loaded), base)
    pipeline.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    torch.testing.assert_close(drawn_by(pipeline), drawn(saved).clamp(0, 1), rtol=0, atol=1e-4)


def test_a_denoiser_of_another_model_is_refused(new_policy, tiny_xl_folder):
    with pytest.raises(ValueError, match=r"does not fit the base model: .* weights differ or are missing"):
        new_policy(adapter=False).load(tiny_xl_folder)


def test_weights_in_float32_computed_in_bfloat16(new_policy, inputs):
    """Full fine-tuning of a bfloat16 model: what moves is float32, and so are its gradients."""
    exact = new_policy(adapter=False).predict_noise(*inputs)
    policy = new_policy(adapter=False)
    policy.autocast = torch.bfloat16
    policy.unfreeze()
    noise_pred = policy.predict_noise(*inputs)
    with policy.reference():
        assert torch.equal(policy.predict_noise(*inputs), noise_pred)
    assert noise_pred.dtype == torch.float32
    assert 0 < (noise_pred - exact).abs().max() < 0.1 * exact.abs().max()
    noise_pred.square().mean().backward()
    gradients = [weight.grad for weight in policy.parameters()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


# ---------------------------------------------------------------- going on from what was learnt

TWO, ALL = Lora(rank=2), Lora(rank=2, targets="all")


@pytest.fixture
def started(new, tmp_path):
    """A policy that goes on from an adapter in a file, and the policy that wrote the file."""
    saved = new(moved=0.1, targets="all")
    saved.save(tmp_path / "first")
    policy = new(adapter=False)
    policy.continue_from(str(tmp_path / "first"), ALL)
    return policy, saved


def test_what_training_starts_from_is_the_reference_bit_for_bit(started):
    """And stays it, with the base's own weights below: only the adapter is there twice."""
    policy, saved = started
    start = drawn(saved)
    assert torch.equal(drawn(policy), start)
    before = fingerprint(policy.reference_model)
    tiny.move(policy, 0.2)
    assert fingerprint(policy.reference_model) == before
    assert (drawn(policy) - start).abs().max() > 0.01
    with policy.reference():
        assert torch.equal(drawn(policy), start)
    theirs, ours = dict(policy.reference_model.named_parameters()), dict(policy.denoiser.named_parameters())
    assert theirs.keys() == ours.keys()
    assert {name for name in ours if theirs[name] is not ours[name]} == {name for name in ours if ".lora_" in name}
    assert not any(weight.requires_grad for weight in theirs.values())


def test_only_the_policy_gets_gradients_when_training_goes_on(started):
    policy, _ = started
    x_t, t, cond = torch.ones(1, 4, 8, 8), torch.tensor([501]), policy.backbone.encode_prompts(["a cat"])
    noise_pred = policy.predict_noise(x_t, t, cond)
    with policy.reference():
        reference = policy.predict_noise(x_t, t, cond)
    assert torch.equal(noise_pred, reference)
    assert not reference.requires_grad
    (noise_pred - reference + 1).square().mean().backward()
    assert all(weight.grad is not None for weight in policy.parameters())
    assert {id(w) for w in policy.denoiser.parameters() if w.grad is not None} == set(map(id, policy.parameters()))


def test_the_file_of_what_went_on_holds_one_adapter_under_the_usual_names(started, tmp_path, new, pipeline):
    policy, _ = started
    tiny.move(policy, 0.05)
    policy.save(tmp_path / "second")
    first, second = (load_file(tmp_path / folder / ADAPTER_FILE) for folder in ("first", "second"))
    assert {name: value.shape for name, value in first.items()} == {name: v.shape for name, v in second.items()}
    again = new(adapter=False)
    again.load(tmp_path / "second")
    assert same_weights(again, policy)
    pipeline.load_lora_weights(tmp_path / "second")
    torch.testing.assert_close(drawn_by(pipeline), drawn(policy).clamp(0, 1), rtol=0, atol=1e-4)


def test_a_half_precision_base_goes_on_from_a_float32_adapter(new_policy, tmp_path):
    new_policy(moved=0.1).save(tmp_path)
    policy = new_policy(adapter=False)
    policy.denoiser.to(torch.bfloat16)
    policy.continue_from(str(tmp_path), TWO)
    weights = load_file(tmp_path / ADAPTER_FILE)
    found = get_peft_model_state_dict(policy.denoiser)
    assert all(torch.equal(found[name.removeprefix("unet.")], value) for name, value in weights.items())
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}


def test_every_weight_goes_on_from_a_whole_denoiser(new, tmp_path):
    saved = new(adapter=False)
    saved.unfreeze()
    tiny.move(saved, 0.01)
    saved.save(tmp_path)
    policy, start = new(adapter=False), drawn(saved)
    policy.continue_from(str(tmp_path), None)
    assert torch.equal(drawn(policy), start)
    assert len(policy.parameters()) == len(list(policy.denoiser.parameters()))
    assert policy.backbone.denoiser is policy.denoiser, "the base would only take up memory"
    tiny.move(policy, 0.01)
    with policy.reference():
        assert torch.equal(drawn(policy), start)
    assert not torch.allclose(drawn(policy), start, atol=1e-3)


OTHERS = [  # four transformer blocks of two attentions of four projections: 32 modules, 8 of them a to_q
    (False, Lora(rank=3), "is a LoRA of rank 2 on 32 modules, but `lora` says a LoRA of rank 3 on 32 modules"),
    (False, Lora(rank=2, targets=["to_q"]), "rank 2 on 32 modules, but `lora` says a LoRA of rank 2 on 8 modules"),
    (False, None, "is a LoRA of rank 2 on 32 modules, but `lora` says a whole denoiser"),
    (True, TWO, "is a whole denoiser, but `lora` says a LoRA of rank 2 on 32 modules"),
]


@pytest.mark.parametrize(("full", "lora", "says"), OTHERS)
def test_a_start_that_is_not_what_the_settings_say_is_refused(new_policy, tmp_path, full, lora, says):
    saved = new_policy(adapter=not full, moved=0.1)
    if full:
        saved.unfreeze()
    saved.save(tmp_path)
    with pytest.raises(ValueError, match=re.escape(says)):
        new_policy(adapter=False).continue_from(str(tmp_path), lora)


def test_a_start_on_the_hub_must_be_pinned(new_policy):
    with pytest.raises(ValueError, match="owner/name is not here, and on the Hub it needs its full commit"):
        new_policy(adapter=False).continue_from("owner/name", TWO)


# ---------------------------------------------------------------- identities


def test_fingerprint_is_of_the_frozen_weights(new_policy):
    policy = new_policy()
    before = fingerprint(policy.denoiser)
    tiny.move(policy, 0.5)
    assert fingerprint(policy.denoiser) == before
    assert fingerprint(new_policy(moved=0.1).denoiser) == before
    policy.denoiser.conv_in.bias.data[0] += 1e-6
    assert fingerprint(policy.denoiser) != before


def test_rows_of_a_conditioning():
    cond = Conditioning({"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([3.0, 4.0])})
    twice = cond.repeat(2)
    assert twice.tensors["a"].flatten().tolist() == [1, 2, 1, 2]  # candidate-major
    assert twice.tensors["b"].tolist() == [3, 4, 3, 4]
    assert cond[1:].expand(3).tensors["a"].tolist() == [[2.0]] * 3
    assert cond[torch.tensor([1, 0])].tensors["b"].tolist() == [4, 3]
    assert len(Conditioning.cat([cond, twice])) == 6
    with pytest.raises(KeyError, match="b"):
        Conditioning.cat([cond, Conditioning({"a": torch.ones(1, 1)})])
