"""DDPO: advantages, loss and rollouts, by numbers worked out by hand. The authors' own step: tests/parity."""

import math

import pytest
import torch
from pydantic import ValidationError

import tiny
import tiny_flow_models
from attune.backbones import sd, sd3
from attune.config.settings import Model
from attune.data.batches import PromptBatch
from attune.diffusion.ddim import sample
from attune.diffusion.noise import Draws
from attune.diffusion.policy import Policy
from attune.distributed import Shard
from attune.methods._rewards import standardised
from attune.methods.ddpo import Config, Method, ddpo_loss, gaussian_kl
from forked import together

LOOP = {"lora": None, "lr": 1e-2, "batches": 1, "batch_size": 2}
OWN = {"rewards": {"light": 1}, "images_per_prompt": 3, "steps": 4, "minibatch_size": 24, "guidance_scale": 2}


class Light:
    """Mean brightness, without a gradient; keeps what it was shown."""

    differentiable = False

    def __init__(self):
        self.images, self.prompts = [], []

    def __call__(self, images, prompts):
        assert len(images) == len(prompts)
        assert not images.requires_grad
        self.images.append(images)
        self.prompts += prompts
        return images.mean((1, 2, 3))


def build(policy, scorers=None, **changes):
    return Method(Config(**(tiny.PLAIN | LOOP | OWN | changes)), policy, scorers or {"light": Light()})


def batch(policy, prompts=("a cat", "a dog")):
    return PromptBatch(list(prompts), policy.backbone.encode_prompts(list(prompts)))


def adapted(backbone):
    """A policy on a backbone whose adapter has moved."""
    policy = Policy(backbone, backbone.encode_prompts([""]))
    policy.add_adapter(rank=2, seed=0)
    tiny.move(policy, 0.1)
    return policy


# ---------------------------------------------------------------- advantages

ADVANTAGES = [  # rewards 1 and 5 of a, 7 and 7 of b: means 3, 7 and 5, deviations 2, 0 and sqrt(24 / 4)
    ("prompt", 2, [-1, 1, 0, 0]),
    ("prompt_mean", 2, [-2 / 6**0.5, 2 / 6**0.5, 0, 0]),
    ("batch", 2, [-4 / 6**0.5, 0, 2 / 6**0.5, 2 / 6**0.5]),
    ("prompt", 3, [-4 / 6**0.5, 0, 2 / 6**0.5, 2 / 6**0.5]),
    ("prompt_mean", 3, [-4 / 6**0.5, 0, 2 / 6**0.5, 2 / 6**0.5]),
]


@pytest.mark.parametrize(("by", "min_count", "expected"), ADVANTAGES)
def test_advantages_by_hand(by, min_count, expected):
    found = standardised(torch.tensor([1.0, 5.0, 7.0, 7.0]), ["a", "a", "b", "b"], by, min_count)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("by", ["prompt", "prompt_mean", "batch"])
@pytest.mark.parametrize("reward", [0.1, -3.3, 21.7, 1e-9])
def test_equal_rewards_have_no_advantage_at_all(by, reward):
    """The mean of three 0.1 in float32 is not 0.1, and what it is off by is more than what is added to the std."""
    assert standardised(torch.full((7,), reward), ["a"] * 3 + ["b"] * 4, by, 2).tolist() == [0] * 7


# ---------------------------------------------------------------- loss

LOSSES = [  # ratio, advantage, loss at clip 0.1, d loss / d log ratio = -A r, or 0
    (1.0, 2.0, -2.0, -2.0),
    (1.2, 1.0, -1.1, 0.0),  # likelier than the clip allows, and good: enough
    (0.8, 1.0, -0.8, -0.8),  # good, and has become less likely: is pulled back
    (1.2, -1.0, 1.2, 1.2),
    (0.8, -1.0, 0.9, 0.0),
    (0.95, 3.0, -2.85, -2.85),
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient"), LOSSES)
def test_loss_by_hand(ratio, advantage, loss, gradient):
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    found = ddpo_loss(log_ratio, torch.tensor([advantage]), clip=0.1)
    found.sum().backward()
    assert found.item() == pytest.approx(loss)
    assert log_ratio.grad.item() == pytest.approx(gradient)


def test_divergence_by_hand():
    """Means 3 apart in half of the dimensions, std 2: 9 / 8 there, and half of that in the mean."""
    mean = torch.zeros(1, 2, 4, 4)
    other = torch.cat([torch.full((1, 1, 4, 4), 3.0), torch.zeros(1, 1, 4, 4)], 1)
    assert gaussian_kl(mean, other, torch.tensor(2.0)).tolist() == pytest.approx([9 / 16])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_first_ratios_are_one_and_the_loss_is_minus_the_mean_advantage(tiny_folder, dtype):
    """To the last bit, though the adapter was merged into float32 weights for the rollout, and in half precision."""
    policy = adapted(sd.load(Model(backbone="sd", path=tiny_folder, dtype=dtype), torch.device("cpu")))
    for m in tiny.minibatches(build(policy, minibatch_size=7), batch(policy)):
        loss, metrics = build(policy).loss(m)
        assert m.advantage.abs().max() > 0.1
        assert (metrics["ratio"], metrics["approx_kl"], metrics["clipped"]) == (1, 0, 0)
        assert loss.item() == (-m.advantage).mean().item()


def test_equal_rewards_give_no_gradient(new_policy):
    policy = new_policy(moved=0.1)
    constant = {"light": lambda images, prompts: torch.full((len(images),), 0.1)}
    (m,) = tiny.minibatches(build(policy, constant), batch(policy))
    loss, _ = build(policy).loss(m)
    loss.backward()
    assert loss.item() == 0
    assert all((weight.grad == 0).all() for weight in policy.parameters())


def test_only_the_adapter_has_a_gradient_and_goodness_becomes_likelier(new_policy):
    """A small step along the gradient raises the probability of the steps of bright images, and lowers the others'."""
    policy = new_policy(moved=0.1)
    method = build(policy)
    (m,) = tiny.minibatches(method, batch(policy))
    method.loss(m)[0].backward()
    assert all((w.grad is None) != w.requires_grad for w in policy.denoiser.parameters())
    with torch.no_grad():
        for weight in policy.parameters():
            weight -= 1e-2 * weight.grad
        gain = method.log_prob(m)[0] - m.old_log_prob
    assert (gain * m.advantage).mean() > 0


# ---------------------------------------------------------------- rollouts


def drawn(policy, prompts, copies, steps=4):
    """Images of the sampler at eta 1, `copies` of each prompt, from the batch's noise."""
    noise = tiny.draws(len(prompts)).noise
    cond = policy.backbone.encode_prompts(list(prompts)).repeat(copies)
    return policy.backbone.decode_latents(sample(policy, cond, noise, steps, 1.0, 2)).clamp(0, 1)


def test_what_is_scored_is_what_the_sampler_draws(new_policy):
    """Two prompts, three images each, at once: images of a prompt take turns with those of the other."""
    policy, light = new_policy(moved=0.1), Light()
    tiny.minibatches(build(policy, {"light": light}), batch(policy))
    torch.testing.assert_close(torch.cat(light.images), drawn(policy, ["a cat", "a dog"], 3), atol=2e-5, rtol=1e-4)
    assert light.prompts == ["a cat", "a dog"] * 3


def test_steps_belong_to_their_images_and_rewards(new_policy):
    """The last state of each image is the image; its reward makes the advantage of all its steps."""
    policy = new_policy(moved=0.1)
    method = build(policy, advantages="batch", minibatch_size=100)
    with policy.merged():
        rollout = method.rollout(batch(policy), tiny.draws(2))
    images = policy.backbone.decode_latents(rollout.states[:, :, -1].flatten(0, 1)).clamp(0, 1)
    expected = standardised(images.mean((1, 2, 3)), [""] * 6, "batch", 1)
    torch.testing.assert_close(rollout.advantage.flatten(), expected, atol=1e-4, rtol=1e-4)
    assert rollout.rewards["reward"].item() == pytest.approx(images.mean().item(), abs=1e-5)
    (m,) = tiny.minibatches(method, batch(policy))
    places = {tuple(x.flatten().tolist()): (p, g, s) for (p, g, s), x in indexed(rollout.states)}
    found = [places[tuple(x.flatten().tolist())] for x in m.x_t]
    assert sorted(found) == [(p, g, s) for p in range(2) for g in range(3) for s in range(4)]
    for i, (p, g, s) in enumerate(found):
        assert torch.equal(m.x_prev[i], rollout.states[p, g, s + 1])
        assert m.t[i] == (751, 501, 251, 1)[s]
        assert m.advantage[i] == rollout.advantage[p, g]
        assert torch.equal(m.cond.tensors["prompt_embeds"][i], rollout.cond.tensors["prompt_embeds"][p])


def indexed(states):
    """Each x_t of a rollout with its place."""
    places = torch.ones(*states.shape[:2], states.shape[2] - 1).nonzero().tolist()
    return [(place, states[tuple(place)]) for place in places]


@pytest.mark.parametrize(("size", "expected"), [(2, [2, 2, 2]), (5, [4, 2]), (6, [6]), (1, [2, 2, 2])])
def test_as_many_images_are_sampled_at_a_time_as_a_minibatch_has_steps(new_policy, size, expected):
    """Two prompts, three images each: whole sets of one image of each prompt."""
    light = Light()
    tiny.minibatches(build(new_policy(), {"light": light}, minibatch_size=size), batch(new_policy()))
    assert [len(images) for images in light.images] == expected


@pytest.mark.parametrize(("fraction", "kept"), [(1.0, 4), (0.5, 2), (0.3, 1), (0.01, 1)])
def test_a_share_of_the_steps_is_trained_on(new_policy, fraction, kept):
    """Of each image other steps, none twice."""
    method = build(new_policy(), timestep_fraction=fraction, images_per_prompt=8)
    rows = method.trained_steps(tiny.draws(2))
    assert len(rows) == len(set(map(tuple, rows.tolist()))) == 16 * kept
    of_an_image = {}
    for p, g, step in rows.tolist():
        of_an_image.setdefault((p, g), set()).add(step)
    assert len(of_an_image) == 16
    assert {len(steps) for steps in of_an_image.values()} == {kept}
    assert (len(set(map(tuple, of_an_image.values()))) > 1) == (kept < 4)


def test_a_rollout_can_be_trained_on_several_times(new_policy):
    """In the second epoch the policy has moved, and the ratio is to the one that made the rollout."""
    policy, ratios = new_policy(moved=0.1), []
    method = build(policy, inner_epochs=2, minibatch_size=12, clip=0.2)
    for part in method.minibatches(batch(policy), tiny.draws(2)):
        loss, metrics = method.loss(part.rows)
        ratios.append(metrics["ratio"].item())
        if len(ratios) == 2:  # the end of the first epoch
            loss.backward()
            with torch.no_grad():
                for weight in policy.parameters():
                    weight -= 0.1 * weight.grad
    assert ratios[:2] == [1, 1]
    assert len(ratios) == 4
    assert all(0.5 < ratio < 2 and ratio != 1 for ratio in ratios[2:])


def test_advantages_are_clamped(new_policy):
    (m,) = tiny.minibatches(build(new_policy(), advantage_clip=0.25), batch(new_policy()))
    assert m.advantage.abs().max() == 0.25
    assert m.advantage.abs().min() < 0.25


def test_rewards_are_a_weighted_sum_and_weight_0_only_watches(new_policy):
    """-2 times brightness turns every advantage round, and a watched scorer may say what it likes."""
    watched = {"watched": lambda images, prompts: torch.full((len(images),), torch.inf)}
    signs = []
    for weight in (1, -2):
        scorers = {"light": Light(), **watched}
        method = build(new_policy(), scorers, rewards={"light": weight, "watched": 0}, advantages="batch")
        (m,) = tiny.minibatches(method, batch(new_policy()))
        assert m.rewards["reward"].item() == pytest.approx(weight * m.rewards["reward_light"].item())
        assert m.rewards["reward_watched"] == torch.inf
        signs.append(m.advantage)
    torch.testing.assert_close(signs[0], -signs[1], atol=1e-4, rtol=1e-3)
    assert method.config.trained_on == ("light",)
    with pytest.raises(ValidationError, match="every weight is 0"):
        Config(rewards={"light": 0})


def test_the_divergence_from_the_reference_is_asked_for_only_if_it_counts(new_policy):
    policy, asked = new_policy(moved=0.1), []
    (m,) = tiny.minibatches(build(policy), batch(policy))
    predict = policy.predict
    policy.predict = lambda *args: asked.append(args) or predict(*args)
    plain, metrics = build(policy).loss(m)
    assert "kl" not in metrics
    assert len(asked) == 1
    loss, metrics = build(policy, kl_coeff=3.0).loss(m)
    assert len(asked) == 3
    assert metrics["kl"] > 1e-6
    assert loss.item() == pytest.approx(plain.item() + 3 * metrics["kl"].item(), rel=1e-5)
    own = new_policy()
    (m,) = tiny.minibatches(build(own), batch(own))
    assert build(own, kl_coeff=3.0).loss(m)[1]["kl"] == 0


# ---------------------------------------------------------------- flow models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_step_of_a_flow_is_not_trained_on(tmp_path, dtype):
    """It adds no noise. All others have a ratio of 1 at first."""
    model = Model(
        backbone="sd3", path=tiny_flow_models.write_sd3_pipeline(tmp_path), max_sequence_length=4, dtype=dtype
    )
    policy = adapted(sd3.load(model, torch.device("cpu")))
    method = build(policy)
    (m,) = tiny.minibatches(method, batch(policy))
    assert len(m.t) == 2 * 3 * 3
    assert sorted(set(m.t.tolist()), reverse=True) == method.times[:3].tolist()
    loss, metrics = method.loss(m)
    assert (metrics["ratio"], metrics["clipped"]) == (1, 0)
    assert loss.item() == (-m.advantage).mean().item()
    with pytest.raises(ValueError, match="steps must be at least 2"):
        build(policy, steps=1)


# ---------------------------------------------------------------- several processes


def test_images_of_one_prompt_are_compared_across_processes(new_policy, tmp_path):
    """One image a row: the first and the last row show the same prompt, and two processes have one of them each."""
    policy, prompts = new_policy(moved=0.1), ["a cat", "a dog", "a cat"]

    def advantages(shard):
        policy.shard = shard
        method, own = build(policy, images_per_prompt=1, min_count=2), batch(policy, prompts[shard.rows(3)])
        return method.rollout(own, Draws.of_batch(0, 0, 3, shard)).advantage.flatten().tolist()

    alone = advantages(Shard())
    assert alone[0] == pytest.approx(-alone[2])
    assert abs(alone[0]) == pytest.approx(1, abs=1e-2)
    for found in together(2, tmp_path, advantages):
        assert found == pytest.approx(alone, abs=1e-3)
