"""Gradient checkpointing, torch.compile and full fine-tuning: cheaper or more, and the same numbers."""

import math
from functools import partialmethod

import pytest
import torch
from torch import nn

import tiny
from trainables import METHODS, equal, method


@pytest.mark.parametrize("name", METHODS)
def test_gradient_checkpointing_changes_nothing(new_policy, new_xl_policy, data, name):
    ends = []
    for wanted in (False, True):
        policy, calls = new_policy(moved=0.1), []
        if wanted:
            policy.denoiser.enable_gradient_checkpointing()
        policy.denoiser.mid_block.resnets[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        history = tiny.run(method(name, policy), data)
        ends.append((history, tiny.adapter(policy), len(calls)))
    (history, weights, calls), (again, same, more) = ends
    assert history == again
    assert equal(weights, same)
    assert more > calls  # computed twice


@pytest.mark.parametrize("full", [False, True])
def test_a_compiled_network_is_the_same_network(new_policy, data, tmp_path, monkeypatch, full):
    """Adapters are switched, losses stay, the reference too, and names in the file are plain.

    Everything but the generation of machine code, which takes a minute and rounds differently.
    """
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    ends = []
    for wanted in (False, True):
        policy = new_policy(adapter=not full)
        if full:
            policy.unfreeze()
        base, names = tiny.fingerprint(policy.reference_model or policy.denoiser), list(policy.denoiser.state_dict())
        history = tiny.run(method("dpo", policy, compile=wanted, lr=1e-4), data)
        assert (policy.denoiser._compiled_call_impl is not None) == wanted
        assert tiny.fingerprint(policy.reference_model or policy.denoiser) == base
        assert list(policy.denoiser.state_dict()) == names
        policy.save(tmp_path / str(wanted))
        ends.append(history)
    plain, compiled = ends
    assert compiled[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in compiled] == pytest.approx([row[key] for row in plain], rel=1e-3)
    files = [{file.relative_to(tmp_path / x) for file in (tmp_path / x).rglob("*")} for x in ("False", "True")]
    assert files[0] == files[1]
    new_policy(adapter=False).load(tmp_path / "True")


@pytest.mark.parametrize("name", METHODS)
def test_every_weight_trains_and_the_reference_does_not(new_policy, data, name):
    policy = new_policy(adapter=False)
    policy.unfreeze()
    base, before = tiny.fingerprint(policy.reference_model), tiny.weights(policy)
    history = tiny.run(method(name, policy, lr=1e-4), data)
    assert tiny.fingerprint(policy.reference_model) == base
    if name == "dpo":
        assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    after = policy.denoiser.state_dict()
    assert not [key for key in before if torch.equal(before[key], after[key])]
