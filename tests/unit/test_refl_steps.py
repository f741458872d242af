"""ReFL: which step is trained, what is decoded, and the hinge."""

import pytest
import torch

import tiny
from attune.data.batches import PromptBatch
from attune.diffusion import process
from attune.methods import refl

PROMPTS = ["a cat", "a dog", "two owls"]


class Light:
    """Mean brightness; keeps the images it was given."""

    differentiable, seen = True, None

    def __call__(self, images, prompts):
        self.seen = images
        return images.mean((1, 2, 3))


def settings(**changes):
    own = {"rewards": {"light": 1}, "steps": 5, "guidance_scale": 2, "lora": None, "truncation_range": [0.6, 0.7]}
    return refl.Config(**(tiny.PLAIN | own | changes))


def first(method, seed=0):
    """The one minibatch of a batch."""
    batch = PromptBatch(PROMPTS, method.policy.backbone.encode_prompts(PROMPTS))
    (minibatch,) = tiny.minibatches(method, batch, seed)
    return minibatch


@pytest.mark.parametrize("wrong", [[0.5, 0.5], [0.5, 1.1], [-0.1, 1], [0.9, 0.8]])
def test_a_range_outside_the_run_is_refused(wrong):
    with pytest.raises(ValueError, match="lies outside the run"):
        settings(truncation_range=wrong)


def test_the_last_quarter_of_the_steps_is_trained(new_policy):
    """The authors draw from the last 10 of 40 steps: timesteps 226, 201, ..., 1."""
    method = refl.Method(settings(truncation_range=[0.75, 1], steps=40), new_policy(), {"light": Light()})
    method.policy.predict = lambda x_t, *_: x_t  # for speed: only the timesteps are looked at
    found = {first(method, seed).timesteps[0].item() for seed in range(150)}
    assert found == set(range(1, 227, 25))


def test_the_hinge_by_hand():
    """r = 1, 2, 3 and target 2: 1, 0, 0."""
    assert refl.hinge_loss(torch.tensor([1.0, 2.0, 3.0]), 2).tolist() == [1, 0, 0]


def test_one_prediction_of_x_0_is_decoded(new_policy):
    """Five steps, at t = 801, 601, 401, 201, 1; the fourth is trained: three calls, one with a gradient, no fifth."""
    method = refl.Method(settings(), new_policy(moved=0.1), {"light": Light()})
    policy, counted = method.policy, []
    hook = policy.denoiser.register_forward_hook(lambda *_: counted.append(torch.is_grad_enabled()))
    minibatch = first(method)
    loss, metrics = method.loss(minibatch)
    hook.remove()
    assert counted == [False, False, False, True]
    assert loss.item() == pytest.approx(0.001 * (2 - metrics["reward"].item()), rel=1e-5)
    x_t, t = minibatch.x_t, torch.tensor([201])
    with torch.no_grad():
        noise_pred = policy.predict(x_t, t.expand(3), minibatch.cond, 2.0)
        at = policy.backbone.path.level(t, x_t)
        decoded = policy.backbone.decode_latents(process.predict_x0(x_t, noise_pred, at))
    torch.testing.assert_close(method.rewards["light"].seen.detach(), decoded.clamp(0, 1))
