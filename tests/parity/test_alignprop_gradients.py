"""AlignProp against the authors' code: case 13, gradients through the last 1, 3, 9 and all 10 of ten DDIM steps.

The authors' sampling loop never draws K = N; they were made to by an integer that passes its guard.
"""

import pytest
import torch
from golden.pipelines import adapted, conditioning
from golden.reading import tensors

from attune.data.batches import PromptBatch
from attune.methods import _reward_backprop, alignprop

pytestmark = pytest.mark.parity
NAME = "13"


class StoredReward:
    """The reward of the case: sum of W times the image."""

    differentiable = True

    def __init__(self, w):
        self.w, self.seen = w, None

    def __call__(self, images, prompts):
        self.seen = images
        return (self.w * images).sum((1, 2, 3))


@pytest.fixture(scope="module")
def case():
    return tensors("13_alignprop_chain") | tensors("13_alignprop_gradients")


@pytest.fixture(scope="module")
def policy(sd, case, tmp_path_factory):
    return adapted(sd, conditioning(case, "negative_"), "13_alignprop_lora", tmp_path_factory.mktemp("lora"))


def method_for(policy, case, k, **changes):
    own = {"rewards": {"stored": 1}, "target": None, "loss_coeff": 1, "checkpoint_steps": False}
    chain = {"steps": 10, "guidance_scale": 5, "truncation": "fixed", "truncation_range": [1 - k / 10]}
    config = alignprop.Config(**(own | chain | changes))
    return alignprop.Method(config, policy, {"stored": StoredReward(case["W"])})


def gradients(method, case, k):
    """The loss, and the gradient of every adapter weight, from the case's noise."""
    noise = [case["latents"], *case["noise"]]
    batch = PromptBatch(["0", "1"], conditioning(case))
    trajectory = _reward_backprop.rollout_no_grad(method.policy, batch, method.config, k, lambda shape: noise.pop(0))
    assert not noise
    assert not trajectory.x_t.requires_grad
    loss, _ = method.loss(trajectory)
    named = {key.replace(".default", ""): w for key, w in method.policy.denoiser.named_parameters() if w.requires_grad}
    return loss, dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("k", [1, 3, 9, 10])
def test_gradients_through_the_last_steps(table, policy, case, k):
    method = method_for(policy, case, k)
    first = alignprop.truncation_step("fixed", method.config.truncation_range, 10, torch.Generator())
    assert first == 10 - k
    loss, found = gradients(method, case, k)
    table.close(NAME, "image shown to the reward", method.rewards["stored"].seen, case["image"])
    table.close(NAME, "loss", loss, case["loss"])
    assert {f"K{k}.grad.{key}" for key in found} == {key for key in case if key.startswith(f"K{k}.grad.")}
    for key, gradient in found.items():
        table.close(NAME, f"gradients, K = {k}", gradient, case[f"K{k}.grad.{key}"], rel=1e-4)
    total = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    table.close(NAME, f"gradient norm, K = {k}", total, case[f"K{k}.grad_norm_total"], rel=1e-4)


def test_gradients_from_checkpoints(table, policy, case):
    """Images are then decoded one by one, which moves the last bits."""
    loss, found = gradients(method_for(policy, case, 3, checkpoint_steps=True), case, 3)
    table.close(NAME, "loss, checkpointed", loss, case["loss"])
    for key, gradient in found.items():
        table.close(NAME, "gradients, K = 3, checkpointed", gradient, case[f"K3.grad.{key}"], rel=1e-4)
