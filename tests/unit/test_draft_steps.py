"""DRaFT: settings that fit together, and the copies of DRaFT-LV."""

import pytest
import torch

import tiny
from attune.data.batches import PromptBatch
from attune.methods import draft
from attune.methods._reward_backprop import rollout

PROMPTS = ["a cat", "a dog", "two owls"]


class Light:
    """Mean brightness; counts the images it was given."""

    differentiable, seen = True, 0

    def __call__(self, images, prompts):
        self.seen = len(images)
        return images.mean((1, 2, 3))


def settings(**changes):
    own = {"rewards": {"light": 1}, "steps": 5, "guidance_scale": 2, "eta": 1, "lora": None}
    return draft.Config(**(tiny.PLAIN | own | changes))


def first(method):
    """The one minibatch of a batch."""
    batch = PromptBatch(PROMPTS, method.policy.backbone.encode_prompts(PROMPTS))
    (minibatch,) = tiny.minibatches(method, batch)
    return minibatch


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"backprop_steps": 6}, "backprop_steps: there are only 5 steps"),
        ({"backprop_steps": 2, "n_renoised": 2}, "n_renoised: .* backprop_steps must be 1"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        settings(**wrong)


def test_the_loss_is_minus_the_mean_reward(new_policy):
    method = draft.Method(settings(), new_policy(moved=0.1), {"light": Light()})
    loss, metrics = method.loss(first(method))
    assert loss.item() == -metrics["reward"].item()


def test_draft_lv_adds_copies_one_step_of_noise_away(new_policy):
    """x_1 = sqrt(a_1) x_0 + sqrt(1 - a_1) noise, two for each image; the loss is the mean over all nine."""
    policy, light = new_policy(moved=0.1), Light()
    alone = draft.Method(settings(), policy, {"light": light})
    method = draft.Method(settings(n_renoised=2), policy, {"light": light})
    originals, more = first(alone), first(method)
    assert more.prompts == PROMPTS * 3
    assert len(more.cond) == 9
    assert torch.equal(more.x_t[:3], originals.x_t)
    assert torch.equal(more.noise[:3], originals.noise)
    with torch.no_grad():
        x_0 = rollout(policy, originals, alone.config).repeat(2, 1, 1, 1)
    a_1 = policy.backbone.path.alphas_cumprod[1]
    noise = (more.x_t[3:] - a_1.sqrt() * x_0) / (1 - a_1).sqrt()
    assert noise.std() == pytest.approx(1, abs=0.1)  # 1,536 numbers: standard error 0.018
    assert noise.mean() == pytest.approx(0, abs=0.1)
    assert not torch.equal(noise[:3], noise[3:])
    assert not more.x_t.requires_grad
    method.loss(more)
    assert light.seen == 9
