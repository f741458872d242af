"""The policy: adapter on, adapter off, guidance, files."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from attune.diffusion.policy import ADAPTER_FILE, fingerprint
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
    """null + w (cond - null), from separate calls; w = 1 is the conditional, w = 0 the null prediction."""
    x_t, t, cond = inputs
    with torch.no_grad():
        conditional = policy.predict_noise(x_t, t, cond)
        null = policy.predict_noise(x_t, t, policy.null.expand(3))
        for w in (0.0, 1.0, 3.0):
            expected = null + w * (conditional - null)
            torch.testing.assert_close(policy.predict_noise(x_t, t, cond, w), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(conditional, null, atol=1e-3)


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


def test_save_and_load_give_every_tensor_back(new_policy, tmp_path, inputs):
    saved, loaded = new_policy(moved=0.3), new_policy(seed=9)
    saved.save(tmp_path)
    loaded.load(tmp_path)
    state = saved.denoiser.state_dict()
    assert state.keys() == loaded.denoiser.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.denoiser.state_dict().items())
    assert torch.equal(loaded.predict_noise(*inputs), saved.predict_noise(*inputs))
    assert len(loaded.parameters()) == len(saved.parameters())


def test_diffusers_reads_the_file(new_policy, tmp_path, inputs, tiny_folder):
    """The published layout: a plain UNet and `load_lora_adapter`, as pipelines do it."""
    policy = new_policy(moved=0.3)
    policy.save(tmp_path)
    names = list(load_file(tmp_path / ADAPTER_FILE))
    assert all(name.startswith("unet.") for name in names)
    unet = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    unet.load_lora_adapter(load_file(tmp_path / ADAPTER_FILE), prefix="unet")
    x_t, t, cond = inputs
    theirs = policy.backbone.predict_noise(unet, x_t, t, cond)
    torch.testing.assert_close(theirs, policy.predict_noise(x_t, t, cond))


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_file_that_does_not_fit_is_refused_by_name(policy, tmp_path, change):
    policy.save(tmp_path)
    weights = load_file(tmp_path / ADAPTER_FILE)
    key = next(iter(weights))
    if change == "missing":
        weights.pop(key)
        named = key.removeprefix("unet.").partition(".lora")[0]
    else:
        named = "attn9.to_q"
        weights[f"unet.{named}.lora.up.weight"] = torch.zeros(8, 2)
    save_file(weights, tmp_path / ADAPTER_FILE)
    before = tiny.adapter(policy)
    with pytest.raises(ValueError, match=re.escape(named)):
        policy.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_an_adapter_of_another_rank_is_refused(new_policy, tmp_path):
    new_policy(rank=3).save(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        new_policy(rank=2).load(tmp_path)


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
