"""DiffusionNFT's rollouts and steps on a tiny base. Its loss, against the authors' lines: tests/parity/test_nft.py."""

import pytest
import torch

import tiny
from attune.data.batches import PromptBatch
from attune.diffusion.path import VP
from attune.methods.nft import Config, Method, nft_loss, standing

LOOP = {"lora": {"rank": 2}, "lr": 1e-2, "batches": 2, "batch_size": 2}
OWN = {"rewards": {"light": 1}, "images_per_prompt": 3, "steps": 3, "minibatch_size": 3}


class Light:
    """Mean brightness, without a gradient, or the same number for all images."""

    differentiable = False

    def __init__(self, same=False):
        self.same = same

    def __call__(self, images, prompts):
        assert len(images) == len(prompts)
        assert not images.requires_grad
        return torch.ones(len(images)) if self.same else images.mean((1, 2, 3))


def build(policy, same=False, **changes):
    return Method(Config(**(tiny.PLAIN | LOOP | OWN | changes)), policy, {"light": Light(same), "other": Light()})


def batch(policy, prompts=("a cat", "a dog")):
    return PromptBatch(list(prompts), policy.backbone.encode_prompts(list(prompts)))


def test_standing_is_half_at_the_mean_and_ends_at_the_clip():
    advantage = torch.tensor([0.0, 2.5, -2.5, 5.0, 50.0, -5.0, -9.0])
    assert standing(advantage, 5.0).tolist() == [0.5, 0.75, 0.25, 1, 1, 0, 0]


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_where_the_policy_is_the_old_one_an_average_image_pulls_nowhere(beta):
    path, shape = VP(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)), (4, 2, 3, 3)
    old, x_t, x_0 = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    at = path.level(torch.tensor([10, 300, 700, 990]), x_t)
    v = old.clone().requires_grad_()
    for r, pulls in ((0.5, False), (0.9, True)):
        loss = nft_loss(path, v, old, x_t, at, x_0, torch.full((4,), r, dtype=torch.float64), beta).sum()
        (gradient,) = torch.autograd.grad(loss, v)
        assert (gradient.abs().max() > 1e-6) == pulls


def test_every_image_is_learnt_from_once_in_each_pass_with_other_noise(new_policy):
    method = build(new_policy(), passes=2)
    parts = tiny.minibatches(method, batch(method.policy))
    assert [len(part.r) for part in parts] == [3, 3, 3, 3]
    first, second = (torch.cat([part.x_0 for part in half]) for half in (parts[:2], parts[2:]))
    assert sorted(first.flatten(1).sum(1).tolist()) == sorted(second.flatten(1).sum(1).tolist())
    assert len({float(noise.sum()) for part in parts for noise in part.noise}) == 12
    assert len(parts[0].cond) == 3


def test_images_are_compared_with_those_of_their_prompt(new_policy):
    policy = new_policy(moved=0.2)
    method = build(policy, minibatch_size=6)
    (m,) = tiny.minibatches(method, batch(policy))
    light = policy.backbone.decode_latents(m.x_0).clamp(0, 1).mean((1, 2, 3))
    prompt = m.cond.tensors["prompt_embeds"].flatten(1).sum(1)
    for own in prompt.unique():
        rows = prompt == own
        assert rows.sum() == 3
        assert torch.equal(m.r[rows].argsort(), light[rows].argsort())
        assert m.r[rows].mean().item() == pytest.approx(0.5, abs=1e-5)
    assert m.rewards["reward"].item() == pytest.approx(light.mean().item(), abs=1e-5)


def test_equal_rewards_leave_only_the_way_back_to_the_base(new_policy):
    """At first there is no way back either, since the policy is the base."""
    policy = new_policy()
    method = build(policy, same=True, kl_coeff=0.5, minibatch_size=6)
    (m,) = tiny.minibatches(method, batch(policy))
    assert m.r.tolist() == [0.5] * 6
    loss, metrics = method.loss(m)
    gradients = torch.autograd.grad(loss, policy.parameters())
    assert max(g.abs().max() for g in gradients) < 1e-6
    assert metrics["kl"] == metrics["moved"] == 0
    tiny.move(policy, 0.2)
    _, metrics = method.loss(m)
    assert metrics["kl"] > 0
    assert metrics["moved"] > 0


@pytest.mark.parametrize(("decay", "follows"), [(0.0, True), (1.0, False)])
def test_the_slow_copy_follows_as_it_is_told(new_policy, data, decay, follows):
    policy = new_policy()
    start = tiny.adapter(policy)
    tiny.run(build(policy, old_decay=decay), data)
    weights = policy.moving_reference.weights
    target = policy.parameters() if follows else start
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, target, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(start, policy.parameters(), strict=True))


def test_a_scorer_of_weight_0_is_only_logged(new_policy):
    method = build(new_policy(), rewards={"light": 1, "other": 0})
    part = tiny.minibatches(method, batch(method.policy))[0]
    assert set(part.rewards) == {"reward", "reward_light", "reward_other"}
    assert part.rewards["reward"] == part.rewards["reward_light"]
    assert Config(rewards={"light": 1, "other": 0}).trained_on == ("light",)


def test_the_base_model_is_only_there_beside_an_adapter(new_policy):
    policy = new_policy(adapter=False)
    policy.unfreeze()
    with pytest.raises(ValueError, match="kl_coeff: the base model is only there beside an adapter"):
        build(policy, lora=None)
    assert build(policy, lora=None, kl_coeff=0).config.kl_coeff == 0


def test_a_bad_image_pushes_as_a_good_one_pulls():
    """Where the policy is the old one the two gradients are each other's opposite."""
    path, shape = VP(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)), (3, 2, 3, 3)
    old, x_t, x_0 = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    at = path.level(torch.tensor([100, 500, 900]), x_t)
    gradients = []
    for r in (1.0, 0.0):
        v = old.clone().requires_grad_()
        loss = nft_loss(path, v, old, x_t, at, x_0, torch.full((3,), r, dtype=torch.float64), 0.7).sum()
        gradients.append(torch.autograd.grad(loss, v)[0])
    torch.testing.assert_close(gradients[0], -gradients[1])
    towards = path.x0_and_noise(old - 1e-3 * gradients[0], x_t, at)[0]
    before = path.x0_and_noise(old, x_t, at)[0]
    assert ((towards - x_0).flatten(1).norm(dim=1) < (before - x_0).flatten(1).norm(dim=1)).all()
