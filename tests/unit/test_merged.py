"""An adapter that is merged into the base's weights where no gradient flows."""

import pytest
import torch
from torch import nn

import tiny
from attune.data.batches import PromptBatch
from attune.diffusion.lora import lora_layers
from attune.methods import spo
from drawing import drawn, drawn_by


@pytest.fixture
def inputs(new):
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(3, 4, 8, 8, generator=generator)
    cond = new(adapter=False).backbone.encode_prompts(["a cat", "a dog", "two owls"])
    return x_t, torch.tensor([1, 501, 951]), cond


def base_weights(policy):
    """The base's tensors where an adapter is, as they are now."""
    return [layer.get_base_layer().weight.data for layer in lora_layers(policy.denoiser)]


def same_tensors(some, others):
    return all(a.data_ptr() == b.data_ptr() for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_predictions_are_the_policys_up_to_rounding(new, inputs, targets):
    policy = new(targets=targets, moved=0.3)
    with torch.no_grad():
        apart = policy.predict(*inputs)
    calls = []
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in lora_factors(policy)]
    with policy.merged():
        together = policy.predict(*inputs)
    for hook in hooks:
        hook.remove()
    assert calls == []
    assert not together.requires_grad
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    with policy.reference():
        assert (policy.predict(*inputs) - apart).abs().max() > 0.01  # the adapter does change something


def lora_factors(policy):
    return [module for name, module in policy.denoiser.named_modules() if name.endswith((".lora_A.default", "lora_B"))]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_afterwards_the_base_is_the_same_bit_for_bit(new, inputs, error):
    policy = new(targets="all", moved=0.3)
    before, saved = policy.predict(*inputs), tiny.weights(policy)
    tensors = base_weights(policy)

    def end():
        with policy.merged():
            assert not same_tensors(base_weights(policy), tensors)
            raise error

    with pytest.raises(error):
        end()
    assert same_tensors(base_weights(policy), tensors)
    assert all(torch.equal(value, saved[name]) for name, value in policy.denoiser.state_dict().items())
    after = policy.predict(*inputs)
    assert torch.equal(after, before)
    after.square().mean().backward()
    assert all(weight.grad is not None for weight in policy.parameters())


def test_an_interruption_half_way_leaves_nothing_merged(new, inputs, monkeypatch):
    policy = new(moved=0.3)
    before, tensors = policy.predict(*inputs), base_weights(policy)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lora_layers(policy.denoiser)[2], "get_delta_weight", interrupted)
    with pytest.raises(KeyboardInterrupt), policy.merged():
        pytest.fail("it was merged")
    assert same_tensors(base_weights(policy), tensors)
    assert torch.equal(policy.predict(*inputs), before)


def test_the_reference_is_refused_inside_and_right_afterwards(new, inputs):
    policy, base = new(moved=0.3), new(adapter=False).predict(*inputs)
    with policy.merged(), pytest.raises(RuntimeError, match="reference"), policy.reference():
        pytest.fail("the reference was given")
    with policy.reference():
        assert torch.equal(policy.predict(*inputs), base)


def test_a_reference_that_is_a_copy_has_its_own_adapter_merged(new, inputs):
    """SPIN samples its opponents so. The base's weights are shared with the policy, and are themselves afterwards."""
    policy = new(moved=0.3)
    policy.snapshot_reference()
    tiny.move(policy, 0.2)
    before, tensors = policy.predict(*inputs), base_weights(policy)
    with policy.reference():
        expected = policy.predict(*inputs)
        with policy.merged():
            assert not same_tensors(base_weights(policy), tensors)
            torch.testing.assert_close(policy.predict(*inputs), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(policy.predict(*inputs), expected)
    assert same_tensors(base_weights(policy), tensors)
    assert torch.equal(policy.predict(*inputs), before)


def test_a_reference_without_its_adapter_has_nothing_to_merge(new, inputs):
    policy = new(moved=0.3)
    with policy.reference():
        expected, tensors = policy.predict(*inputs), base_weights(policy)
        with policy.merged():
            assert same_tensors(base_weights(policy), tensors)
            assert torch.equal(policy.predict(*inputs), expected)
        assert torch.equal(policy.predict(*inputs), expected)


def test_a_block_within_a_block_merges_once(new, inputs):
    policy = new(moved=0.3)
    with policy.merged():
        expected = policy.predict(*inputs)
        with policy.merged():
            assert torch.equal(policy.predict(*inputs), expected)
        assert torch.equal(policy.predict(*inputs), expected)


def unchanged(policy, inputs):
    """That a block changes neither weights nor predictions."""
    tensors = [weight.data for weight in policy.denoiser.parameters()]
    with torch.no_grad():
        before = policy.predict(*inputs)
    with policy.merged():
        assert same_tensors([weight.data for weight in policy.denoiser.parameters()], tensors)
        assert torch.equal(policy.predict(*inputs), before)


def test_weights_in_half_precision_are_left_alone(new, inputs):
    """8 bits of a weight would lose an adapter that has just begun to learn."""
    policy = new(adapter=False)
    policy.denoiser.to(torch.bfloat16)
    policy.backbone.dtype = torch.bfloat16
    policy.add_adapter(2, 0)
    tiny.move(policy, 0.3)
    unchanged(policy, inputs)


def test_so_are_all_weights_in_training_and_a_base_alone(new, inputs):
    policy = new(adapter=False)
    unchanged(policy, inputs)
    policy.unfreeze()
    unchanged(policy, inputs)


def test_a_compiled_network_is_left_alone(new, inputs):
    policy = new(moved=0.3)
    policy.denoiser.compile(backend="eager")
    unchanged(policy, inputs)


class Wrapper(nn.Module):
    """As a distributed wrapper."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapped_network_is_merged_too(new, inputs):
    policy = new(moved=0.3)
    with policy.merged():
        expected = policy.predict(*inputs)
    policy.module, tensors = Wrapper(policy.denoiser), base_weights(policy)
    with policy.merged():
        assert not same_tensors(base_weights(policy), tensors)
        assert torch.equal(policy.predict(*inputs), expected)


def test_images_are_sampled_with_a_merged_adapter(new, pipeline, tmp_path):
    """As diffusers' pipeline draws them, of the adapter that is loaded there."""
    policy = new(targets="all", moved=0.1)
    seen = recorded(policy)
    image = drawn(policy)
    assert all(seen)
    policy.save(tmp_path)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(image.clamp(0, 1), drawn_by(pipeline), rtol=0, atol=1e-3)


def recorded(policy):
    """Of each call of the denoiser, whether the adapter was merged then."""
    tensors, seen = base_weights(policy), []
    policy.denoiser.register_forward_hook(lambda *_: seen.append(not same_tensors(base_weights(policy), tensors)))
    return seen


def test_spos_rollouts_are_merged_and_its_loss_is_not(new_policy):
    settings = {"lora": None, "batch_size": 4, "lr": 1e-3, "batches": 1, "steps": 4, "start_step": 1, "threshold": 0}
    policy = new_policy(moved=0.3)
    method = spo.Method(spo.Config(**(tiny.PLAIN | settings)), policy, tiny.brightness)
    seen = recorded(policy)
    batch = PromptBatch(tiny.PROMPTS[:4], policy.backbone.encode_prompts(tiny.PROMPTS[:4]))
    (minibatch, *_) = tiny.minibatches(method, batch)
    assert len(seen) == 4
    assert all(seen)
    seen.clear()
    method.loss(minibatch)[0].backward()
    assert seen == [False, False]
