"""SPO's own parts: who is compared, what a step pair is, the loss. The authors' rollouts: tests/parity."""

import math

import pytest
import torch
from pydantic import ValidationError

import tiny
from attune.interfaces import Conditioning
from attune.methods.spo import Config, Method, StepPairs, compare, spo_loss

LN_2 = math.log(2)


def config(**changes):
    own = {"beta": 10.0, "clip": 0.1, "candidates": 3, "threshold": 0.0, "steps": 5, "start_step": 2}
    loop = {"lora": None, "lr": 1e-3, "batches": 2, "batch_size": 2, "minibatch_size": 4, "guidance_scale": 2.0}
    return Config(**(tiny.PLAIN | own | loop | changes))


@pytest.fixture
def batch(data):
    return data.prompt_batch([0, 1])


def choose(k, n):
    return torch.arange(n) % k


def rollout(method, batch, seed=0):
    return method.rollout(batch, tiny.draws(len(batch.prompts), seed).noise, choose)


# ---------------------------------------------------------------- compare


def test_compare_by_hand():
    """Column 0: 2 - 0 = 2, gap tanh 1 = 0.762; column 1: best is candidate 2, 0.5 over candidate 1."""
    best, worst, confident = compare(torch.tensor([[0.0, 0.1], [2.0, 0.0], [1.0, 0.5]]), threshold=0.3)
    assert best.tolist() == [1, 2]
    assert worst.tolist() == [0, 1]
    assert confident.tolist() == [True, False]


@pytest.mark.parametrize("d", [0.1, 1.0, 5.0])
def test_the_gap_is_the_softmax_gap_of_the_extremes(d):
    """softmax(d, 0) = (1, e^-d) / (1 + e^-d); the difference is tanh(d / 2). The middle does not count."""
    gap = (1 - math.exp(-d)) / (1 + math.exp(-d))
    scores = torch.tensor([[d], [d / 2], [0.0]])
    assert compare(scores, gap - 1e-6)[2].item()
    assert not compare(scores, gap + 1e-6)[2].item()


def test_the_threshold_is_strict():
    scores = torch.tensor([[1.0], [0.0]])
    gap = torch.tanh(torch.tensor(0.5)).item()
    assert not compare(scores, gap)[2].item()
    assert compare(scores, math.nextafter(gap, 0) - 1e-7)[2].item()
    assert not compare(torch.zeros(4, 1), 0.0)[2].item()  # a full tie is never kept


# ---------------------------------------------------------------- loss


def test_loss_by_hand():
    """Ratios 1.05 and 0.95, inside the clip: -ln sigmoid(10 ln(1.05 / 0.95)) = ln(1 + (0.95 / 1.05)^10)."""
    loss = spo_loss(torch.tensor([1.05]).log(), torch.tensor([0.95]).log(), beta=10, clip=0.1)
    assert loss.item() == pytest.approx(math.log(1 + (0.95 / 1.05) ** 10))


def test_loss_is_bounded_by_the_clip():
    """At best 1.1 / 0.9: ln(1 + (9 / 11)^10); at worst the other way round."""
    far = torch.tensor([50.0, -50.0])
    loss = spo_loss(far, -far, beta=10, clip=0.1)
    assert loss.tolist() == pytest.approx([math.log(1 + (9 / 11) ** 10), math.log(1 + (11 / 9) ** 10)])


def test_a_side_outside_the_clip_gets_no_gradient():
    """Even where it moved the wrong way; the other side is still pulled."""
    chosen = torch.tensor([1.2, 0.8, 1.05]).log().requires_grad_()
    rejected = torch.tensor([1.0, 1.0, 1.0]).log().requires_grad_()
    spo_loss(chosen, rejected, beta=10, clip=0.1).sum().backward()
    assert chosen.grad[:2].tolist() == [0, 0]
    assert chosen.grad[2] < 0
    assert (rejected.grad > 0).all()


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_at_the_reference_ratios_are_one_and_the_loss_is_ln_2(policy, batch, inner_steps):
    method = Method(config(inner_steps=inner_steps), policy, tiny.brightness)
    pairs = rollout(method, batch)
    loss, metrics = method.loss(pairs)
    assert metrics["ratio_chosen"] == metrics["ratio_rejected"] == 1
    assert metrics["margin"] == metrics["clipped"] == 0
    assert loss.item() == pytest.approx(LN_2, abs=1e-7)
    loss.backward()
    assert sum(weight.grad.abs().sum() for weight in policy.parameters()) > 0


# ---------------------------------------------------------------- step pairs


def step_pairs(n, shared, start=0.0):
    rows = start + torch.arange(n * 1.0).reshape(n, 1, 1, 1)
    x_t = rows if shared else torch.cat([rows + 0.1, rows + 0.2])
    cond = Conditioning({"prompt_embeds": rows})
    return StepPairs(x_t, rows + 0.3, rows + 0.4, rows.flatten().long(), cond)


def columns(pairs):
    sides = pairs.x_t.flatten().tolist(), pairs.chosen.flatten().tolist(), pairs.rejected.flatten().tolist()
    return *(pytest.approx(side) for side in sides), pairs.t.tolist(), len(pairs.cond)


def test_indexing_where_x_t_is_shared():
    pairs = step_pairs(4, shared=True)[torch.tensor([3, 1])]
    assert columns(pairs) == ([3, 1], [3.3, 1.3], [3.4, 1.4], [3, 1], 2)


def test_indexing_where_x_t_is_not_shared():
    """x_t holds all of the chosen side, then all of the rejected one."""
    pairs = step_pairs(4, shared=False)[torch.tensor([3, 1])]
    assert columns(pairs) == ([3.1, 1.1, 3.2, 1.2], [3.3, 1.3], [3.4, 1.4], [3, 1], 2)


def test_joining():
    shared = StepPairs.cat([step_pairs(1, True), step_pairs(2, True, start=5)])
    assert columns(shared) == ([0, 5, 6], [0.3, 5.3, 6.3], [0.4, 5.4, 6.4], [0, 5, 6], 3)
    apart = StepPairs.cat([step_pairs(1, False), step_pairs(2, False, start=5)])
    assert columns(apart)[0] == [0.1, 5.1, 6.1, 0.2, 5.2, 6.2]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_joining_with_a_step_of_which_nothing_was_kept(place):
    """An empty part tells nothing about whether x_t is shared; wherever it stands, the sides stay apart."""
    parts = [step_pairs(1, False), step_pairs(2, False, start=5)]
    parts.insert(place, step_pairs(3, False)[torch.tensor([], dtype=torch.long)])
    joined = StepPairs.cat(parts)
    assert columns(joined)[0] == [0.1, 5.1, 6.1, 0.2, 5.2, 6.2]
    assert joined.t.tolist() == [0, 5, 6]


# ---------------------------------------------------------------- rollout


def test_every_step_of_every_prompt_makes_a_pair_if_the_preference_model_is_confident(policy, batch):
    """5 steps, 2 without: candidates of the steps from 401, 201 and 1, scored at 201, 1 and 0."""
    seen = []

    def preference_model(images, prompts, t):
        assert images.shape == (len(prompts), 3, 16, 16)  # candidate by candidate, so that prompts take turns
        seen.append((t[0].item(), list(prompts)))
        assert (t == t[0]).all()
        return tiny.brightness(images, prompts, t)

    pairs = rollout(Method(config(), policy, preference_model), batch)
    assert seen == [(t, list(batch.prompts) * 3) for t in (201, 1, 0)]
    assert pairs.t.tolist() == [401, 401, 201, 201, 1, 1]
    assert pairs.x_t.shape == pairs.chosen.shape == pairs.rejected.shape == (6, 4, 8, 8)
    assert (pairs.chosen - pairs.rejected).flatten(1).abs().amax(1).min() > 0


def test_many_images_are_judged_in_parts(policy, batch, monkeypatch):
    """Six images of three candidates, at most four at a time; the pairs are those of one call."""
    whole, sizes = rollout(Method(config(), policy, tiny.brightness), batch), []
    monkeypatch.setattr("attune.methods.spo.JUDGED_AT_ONCE", 4)

    def preference_model(images, prompts, t):
        assert len(images) == len(prompts) == len(t)
        sizes.append(len(images))
        return tiny.brightness(images, prompts, t)

    parts = rollout(Method(config(), policy, preference_model), batch)
    assert sizes == [4, 2] * 3
    assert torch.equal(parts.chosen, whole.chosen)
    assert torch.equal(parts.rejected, whole.rejected)


def test_the_chosen_candidate_is_the_one_that_scores_higher(policy, batch):
    """At the last step a candidate itself is decoded and scored."""
    pairs = rollout(Method(config(), policy, tiny.brightness), batch)
    chosen, rejected = (
        tiny.brightness(policy.backbone.decode_latents(x[-2:]), batch.prompts, torch.zeros(2))
        for x in (pairs.chosen, pairs.rejected)
    )
    assert (chosen > rejected).all()


def test_the_next_state_does_not_depend_on_the_scores(policy, batch):
    """The next x_t is the candidate that was drawn, not the winner."""
    following = []
    for preference_model in (tiny.brightness, lambda *args: -tiny.brightness(*args)):
        pairs = rollout(Method(config(), policy, preference_model), batch)
        following.append(pairs)
    assert torch.equal(following[0].x_t, following[1].x_t)
    assert torch.equal(following[0].chosen, following[1].rejected)


def test_with_inner_steps_the_sides_part_after_the_first(policy, batch):
    """Segments of 2 steps: (401, 201) scored at 1, and (1,) scored at 0."""
    pairs = rollout(Method(config(inner_steps=1), policy, tiny.brightness), batch)
    assert pairs.t.tolist() == [401, 401, 201, 201, 1, 1]
    chosen, rejected = pairs.x_t.chunk(2)
    assert [bool((a != b).any()) for a, b in zip(chosen, rejected, strict=True)] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert torch.equal(chosen[2:4], pairs.chosen[:2])  # the second step starts where the first arrived
    assert torch.equal(rejected[2:4], pairs.rejected[:2])


def test_minibatches_hold_every_pair_once(policy, batch):
    method = Method(config(minibatch_size=4), policy, tiny.brightness)
    parts = tiny.minibatches(method, batch, 1)
    assert [len(part.t) for part in parts] == [4, 2]
    whole = method.rollout(batch, tiny.draws(2, 1).noise, lambda k, n: torch.zeros(n).long())
    assert len({tuple(x.flatten().tolist()) for part in parts for x in part.chosen}) == len(whole.t)


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_without_a_confident_pair_there_is_no_minibatch_and_no_step(policy, data, inner_steps):
    method = Method(
        config(threshold=0.5, inner_steps=inner_steps),
        policy,
        lambda images, prompts, t: torch.zeros(len(images)),
    )
    before = tiny.adapter(policy)
    assert tiny.run(method, data) == []
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_both_sides_share_one_forward_where_they_share_x_t(policy, batch, inner_steps):
    method = Method(config(inner_steps=inner_steps, guidance_scale=1.0), policy, tiny.brightness)
    pairs, rows = rollout(method, batch), []
    hook = policy.denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    method.loss(pairs)
    hook.remove()
    assert rows == [6 * (1 + inner_steps)] * 2  # policy and reference


def test_a_rollout_without_candidates_is_refused():
    with pytest.raises(ValidationError, match="start_step must be less than steps"):
        config(start_step=5)


# ---------------------------------------------------------------- which candidate continues


def brightest(images, prompts, t):
    return 100 * images.mean((1, 2, 3))


def final_brightness(policy, batch, continuation):
    """Mean brightness of what the rollout ends in: the last step's chosen and rejected candidates."""
    method = Method(config(continuation=continuation, candidates=4, steps=8, start_step=1), policy, brightest)
    pairs = rollout(method, batch)
    last = pairs.t == pairs.t.min()
    latents = torch.cat([pairs.chosen[last], pairs.rejected[last]])
    return policy.backbone.decode_latents(latents).mean().item()


def test_continuing_from_the_best_leads_to_higher_scores(policy, batch):
    """Scored by brightness, the three continuations end in that order, and a random one in between."""
    ends = [final_brightness(policy, batch, name) for name in ("rejected", "random", "chosen")]
    assert ends[0] < ends[1] < ends[2]


def test_no_random_number_is_drawn_where_chance_has_no_say(policy, batch):
    def never(k, n):
        raise AssertionError

    method = Method(config(continuation="chosen"), policy, tiny.brightness)
    method.rollout(batch, tiny.draws(2).noise, never)
