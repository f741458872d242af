"""Adapters in files: ours, those of diffusers, kohya and peft, and what is refused."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import tiny
from attune.config.settings import Lora
from attune.diffusion.lora_files import ADAPTER_FILE
from drawing import drawn, drawn_by, same_weights


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


def test_a_peft_file_named_on_the_hub_comes_with_its_configuration(new_policy, tmp_path, on_the_hub):
    saved, folder = new_policy(moved=0.1, rank=4), tmp_path / "peft"
    folder.mkdir()
    save_file(renamed(saved, lambda key: f"base_model.model.{key}"), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    name, commit = on_the_hub(folder)
    loaded = new_policy(adapter=False)
    loaded.load(f"{name}/adapter_model.safetensors@{commit}")
    assert same_weights(loaded, saved)


def test_an_adapter_that_did_not_move_is_ours_alone(new_policy, tmp_path):
    """Early stopping may find that the start was best; of a file from elsewhere it means that it was not understood."""
    new_policy().save(tmp_path)
    foreign, own = new_policy(adapter=False), new_policy(adapter=False)
    with pytest.raises(ValueError, match="changes nothing: in every pair, A or B is zero"):
        foreign.load(tmp_path)
    with pytest.raises(ValueError, match="changes nothing"):
        foreign.continue_from(str(tmp_path), Lora(rank=2))
    own.load(tmp_path, may_be_zero=True)
    assert torch.equal(drawn(own), drawn(foreign))
    (tmp_path / "run.json").write_text("{}")
    foreign.continue_from(str(tmp_path), Lora(rank=2))
    assert foreign.parameters()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_saved(new_policy, tmp_path, value):
    adapter, whole = new_policy(moved=0.1), new_policy(adapter=False)
    whole.unfreeze()
    for policy in (adapter, whole):
        policy.parameters()[-1].data.view(-1)[0] = value
        with pytest.raises(ValueError, match=r"models/x was not saved: \S+ holds values that are not finite"):
            policy.save(tmp_path / "models/x")
    assert not list(tmp_path.iterdir())
