"""The policy: adapter on, adapter off, guidance, targets, and full fine-tuning."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from attune.interfaces import Conditioning
from drawing import drawn, drawn_by, same_weights


@pytest.fixture
def inputs(policy):
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(3, 4, 8, 8, generator=generator)
    return x_t, torch.tensor([1, 501, 951]), policy.backbone.encode_prompts(["a cat", "a dog", "two owls"])


def test_the_reference_is_the_base_bit_for_bit(new_policy, inputs):
    base = new_policy(adapter=False).predict(*inputs)
    policy = new_policy(moved=0.3)
    with policy.reference():
        reference = policy.predict(*inputs)
    assert torch.equal(reference, base)
    assert not reference.requires_grad
    assert not torch.allclose(policy.predict(*inputs), base, atol=1e-3)


def test_a_fresh_adapter_changes_nothing(new_policy, inputs):
    predicted = new_policy().predict(*inputs)
    assert torch.equal(predicted, new_policy(adapter=False).predict(*inputs))
    assert predicted.requires_grad


def test_the_adapter_is_on_again_after_an_error(new_policy, inputs):
    policy = new_policy(moved=0.3)
    before, trainable = policy.predict(*inputs), len(policy.parameters())
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(policy.predict(*inputs), before)
    assert len(policy.parameters()) == trainable > 0
    assert torch.is_grad_enabled()


def test_a_graph_survives_a_look_at_the_reference(new_policy, inputs):
    policy = new_policy(moved=0.1)
    loss = policy.predict(*inputs).square().mean()
    with policy.reference():
        policy.predict(*inputs)
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
        conditional = policy.predict(x_t, t, cond)
        uncond = policy.predict(x_t, t, policy.uncond.expand(3))
        for w in (0.0, 1.0, 3.0):
            expected = uncond + w * (conditional - uncond)
            torch.testing.assert_close(policy.predict(x_t, t, cond, w), expected, rtol=1e-4, atol=1e-5)
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
    policy.predict(*inputs)
    policy.predict(*inputs, 3.0)
    with policy.reference():
        policy.predict(*inputs)
    assert policy.module.rows == [3, 6, 3]


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
    before = tiny.fingerprint(policy.reference_model)
    tiny.move(policy, 0.01)
    assert tiny.fingerprint(policy.reference_model) == before
    assert not torch.allclose(drawn(policy), base, atol=1e-3)
    with policy.reference():
        assert torch.equal(drawn(policy), base)
        assert not torch.is_grad_enabled()


def test_the_policy_is_back_after_an_error_in_the_reference(new_policy, inputs):
    policy = new_policy(adapter=False)
    policy.unfreeze()
    tiny.move(policy, 0.01)
    before = policy.predict(*inputs)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(policy.predict(*inputs), before)
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


def saved_denoiser(new_policy, folder):
    policy = new_policy(adapter=False)
    policy.unfreeze()
    policy.save(folder)
    return folder / "unet/diffusion_pytorch_model.safetensors"


def test_a_denoiser_that_lacks_a_weight_is_refused_and_the_weight_named(new_policy, tmp_path):
    file = saved_denoiser(new_policy, tmp_path)
    weights = load_file(file)
    del weights["mid_block.attentions.0.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    policy = new_policy(adapter=False)
    with pytest.raises(ValueError, match=r"unet does not fit: missing \['mid_block\.attentions\.0\.norm\.weight'\]"):
        policy.load(tmp_path)


def test_a_denoiser_that_is_a_pointer_or_not_finite_is_named(new_policy, tmp_path):
    file, policy = saved_denoiser(new_policy, tmp_path), new_policy(adapter=False)
    weights = load_file(file)
    weights["conv_in.bias"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{file.name}: conv_in\.bias holds values that are not finite"):
        policy.load(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(ValueError, match=rf"{file.name} is a pointer of git-lfs"):
        policy.load(tmp_path)


def test_a_denoiser_that_is_refused_loses_nothing(new_policy, inputs, tiny_xl_folder):
    policy = new_policy(moved=0.3)
    before = policy.predict(*inputs)
    with pytest.raises(ValueError, match="does not fit the base model"):
        policy.load(tiny_xl_folder)
    assert torch.equal(policy.predict(*inputs), before)
    assert policy.parameters()
    assert policy.loaded_from is None


def test_a_denoiser_that_predicts_something_else_is_refused(new_policy, tmp_path):
    """Shapes are the same; read as epsilon, a velocity would draw noise."""
    policy = new_policy(adapter=False)
    policy.load(tiny.write_pipeline(tmp_path / "epsilon"))
    with pytest.raises(ValueError, match=r"unet predicts 'v_prediction', the base model epsilon: .*scheduler_config"):
        policy.load(tiny.write_pipeline(tmp_path / "v", "v_prediction"))


def test_weights_in_float32_computed_in_bfloat16(new_policy, inputs):
    """Full fine-tuning of a bfloat16 model: what moves is float32, and so are its gradients."""
    exact = new_policy(adapter=False).predict(*inputs)
    policy = new_policy(adapter=False)
    policy.autocast = torch.bfloat16
    policy.unfreeze()
    noise_pred = policy.predict(*inputs)
    with policy.reference():
        assert torch.equal(policy.predict(*inputs), noise_pred)
    assert noise_pred.dtype == torch.float32
    assert 0 < (noise_pred - exact).abs().max() < 0.1 * exact.abs().max()
    noise_pred.square().mean().backward()
    gradients = [weight.grad for weight in policy.parameters()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


# ---------------------------------------------------------------- identities


def test_fingerprint_is_of_the_frozen_weights(new_policy):
    policy = new_policy()
    before = tiny.fingerprint(policy.denoiser)
    tiny.move(policy, 0.5)
    assert tiny.fingerprint(policy.denoiser) == before
    assert tiny.fingerprint(new_policy(moved=0.1).denoiser) == before
    policy.denoiser.conv_in.bias.data[0] += 1e-6
    assert tiny.fingerprint(policy.denoiser) != before


def test_captions_are_dropped_by_the_draws_that_are_given(policy):
    """Or a resumed training would drop others than the one that never stopped."""
    cond = policy.backbone.encode_prompts(["a cat", "a dog", "two owls"]).repeat(20)
    kept = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        kept.append(policy.drop_captions(cond, 0.5, tiny.draws(60, 7)).tensors["prompt_embeds"])
    assert torch.equal(*kept)
    empty = (kept[0] == policy.uncond.tensors["prompt_embeds"]).flatten(1).all(1)
    assert 15 < int(empty.sum()) < 45
    other = policy.drop_captions(cond, 0.5, tiny.draws(60, 8)).tensors["prompt_embeds"]
    assert not torch.equal(other, kept[0])


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
