"""AlignProp: where the gradient is cut, what the reward is shown, and what the options of the family change."""

import copy
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

import tiny
from attune.build import load_rewards, load_scorer
from attune.config import check as config
from attune.config.profile import Profile
from attune.data.batches import PromptBatch
from attune.diffusion import process
from attune.diffusion.ddim import Sampler, normal, sample
from attune.methods import alignprop
from attune.methods.alignprop import first_with_gradient, reward_loss

ROOT = Path(__file__).parents[2]
PROMPTS = ["a cat", "a dog", "two owls"]
LOOP = {"lora": None, "lr": 1e-2, "batches": 1, "batch_size": 3}


class Light:
    """Mean brightness: a reward as good as any; keeps the images it was shown."""

    def __init__(self, differentiable=True):
        self.differentiable, self.seen = differentiable, None

    def __call__(self, images, prompts):
        assert len(images) == len(prompts)
        self.seen = images
        return images.mean((1, 2, 3))


@pytest.fixture
def build(new_policy):
    """A method of five steps, the last two with a gradient; every reward it names is `Light`."""

    def build(policy=None, **changes):
        given = {"rewards": {"light": 1}, "steps": 5, "guidance_scale": 2, "cut": "fixed", "cut_at": [0.6]}
        settings = alignprop.Config(**(LOOP | given | changes))
        scorers = {name: Light() for name in settings.rewards}
        return alignprop.Method(settings, policy or new_policy(moved=0.1), scorers)

    return build


def rollout(method, seed=0):
    batch = PromptBatch(PROMPTS, method.policy.backbone.encode_prompts(PROMPTS))
    (minibatch,) = method.minibatches(batch, torch.Generator().manual_seed(seed))
    return minibatch


# ---------------------------------------------------------------- the cut


@pytest.mark.parametrize(
    ("share", "steps", "index"),
    [(0.98, 50, 49), (0.98, 10, 9), (0.84, 50, 42), (0.57, 100, 57), (0.0, 50, 0), (0.999999999, 50, 49)],
)
def test_a_fixed_cut_is_a_share_of_the_steps(share, steps, index):
    """0.57 * 100 is 56.99999999999999 in binary; 0 is the whole chain, K = N, which the authors' code cannot reach."""
    assert first_with_gradient("fixed", [share], steps, torch.Generator()) == index


def drawn(cut, cut_at, n=4000):
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([first_with_gradient(cut, cut_at, 50, generator) for _ in range(n)])


def test_a_uniform_cut_reaches_every_step():
    """Each of 50 indices has 80 of 4,000 draws, standard deviation 8.9; the fewest of 50 lie about 2.3 below."""
    counts = drawn("uniform", [0, 1]).bincount(minlength=50)
    assert len(counts) == 50
    assert counts.min() > 80 - 5 * 8.9
    assert counts.max() < 80 + 5 * 8.9


def test_a_gaussian_cut_is_the_paper_s():
    """N(42, 5) below 50: b = 1.6, phi(b) / Phi(b) = 0.1109 / 0.9452 = 0.1173, so the mean is 42 - 5 * 0.1173 = 41.41
    and, rounded down, 0.5 less; standard deviation 4.5, so 4,000 draws have an error of 0.07."""
    found = drawn("gaussian", [0.84, 0.1])
    assert found.float().mean() == pytest.approx(40.91, abs=0.3)
    assert found.max() == 49


def test_a_late_uniform_cut_is_that_of_refl():
    """ReFL draws from the last 10 of 40 steps."""
    generator = torch.Generator().manual_seed(0)
    assert {first_with_gradient("uniform", [0.75, 1], 40, generator) for _ in range(300)} == set(range(30, 40))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"cut": "gaussian", "cut_at": [0.5]}, "cut_at: gaussian takes 2 numbers"),
        ({"cut": "fixed", "cut_at": [0.5, 0.1]}, "cut_at: fixed takes 1 number,"),
        ({"cut": "fixed", "cut_at": [1.0]}, "lies outside the run"),
        ({"cut": "fixed", "cut_at": [-0.1]}, "lies outside the run"),
        ({"cut": "uniform", "cut_at": [0.5, 0.5]}, "lies outside the run"),
        ({"cut": "uniform", "cut_at": [0.5, 1.1]}, "lies outside the run"),
        ({"cut": "gaussian", "cut_at": [0.5, 7.0]}, "lies outside the run"),
        ({"loss": "distance"}, "target: loss 'distance' takes one"),
        ({"target": 10}, "target: loss 'raise' takes none"),
        ({"rewards": {"light": 0}}, "every weight is 0"),
        ({"rewards": {}}, "rewards"),
        ({"renoised": 2}, "renoised: needs cut fixed"),
        ({"renoised": 2, "cut_at": [0.8], "through": "x_0"}, "renoised: needs cut fixed"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(build, wrong, named):
    with pytest.raises(ValueError, match=named):
        build(**wrong)


# ---------------------------------------------------------------- the loss


def test_losses_by_hand():
    """r = 8, 12 and target 10: -r = -8, -12; |r - 10| = 2, 2; max(0, 10 - r) = 2, 0. HPS: |0.3 - 1| = 1 - 0.3."""
    reward = torch.tensor([8.0, 12.0])
    assert reward_loss(reward, "raise", None).tolist() == [-8, -12]
    assert reward_loss(reward, "distance", 10).tolist() == [2, 2]
    assert reward_loss(reward, "hinge", 10).tolist() == [2, 0]
    assert reward_loss(torch.tensor([0.3]), "distance", 1).item() == pytest.approx(0.7)


def test_the_loss_is_of_the_weighted_sum(build):
    """2 r - 0.5 r = 1.5 r; times 0.01, negative."""
    method = build(rewards={"a": 2, "b": -0.5})
    loss, metrics = method.loss(rollout(method))
    light = method.rewards["a"].seen.mean().item()
    assert metrics["reward_a"].item() == pytest.approx(light, rel=1e-5)
    assert metrics["reward"].item() == pytest.approx(1.5 * light, rel=1e-5)
    assert loss.item() == pytest.approx(-0.015 * light, rel=1e-5)
    assert method.trained_on == ("a", "b")


# ---------------------------------------------------------------- what the reward is shown


def test_the_reward_sees_the_image_and_not_a_paler_one(build):
    """In [0, 1], clamped, float32. The authors' code halves the contrast once more: it would show 0.5 to 1."""
    method = build()
    minibatch = rollout(method)
    _, metrics = method.loss(minibatch)
    seen = method.rewards["light"].seen
    with torch.no_grad():
        decoded = method.policy.backbone.decode_latents(method.sampler.finish(minibatch.run))
    assert torch.equal(seen.detach(), decoded.clamp(0, 1))
    assert seen.dtype == torch.float32
    assert (seen.min(), seen.max()) == (0, 1)  # these random images leave the range on both sides
    assert metrics["clamped"].item() == pytest.approx(((decoded < 0) | (decoded > 1)).float().mean().item())
    assert metrics["clamped"] > 0


def test_a_scorer_without_gradient_can_be_watched_but_not_trained_on(build):
    method = build(rewards={"light": 1, "pickscore": 0})
    blind = {"light": Light(), "pickscore": Light(differentiable=False)}
    watching = alignprop.Method(method.config, method.policy, blind)
    assert watching.trained_on == ("light",)
    loss, metrics = watching.loss(rollout(watching))
    assert loss.item() == pytest.approx(-0.01 * metrics["reward_light"].item(), rel=1e-5)
    assert blind["light"].seen.requires_grad
    assert not metrics["reward_pickscore"].requires_grad
    settings = method.config.model_copy(update={"rewards": {"pickscore": 0.1}})
    with pytest.raises(ValueError, match=r"rewards\.pickscore: no gradient .* scorers\.pickscore\.preprocess"):
        alignprop.Method(settings, method.policy, blind)


# ---------------------------------------------------------------- the chain


@pytest.mark.parametrize("left", [1, 2, 5])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_both_parts_together_are_the_sampler(new_policy, left, eta):
    policy = new_policy(moved=0.1)
    cond = policy.backbone.encode_prompts(PROMPTS)
    draws = [normal(torch.Generator().manual_seed(0)) for _ in range(2)]
    whole = sample(policy, cond, draws[0], 5, eta, 2.0)
    sampler = Sampler(policy, 5, eta, 2.0)
    run = sampler.begin(cond, draws[1], left)
    assert len(run) == left
    assert torch.equal(sampler.finish(run).detach(), whole)


def calls(method):
    """Denoiser calls of one batch, those repeated in the backward pass included, and how many of them had a graph."""
    counted = []
    hook = method.policy.denoiser.register_forward_hook(lambda *_: counted.append(torch.is_grad_enabled()))
    method.loss(rollout(method))[0].backward()
    hook.remove()
    return len(counted), sum(counted)


@pytest.mark.parametrize(("share", "k"), [(0.8, 1), (0.4, 3), (0.0, 5)])
def test_only_steps_with_a_gradient_are_computed_twice(build, share, k):
    """Five calls, the last K of them with a graph; with checkpoints, those K again."""
    assert calls(build(cut_at=[share])) == (5, k)
    assert calls(build(cut_at=[share], checkpointed=True))[0] == 5 + k


def gradient(method, minibatch):
    loss, _ = method.loss(minibatch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, method.policy.parameters())])


def test_the_gradient_is_the_slope_of_the_loss(build):
    """Central difference along the gradient g itself, through the whole chain: (L(w + h g) - L(w - h g)) / 2h = g g."""
    method = build(cut_at=[0.0], coefficient=1)
    minibatch = rollout(method)
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
    method = build(cut_at=[0.8], coefficient=1e-4, checkpointed=checkpointed)
    method.policy.backbone.vae = copy.deepcopy(method.policy.backbone.vae)
    minibatch = rollout(method)
    full = gradient(method, minibatch)
    method.policy.backbone.vae.to(torch.float16)
    half = gradient(method, minibatch)
    assert (half - full).norm() < 0.02 * full.norm()


def test_earlier_cuts_see_more_of_the_gradient(build):
    """The same noise, so the same image and loss; but K = 1, 3 and 5 send different gradients back."""
    policy = build().policy
    methods = [build(policy, cut_at=[share]) for share in (0.8, 0.4, 0.0)]
    losses = [method.loss(rollout(method))[0].item() for method in methods]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    slopes = [gradient(method, rollout(method)) for method in methods]
    assert (slopes[0] - slopes[1]).norm() > 0.1 * slopes[0].norm()
    assert (slopes[1] - slopes[2]).norm() > 0.1 * slopes[1].norm()


# ---------------------------------------------------------------- the family


def test_draft_lv_adds_copies_one_step_of_noise_away(build):
    """x_1 = sqrt(a_1) x_0 + sqrt(1 - a_1) noise, two for each image; the loss is the mean over all nine."""
    policy = build().policy
    alone, method = build(policy, cut_at=[0.8]), build(policy, cut_at=[0.8], renoised=2)
    first, more = rollout(alone), rollout(method)
    assert more.prompts == PROMPTS * 3
    assert len(more.run.cond) == 9
    assert torch.equal(more.run.x_t[:3], first.run.x_t)
    assert torch.equal(more.run.noise[:, :3], first.run.noise)
    with torch.no_grad():
        x_0 = method.sampler.finish(first.run).repeat(2, 1, 1, 1)
    a_1 = policy.backbone.alphas_cumprod[1]
    noise = (more.run.x_t[3:] - a_1.sqrt() * x_0) / (1 - a_1).sqrt()
    assert noise.std() == pytest.approx(1, abs=0.1)  # 1,536 numbers: standard error 0.018
    assert noise.mean() == pytest.approx(0, abs=0.1)
    assert not torch.equal(noise[:3], noise[3:])
    assert not more.run.x_t.requires_grad
    method.loss(more)
    assert len(method.rewards["light"].seen) == 9


def test_refl_stops_at_one_step_s_prediction(build):
    """Five steps, at t = 801, 601, 401, 201, 1; cut at the fourth: three plain calls, one with a gradient, no fifth."""
    method = build(cut_at=[0.6], through="x_0")
    assert calls(method) == (4, 1)
    minibatch = rollout(method)
    _, metrics = method.loss(minibatch)
    assert metrics["gradient_steps"] == 1
    run, t = minibatch.run, torch.tensor([201])
    with torch.no_grad():
        noise_pred = method.policy.predict_noise(run.x_t, t.expand(3), run.cond, 2.0)
        a_t = process.extract(method.policy.backbone.alphas_cumprod, t, run.x_t)
        decoded = method.policy.backbone.decode_latents(process.predict_x0(run.x_t, noise_pred, a_t))
    torch.testing.assert_close(method.rewards["light"].seen.detach(), decoded.clamp(0, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"cut": "uniform", "cut_at": [0, 1]},
        {"cut": "gaussian", "cut_at": [0.84, 0.1]},
        {"cut": "fixed", "cut_at": [0.9], "renoised": 2},
        {"cut": "uniform", "cut_at": [0.6, 1], "through": "x_0", "loss": "hinge", "target": 2},
        {"loss": "distance", "target": 1, "checkpointed": True},
    ],
    ids=["uniform", "gaussian", "draft-lv", "refl", "checkpointed"],
)
def test_every_member_of_the_family_learns(build, new_policy, data, options):
    """Brightness of the same prompts and noise, before and after six updates."""
    method = build(new_policy(), batches=6, lr=3e-2, steps=3, guidance_scale=1, **options)
    with torch.no_grad():
        before = method.loss(rollout(method))[1]["reward"]
    tiny.run(method, data)
    with torch.no_grad():
        assert method.loss(rollout(method))[1]["reward"] > before + 0.02


# ---------------------------------------------------------------- the scorers it is handed


@pytest.fixture
def profile(monkeypatch):
    monkeypatch.chdir(ROOT)
    return config.check(Profile, config.read_params("params.yaml")["profiles"]["tiny"])


@pytest.mark.parametrize("preprocess", ["tensor", "square"])
def test_training_shows_images_with_a_gradient_where_evaluation_has_none(profile, preprocess):
    """HPSv2's own preprocessing has a gradient and is kept unless told otherwise; the oracle has no other."""
    names = ("pickscore", "hpsv2", "aesthetic", "oracle")
    block = {"rewards": dict.fromkeys(names, 1), "preprocess": preprocess, "steps": 5, "guidance_scale": 1}
    found = load_rewards(alignprop.Config(**LOOP, **block), profile)
    assert [found[name].differentiable for name in names] == [True, True, True, False]
    blocks = [profile.scorers["hpsv2"] | {"preprocess": shown} for shown in ("hps", "square")]
    padded, squeezed = (
        load_scorer("hpsv2", profile.model_copy(update={"scorers": {"hpsv2": block}})) for block in blocks
    )
    wide = torch.rand(1, 3, 20, 40, generator=torch.Generator().manual_seed(0))
    scores = [scorer(wide, ["a red circle"]).item() for scorer in (found["hpsv2"], padded, squeezed)]
    assert scores[1] != scores[2]
    assert scores[0] == scores[1 if preprocess == "tensor" else 2]
    assert "preprocess" not in profile.scorers["pickscore"]  # so that evaluation shows them as published


def test_a_reward_that_is_no_scorer_is_named_before_torch_is_loaded(profile, tmp_path):
    values = config.read_params("params.yaml")
    values["profiles"]["tiny"]["methods"]["alignprop"]["rewards"] = {"pickscor": 1}
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(values, file)
    with pytest.raises(config.ConfigError, match=r"tiny\.methods\.alignprop\.rewards: 'pickscor' is not .* pickscore"):
        config.load(tmp_path / "params.yaml")
