"""What AlignProp, DRaFT and ReFL share: where gradients flow, what scorers are shown, and which are allowed."""

import copy

import pytest
import torch

import tiny
from attune.data.batches import PromptBatch
from attune.diffusion.ddim import ddim, sample
from attune.methods import alignprop, draft, refl
from attune.methods._reward_backprop import first_gradient_step, rollout, rollout_no_grad

PROMPTS = ["a cat", "a dog", "two owls"]
FAMILY = {"alignprop": alignprop, "draft": draft, "refl": refl}


class Light:
    """Mean brightness, a differentiable reward; keeps the images it was given."""

    def __init__(self, differentiable=True):
        self.differentiable, self.seen = differentiable, None

    def __call__(self, images, prompts):
        assert len(images) == len(prompts)
        self.seen = images
        return images.mean((1, 2, 3))


@pytest.fixture
def build(new_policy):
    """A method on five steps; every reward it names is `Light`."""

    def build(name, policy=None, **changes):
        given = {"lora": None, "lr": 1e-2, "batches": 1, "batch_size": 3, "steps": 5, "guidance_scale": 2}
        given |= {"rewards": {"light": 1}, "eta": 1, "checkpoint_steps": False}
        given |= {"target": None} if name == "alignprop" else {}
        settings = FAMILY[name].Config(**(tiny.PLAIN | given | changes))
        scorers = {reward: Light() for reward in settings.rewards}
        return FAMILY[name].Method(settings, policy or new_policy(moved=0.1), scorers)

    return build


def first(method, seed=0):
    """The one minibatch of a batch."""
    batch = PromptBatch(PROMPTS, method.policy.backbone.encode_prompts(PROMPTS))
    (minibatch,) = tiny.minibatches(method, batch, seed)
    return minibatch


def gradient(method, minibatch):
    loss, _ = method.loss(minibatch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, method.policy.parameters())])


def calls(method):
    """Denoiser calls of one batch, those repeated in the backward pass included, and how many of them had a graph."""
    counted = []
    hook = method.policy.denoiser.register_forward_hook(lambda *_: counted.append(torch.is_grad_enabled()))
    method.loss(first(method))[0].backward()
    hook.remove()
    return len(counted), sum(counted)


# ---------------------------------------------------------------- the first step with a gradient


@pytest.mark.parametrize(
    ("share", "steps", "index"),
    [(0.98, 50, 49), (0.98, 10, 9), (0.84, 50, 42), (0.57, 100, 57), (0.0, 50, 0), (0.999999999, 50, 49)],
)
def test_a_share_of_the_steps_is_rounded_down(share, steps, index):
    """0.57 * 100 is 56.99999999999999 in binary; 0 is the whole chain."""
    assert first_gradient_step(lambda: share, steps) == index


def test_a_share_outside_the_run_is_drawn_again():
    shares = iter([-0.1, 1.0, 1.2, 0.5])
    assert first_gradient_step(lambda: next(shares), 10) == 5
    assert list(shares) == []


# ---------------------------------------------------------------- DDIM in two parts


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_both_parts_together_are_a_whole_run(build, k, eta):
    method = build("draft", eta=eta, backprop_steps=k)
    policy, config = method.policy, method.config
    cond = policy.backbone.encode_prompts(PROMPTS)
    sources = [tiny.draws(3).noise for _ in range(2)]
    whole = sample(policy, cond, sources[0], 5, eta, 2.0)
    trajectory = rollout_no_grad(policy, PromptBatch(PROMPTS, cond), config, k, sources[1])
    assert trajectory.noise.shape[:2] == (3, k)
    assert not trajectory.x_t.requires_grad
    with policy.merged():  # as whole runs are sampled
        assert torch.equal(rollout(policy, trajectory, config), whole)


def test_timesteps_end_at_zero_and_a_slice_of_none_does_nothing(policy):
    assert policy.backbone.path.sampling_times(5).tolist() == [801, 601, 401, 201, 1, 0]
    x_t = torch.ones(3, 4, 8, 8)
    cond = policy.backbone.encode_prompts(PROMPTS)
    assert ddim(policy, x_t, torch.tensor([1]), cond, [], eta=1.0, guidance_scale=1.0) is x_t


def test_noise_of_another_number_of_steps_is_refused(policy):
    x_t, cond = torch.ones(3, 4, 8, 8), policy.backbone.encode_prompts(PROMPTS)
    with pytest.raises(ValueError, match="zip"), torch.no_grad():
        ddim(policy, x_t, torch.tensor([201, 1, 0]), cond, [x_t], eta=1.0, guidance_scale=1.0)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("k", [1, 3, 5])
def test_only_steps_with_a_gradient_are_computed_twice(build, k):
    """Five calls, the last K of them with a graph; with checkpoints, those K again."""
    assert calls(build("draft", backprop_steps=k)) == (5, k)
    assert calls(build("draft", backprop_steps=k, checkpoint_steps=True))[0] == 5 + k


def test_the_gradient_is_the_slope_of_the_loss(build):
    """Central difference along the gradient g itself, through the whole chain: (L(w + h g) - L(w - h g)) / 2h = g g."""
    method = build("draft", backprop_steps=5)
    minibatch = first(method)
    slope = gradient(method, minibatch)
    direction = torch.split(slope / slope.norm(), [w.numel() for w in method.policy.parameters()])
    losses = []
    for h in (0.02, -0.02):
        moved = method.policy.parameters()
        for weight, part in zip(moved, direction, strict=True):
            weight.data += h * part.view_as(weight)
        losses.append(method.loss(minibatch)[0].item())
        for weight, part in zip(moved, direction, strict=True):
            weight.data -= h * part.view_as(weight)
    assert (losses[0] - losses[1]) / 0.04 == pytest.approx(slope.norm().item(), rel=0.05)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_decoder_in_half_precision_loses_no_gradient(build, checkpointed):
    """A pixel of this loss has a gradient of 1e-4 / 2,304 = 4e-8, less than the smallest float16."""
    settings = {"truncation": "fixed", "truncation_range": [0.8], "loss_coeff": 1e-4}
    method = build("alignprop", checkpoint_decoder=checkpointed, **settings)
    method.policy.backbone.vae = copy.deepcopy(method.policy.backbone.vae)
    minibatch = first(method)
    full = gradient(method, minibatch)
    method.policy.backbone.vae.to(torch.float16)
    half = gradient(method, minibatch)
    assert (half - full).norm() < 0.02 * full.norm()


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("pixels", [16**2, 2 * 16**2, 512**2])
def test_steps_and_decoder_are_checkpointed_apart(build, monkeypatch, steps, pixels):
    """Three images are decoded once, or with a checkpoint twice and a few at a time; the gradient is the same."""
    monkeypatch.setattr("attune.methods._reward_backprop.CHECKPOINTED_PIXELS", pixels)
    policy, found = build("draft").policy, {}
    for decoder in (False, True):
        method, rows = build("draft", policy, checkpoint_steps=steps, checkpoint_decoder=decoder), []
        hook = policy.backbone.vae.decoder.register_forward_pre_hook(lambda _, given, to=rows: to.append(len(given[0])))
        counted = calls(method)[0]
        hook.remove()
        found[decoder] = gradient(method, first(method))
        parts = {16**2: [1, 1, 1], 2 * 16**2: [1, 2]}.get(pixels, [3])
        assert sorted(rows) == sorted([*parts, *parts] if decoder else [3])
        assert counted == 5 + steps  # K = 1
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-7)


def test_more_steps_see_more_of_the_gradient(build):
    """The same noise, so the same image and loss; but K = 1, 3 and 5 send different gradients back."""
    policy = build("draft").policy
    methods = [build("draft", policy, backprop_steps=k) for k in (1, 3, 5)]
    losses = [method.loss(first(method))[0].item() for method in methods]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    slopes = [gradient(method, first(method)) for method in methods]
    assert (slopes[0] - slopes[1]).norm() > 0.1 * slopes[0].norm()
    assert (slopes[1] - slopes[2]).norm() > 0.1 * slopes[1].norm()


@pytest.mark.parametrize(("k", "checkpoint_steps"), [(1, False), (3, False), (5, True)])
def test_draft_is_alignprop_with_a_fixed_truncation(build, k, checkpoint_steps):
    """Bit for bit: one engine, and the loss of both is minus the mean reward."""
    policy = build("draft").policy
    settings = {"truncation": "fixed", "truncation_range": [1 - k / 5], "loss_coeff": 1}
    ours = build("draft", policy, backprop_steps=k, checkpoint_steps=checkpoint_steps)
    other = build("alignprop", policy, checkpoint_steps=checkpoint_steps, **settings)
    assert torch.equal(ours.loss(first(ours))[0], other.loss(first(other))[0])
    assert torch.equal(gradient(ours, first(ours)), gradient(other, first(other)))


# ---------------------------------------------------------------- what the reward is shown


@pytest.mark.parametrize("name", ["alignprop", "draft"])
def test_the_reward_sees_the_image_and_not_a_paler_one(build, name):
    """In [0, 1], clamped, float32. AlignProp's code halves the contrast once more: it would show 0.5 to 1."""
    method = build(name)
    minibatch = first(method)
    _, metrics = method.loss(minibatch)
    seen = method.rewards["light"].seen
    with torch.no_grad():
        decoded = method.policy.backbone.decode_latents(rollout(method.policy, minibatch, method.config))
    assert torch.equal(seen.detach(), decoded.clamp(0, 1))
    assert seen.dtype == torch.float32
    assert (seen.min(), seen.max()) == (0, 1)  # these random images leave the range on both sides
    assert metrics["clamped"].item() == pytest.approx(((decoded < 0) | (decoded > 1)).float().mean().item())
    assert metrics["clamped"] > 0


@pytest.mark.parametrize("name", FAMILY)
def test_a_scorer_without_gradient_can_be_logged_but_not_trained_on(build, name):
    method = build(name, rewards={"light": 1, "pickscore": 0})
    blind = {"light": Light(), "pickscore": Light(differentiable=False)}
    logging = FAMILY[name].Method(method.config, method.policy, blind)
    assert logging.config.trained_on == ("light",)
    _, metrics = logging.loss(first(logging))
    assert metrics["reward"].item() == metrics["reward_light"].item()
    assert blind["light"].seen.requires_grad
    assert not metrics["reward_pickscore"].requires_grad
    settings = method.config.model_copy(update={"rewards": {"pickscore": 0.1}})
    with pytest.raises(ValueError, match=r"rewards\.pickscore: no gradient .* scorers\.pickscore\.preprocess"):
        FAMILY[name].Method(settings, method.policy, blind)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("rewards", [{}, {"light": 0}])
def test_there_must_be_something_to_maximise(build, name, rewards):
    with pytest.raises(ValueError, match="rewards"):
        build(name, rewards=rewards)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alignprop", {"truncation": "uniform", "truncation_range": [0, 1]}),
        ("alignprop", {"truncation": "gaussian", "truncation_range": [0.84, 0.1]}),
        ("alignprop", {"target": 1, "checkpoint_steps": True}),
        ("draft", {"backprop_steps": 3}),
        ("draft", {"n_renoised": 2}),
        ("refl", {"truncation_range": [0.6, 1]}),
    ],
    ids=["uniform", "gaussian", "target", "draft", "draft-lv", "refl"],
)
def test_every_member_of_the_family_learns(build, new_policy, data, name, options):
    """Brightness of the same prompts and noise, before and after six updates."""
    method = build(name, new_policy(), batches=6, lr=3e-2, steps=3, guidance_scale=1, **options)
    with torch.no_grad():
        before = method.loss(first(method))[1]["reward"]
    tiny.run(method, data)
    with torch.no_grad():
        assert method.loss(first(method))[1]["reward"] > before + 0.02
