"""Training that goes on from what was learnt: an adapter or a whole denoiser in a file."""

import re

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

import tiny
from attune.config.settings import Lora
from attune.diffusion.lora_files import ADAPTER_FILE
from drawing import drawn, drawn_by, same_weights

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
    before = tiny.fingerprint(policy.reference_model)
    tiny.move(policy, 0.2)
    assert tiny.fingerprint(policy.reference_model) == before
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
    noise_pred = policy.predict(x_t, t, cond)
    with policy.reference():
        reference = policy.predict(x_t, t, cond)
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


def test_an_adapter_that_did_not_move_is_a_result_of_our_own_and_no_foreign_file(new_policy, tmp_path):
    """Early stopping may find that the start was best; generating from it must not fail after the training."""
    new_policy().save(tmp_path)
    with pytest.raises(ValueError, match="changes nothing"):
        new_policy(adapter=False).load(str(tmp_path))
    policy = new_policy(adapter=False)
    policy.load(str(tmp_path), may_be_zero=True)
    assert policy.parameters()
