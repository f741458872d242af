"""Options of AlignProp, DRaFT and ReFL: which images are scored, how many steps have a gradient, and the loss."""

import pytest
import torch

import tiny
from attune.config import plugins
from attune.data.batches import PromptBatch
from attune.diffusion.ddim import sample

PROMPTS = ["a cat", "a dog", "two owls"]
FAMILY = ["alignprop", "draft", "refl"]
OWN = {"alignprop": {"target": None, "truncation": "fixed", "truncation_range": [0.5]}, "refl": {}, "draft": {}}
LOOP = {"lora": None, "lr": 1e-2, "batches": 1, "batch_size": 3, "steps": 4, "eta": 0.5, "guidance_scale": 2}


class Light:
    """`scale` times the mean brightness, a differentiable reward; keeps the images it was given."""

    differentiable = True

    def __init__(self, scale=1.0):
        self.scale, self.seen, self.had_graph = scale, None, None

    def __call__(self, images, prompts):
        self.seen, self.had_graph = images.detach(), torch.is_grad_enabled()
        return self.scale * images.mean((1, 2, 3))


def build(name, policy, scorers=None, **changes):
    scorers = scorers or {"light": Light()}
    given = {"rewards": dict.fromkeys(scorers, 1.0), "checkpoint_steps": False}
    module = plugins.load("methods", name)
    return module.Method(module.Config(**(tiny.PLAIN | LOOP | given | OWN[name] | changes)), policy, scorers)


def first(method, seed=0):
    batch = PromptBatch(PROMPTS, method.policy.backbone.encode_prompts(PROMPTS))
    (minibatch,) = tiny.minibatches(method, batch, seed)
    return minibatch


def gradient_calls(method):
    """Denoiser calls of one batch that have a graph, and all of them."""
    counted = []
    hook = method.policy.denoiser.register_forward_hook(lambda *_: counted.append(torch.is_grad_enabled()))
    _, metrics = method.loss(first(method))
    hook.remove()
    return sum(counted), len(counted), metrics


IMAGES = [{"steps": 3}, {"steps": 6}, {"eta": 0.0}, {"eta": 1.0}, {"guidance_scale": 1.0}, {"guidance_scale": 5.0}]


@pytest.mark.parametrize("name", ["alignprop", "draft"])
@pytest.mark.parametrize("changes", IMAGES, ids=str)
def test_what_is_scored_is_what_the_sampler_draws_at_these_settings(new_policy, name, changes):
    policy, light = new_policy(moved=0.1), Light()
    asked = {"steps": 4, "eta": 0.5, "guidance_scale": 2} | changes
    method = build(name, policy, {"light": light}, **asked)
    method.loss(first(method))
    cond = policy.backbone.encode_prompts(PROMPTS)
    noise = tiny.draws(3).noise
    latents = sample(policy, cond, noise, asked["steps"], asked["eta"], asked["guidance_scale"])
    expected = policy.backbone.decode_latents(latents).clamp(0, 1).detach()
    torch.testing.assert_close(light.seen, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"steps": 6}, {"eta": 0.0}, {"guidance_scale": 1.0}], ids=str)
def test_refl_scores_the_prediction_of_the_step_it_drew(new_policy, changes):
    """Sampling up to the step is that of the settings; of what comes after, nothing is drawn."""
    policy, light = new_policy(moved=0.1), Light()
    method = build("refl", policy, {"light": light}, truncation_range=[0.5, 0.51], **changes)
    minibatch = first(method)
    method.loss(minibatch)
    steps = method.config.steps
    assert minibatch.timesteps[0] == (steps - 1 - steps // 2) * (1000 // steps) + 1
    t = minibatch.timesteps[:1]
    a_t = policy.backbone.path.level(t, minibatch.x_t).alpha2
    with torch.no_grad():
        predicted = policy.predict(minibatch.x_t, t.expand(3), minibatch.cond, method.config.guidance_scale)
    x_0 = (minibatch.x_t - (1 - a_t).sqrt() * predicted) / a_t.sqrt()
    torch.testing.assert_close(light.seen, policy.backbone.decode_latents(x_0).clamp(0, 1).detach())


# ---------------------------------------------------------------- how many steps have a gradient


@pytest.mark.parametrize("k", [1, 2, 4])
def test_drafts_backprop_steps(new_policy, k):
    with_graph, calls, _ = gradient_calls(build("draft", new_policy(moved=0.1), backprop_steps=k))
    assert (with_graph, calls) == (k, 4)


TRUNCATIONS = [
    ({"truncation": "fixed", "truncation_range": [0.75]}, {1}),
    ({"truncation": "fixed", "truncation_range": [0.0]}, {4}),
    ({"truncation": "gaussian", "truncation_range": [0.3, 0.0]}, {3}),
    ({"truncation": "uniform", "truncation_range": [0.25, 0.5]}, {3}),
    ({"truncation": "uniform", "truncation_range": [0.5, 1.0]}, {1, 2}),
]


@pytest.mark.parametrize(("changes", "steps"), TRUNCATIONS, ids=str)
def test_alignprops_truncation(new_policy, changes, steps):
    """Of four steps the first with a gradient is number 4 share, rounded down; what is logged is what was done."""
    method = build("alignprop", new_policy(moved=0.1), **changes)
    assert {len(first(method, seed).timesteps) - 1 for seed in range(8)} == steps
    with_graph, calls, metrics = gradient_calls(method)
    assert (with_graph, calls) == (metrics["gradient_steps"], 4)


@pytest.mark.parametrize(("low", "high", "steps"), [(0.0, 0.25, {0}), (0.25, 0.75, {1, 2}), (0.75, 1.0, {3})])
def test_refls_truncation(new_policy, low, high, steps):
    """t = 751, 501, 251, 1 are steps 0 to 3."""
    method = build("refl", new_policy(moved=0.1), truncation_range=[low, high])
    found = {first(method, seed).timesteps[0].item() for seed in range(12)}
    assert found == {(751, 501, 251, 1)[i] for i in steps}


@pytest.mark.parametrize("name", FAMILY)
def test_checkpointed_steps_have_the_same_gradient(new_policy, name):
    policy, gradients = new_policy(moved=0.1), []
    for wanted in (False, True):
        method = build(name, policy, checkpoint_steps=wanted)
        loss, _ = method.loss(first(method))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters())]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().sum() > 0


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("alignprop", {"target": None, "loss_coeff": 0.5}, lambda r: -0.5 * r.mean()),
        ("alignprop", {"target": 10.0, "loss_coeff": 0.01}, lambda r: 0.01 * (10 - r).mean()),
        ("alignprop", {"target": -1.0, "loss_coeff": 0.01}, lambda r: 0.01 * (r + 1).mean()),
        ("alignprop", {"target": 0.268, "loss_coeff": 1.0}, lambda r: (r - 0.268).abs().mean()),
        ("draft", {}, lambda r: -r.mean()),
        ("refl", {"target": 2.0, "loss_coeff": 0.5}, lambda r: 0.5 * (2 - r).mean()),
        ("refl", {"target": 0.268, "loss_coeff": 1.0}, lambda r: (0.268 - r).clamp(min=0).mean()),
        ("refl", {"target": -1.0, "loss_coeff": 1.0}, lambda r: 0.0 * r.mean()),
    ],
)
def test_target_and_loss_coeff(new_policy, name, changes, expected):
    light = Light()
    method = build(name, new_policy(moved=0.1), {"light": light}, **changes)
    loss, metrics = method.loss(first(method))
    reward = light.seen.mean((1, 2, 3))
    assert 0.1 < reward.min() < reward.max() < 0.9
    assert loss.item() == pytest.approx(expected(reward).item(), rel=1e-4, abs=1e-7)
    assert metrics["reward"].item() == pytest.approx(reward.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_rewards_are_weighed_and_one_of_weight_0_is_only_logged(new_policy, name):
    """r = 2 a - 3 b with a = light and b = 0.1 light: 1.7 times the light."""
    scorers = {"a": Light(), "b": Light(0.1), "watched": Light(7.0)}
    method = build(name, new_policy(moved=0.1), scorers, rewards={"a": 2.0, "b": -3.0, "watched": 0.0})
    _, metrics = method.loss(first(method))
    light = scorers["a"].seen.mean().item()
    assert metrics["reward"].item() == pytest.approx(1.7 * light, rel=1e-5)
    found = {key: metrics[f"reward_{key}"].item() for key in scorers}
    assert found == pytest.approx({"a": light, "b": 0.1 * light, "watched": 7 * light}, rel=1e-5)
    assert {key: scorer.had_graph for key, scorer in scorers.items()} == {"a": True, "b": True, "watched": False}
    assert method.config.trained_on == ("a", "b")


@pytest.mark.parametrize("name", FAMILY)
def test_a_step_uphill_raises_the_reward(new_policy, name):
    """The gradient of the loss points away from light: a small step against it makes the same image lighter."""
    policy = new_policy(moved=0.1)
    method = build(name, policy, **({} if name == "draft" else {"loss_coeff": 1.0}))
    minibatch = first(method)
    loss, before = method.loss(minibatch)
    gradients = torch.autograd.grad(loss, policy.parameters())
    size = torch.cat([g.flatten() for g in gradients]).norm()
    with torch.no_grad():
        for weight, gradient in zip(policy.parameters(), gradients, strict=True):
            weight -= 0.05 * gradient / size
        _, after = method.loss(minibatch)
    assert after["reward"] > before["reward"]


def test_clamped_is_the_share_of_pixels_outside_the_unit_interval(new_policy):
    """What scorers see is cut to [0, 1]; how much was cut is logged."""
    policy = new_policy(moved=0.1)
    method = build("draft", policy)
    decode = policy.backbone.decode_latents
    policy.backbone.decode_latents = lambda latents: 3 * decode(latents) - 1
    minibatch = first(method)
    _, metrics = method.loss(minibatch)
    seen = method.rewards["light"].seen
    assert (seen.min() >= 0, seen.max() <= 1) == (True, True)
    assert metrics["clamped"].item() == pytest.approx(((seen == 0) | (seen == 1)).float().mean().item(), abs=1e-3)
    assert metrics["clamped"] > 0.05


@pytest.mark.parametrize("n", [1, 3])
def test_draft_lv_scores_every_copy(new_policy, n):
    light = Light()
    method = build("draft", new_policy(moved=0.1), {"light": light}, n_renoised=n)
    minibatch = first(method)
    assert len(minibatch.x_t) == 3 * (1 + n)
    assert list(minibatch.timesteps) == [1, 0]
    loss, _ = method.loss(minibatch)
    assert len(light.seen) == 3 * (1 + n)
    assert loss.item() == pytest.approx(-light.seen.mean().item(), rel=1e-5)


@pytest.mark.parametrize(("wanted", "sizes"), [(True, {1}), (False, {3})])
def test_images_are_decoded_one_by_one_where_memory_is_to_be_saved(new_policy, monkeypatch, wanted, sizes):
    """Where an image has as many pixels as are decoded at a time."""
    monkeypatch.setattr("attune.methods._reward_backprop.CHECKPOINTED_PIXELS", 16**2)
    policy = new_policy(moved=0.1)
    method, decoded = build("draft", policy, checkpoint_decoder=wanted), []
    decode = policy.backbone.decode_latents
    policy.backbone.decode_latents = lambda latents: decoded.append(len(latents)) or decode(latents)
    method.loss(first(method))
    assert set(decoded) == sizes
