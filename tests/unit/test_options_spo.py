"""Options of SPO: which steps branch, what is compared with what, and the loss, by numbers worked out by hand."""

import math

import pytest
import torch

import tiny
from attune.methods.spo import Config, Method, StepPairs, spo_loss

LOOP = {"lora": None, "lr": 1e-3, "batches": 1, "batch_size": 2}
OWN = {"candidates": 2, "threshold": 0.0, "steps": 5, "start_step": 1, "minibatch_size": 4, "guidance_scale": 1.0}


def build(policy, judge=tiny.brightness, **changes):
    return Method(Config(**(tiny.PLAIN | LOOP | OWN | changes)), policy, judge)


def rollout(method, data, prompts=(0, 1), seed=0):
    noise = tiny.draws(len(prompts), seed).noise
    return method.rollout(data.prompt_batch(list(prompts)), noise, lambda k, n: torch.zeros(n).long())


class Judge:
    """Bright images are good; notes the time and the number of images of every call."""

    def __init__(self):
        self.calls = []

    def __call__(self, images, prompts, t):
        assert len(images) == len(prompts) == len(t)
        self.calls.append((t[0].item(), len(images)))
        return tiny.brightness(images, prompts, t)


# ---------------------------------------------------------------- which steps branch

# steps 5 visit 801, 601, 401, 201, 1; steps 8 visit 876, 751, 626, 501, 376, 251, 126, 1
BRANCHING = [
    ({"start_step": 0}, [601, 401, 201, 1, 0], [801, 601, 401, 201, 1]),
    ({"start_step": 1}, [401, 201, 1, 0], [601, 401, 201, 1]),
    ({"start_step": 4}, [0], [1]),
    ({"start_step": 1, "inner_steps": 1}, [201, 0], [601, 401, 201, 1]),
    ({"start_step": 2, "inner_steps": 1}, [1, 0], [401, 201, 1]),
    ({"start_step": 1, "inner_steps": 2}, [1, 0], [601, 401, 201, 1]),
    ({"start_step": 2, "inner_steps": 2, "steps": 8}, [251, 0], [626, 501, 376, 251, 126, 1]),
    ({"start_step": 3, "inner_steps": 3, "steps": 8}, [1, 0], [501, 376, 251, 126, 1]),
]


@pytest.mark.parametrize(("options", "judged_at", "steps"), BRANCHING, ids=str)
def test_branching_is_counted_from_the_first_step_with_candidates(policy, data, options, judged_at, steps):
    """A segment is a step that branches and `inner_steps` more; it is judged where the next one begins, or at 0."""
    judge = Judge()
    pairs = rollout(build(policy, judge, **options), data)
    assert judge.calls == [(t, 2 * 2) for t in judged_at]
    assert pairs.t.tolist() == [t for t in steps for _ in range(2)]


@pytest.mark.parametrize(("start", "parted"), [(1, [401, 1]), (2, [201]), (3, [1])])
def test_candidates_share_the_state_that_they_branch_off(policy, data, start, parted):
    """With one inner step, chosen and rejected start apart in every second step after `start_step`, in no other."""
    pairs = rollout(build(policy, start_step=start, inner_steps=1), data)
    chosen, rejected = pairs.x_t.chunk(2)
    apart = (chosen != rejected).flatten(1).any(1)
    assert sorted(set(pairs.t[apart].tolist()), reverse=True) == parted
    assert not set(pairs.t[~apart].tolist()) & set(parted)


@pytest.mark.parametrize("candidates", [2, 3, 5])
def test_candidates_are_as_many_as_asked_and_the_extremes_of_them_are_compared(policy, data, candidates):
    judge, scores = Judge(), []

    def remembered(images, prompts, t):
        scores.append(judge(images, prompts, t))
        return scores[-1]

    pairs = rollout(build(policy, remembered, start_step=4, candidates=candidates), data)
    assert judge.calls == [(0, 2 * candidates)]
    found = scores[0].unflatten(0, (candidates, 2))
    for side, wanted in ((pairs.chosen, found.max(0)), (pairs.rejected, found.min(0))):
        own = tiny.brightness(policy.backbone.decode_latents(side), ["", ""], torch.zeros(2))
        torch.testing.assert_close(own, wanted.values)


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, [0, 1, 2]), (0.4, [1, 2]), (0.5, [2])])
def test_a_pair_is_kept_if_the_softmax_gap_exceeds_the_threshold(policy, data, threshold, kept):
    """Gaps of 0.5, 1 and 2 between two candidates: tanh of half of them is 0.245, 0.462 and 0.762."""
    given = torch.tensor([0.5, 1.0, 2.0, 0, 0, 0])
    method = build(policy, lambda *_: given, start_step=4, threshold=threshold)
    found = rollout(method, data, prompts=(0, 1, 2))
    (name,) = found.cond.tensors
    assert torch.equal(found.cond.tensors[name], data.prompt_batch([0, 1, 2]).cond.tensors[name][kept])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_guidance_is_that_of_the_rollout_and_of_the_loss(policy, data, guidance_scale):
    """Both ask for it in every prediction; where it is off nothing is predicted without the prompt."""
    method, asked = build(policy, guidance_scale=guidance_scale), []
    predict = policy.predict
    policy.predict = lambda x_t, t, cond, w=1.0: asked.append(w) or predict(x_t, t, cond, w)
    pairs = rollout(method, data)
    assert asked == [guidance_scale] * 5
    method.loss(pairs)
    assert asked == [guidance_scale] * 7  # one of the policy, one of the reference


@pytest.mark.parametrize(("size", "lengths"), [(3, [3, 3, 2]), (8, [8]), (100, [8]), (1, [1] * 8)])
def test_minibatches_have_the_size_that_is_asked_for(policy, data, size, lengths):
    """Two prompts, four steps with candidates: eight pairs."""
    method = build(policy, minibatch_size=size)
    found = tiny.minibatches(method, data.prompt_batch([0, 1]))
    assert [len(minibatch) for minibatch in found] == lengths


def test_pairs_are_shuffled_by_the_batchs_generator(policy, data):
    method = build(policy, minibatch_size=8)
    orders = []
    for seed in (0, 0, 1):
        (found,) = tiny.minibatches(method, data.prompt_batch([0, 1]), seed)
        orders.append(found.t.tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) != orders[0] != sorted(orders[0], reverse=True)
    assert sorted(orders[0]) == [1, 1, 201, 201, 401, 401, 601, 601]


@pytest.mark.parametrize("continuation", ["chosen", "rejected", "random"])
def test_the_candidate_that_continues(policy, data, continuation):
    """The next step starts from the candidate that was preferred, the one that was not, or number 0."""
    pairs = rollout(build(policy, continuation=continuation, candidates=2, steps=3, start_step=1), data)
    first, second = pairs.t == pairs.t.max(), pairs.t == pairs.t.min()
    sides = {"chosen": pairs.chosen[first], "rejected": pairs.rejected[first]}
    following = pairs.x_t[second]
    if continuation in sides:
        assert torch.equal(following, sides[continuation])
        return
    is_either = [(following == side).flatten(1).all(1) for side in sides.values()]
    assert (is_either[0] ^ is_either[1]).all()


# ---------------------------------------------------------------- the loss


def step_of(policy, x_t, t, x_prev, steps, cond):
    """Log density per latent dimension of a step at eta 1, written out from eq. 12 and 16 of DDIM."""
    schedule = policy.backbone.path.alphas_cumprod.double()
    a_t, a_prev = (schedule[i].view(-1, 1, 1, 1) for i in (t, (t - 1000 // steps).clamp(min=0)))
    predicted = policy.predict(x_t, t, cond).double()
    variance = (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)
    x_0 = (x_t - (1 - a_t).sqrt() * predicted) / a_t.sqrt()
    mean = a_prev.sqrt() * x_0 + (1 - a_prev - variance).sqrt() * predicted
    density = -((x_prev - mean) ** 2) / (2 * variance) - variance.log() / 2 - math.log(2 * math.pi) / 2
    return density.mean((1, 2, 3))


@pytest.mark.parametrize(("beta", "clip"), [(10.0, 0.1), (4.0, 0.1), (10.0, 0.003)])
def test_beta_and_clip_by_the_formula(new_policy, data, beta, clip):
    policy = new_policy(moved=0.05)
    method = build(policy, beta=beta, clip=clip)
    pairs = rollout(method, data)
    with torch.no_grad():
        sides = [step_of(policy, pairs.x_t, pairs.t, x, 5, pairs.cond) for x in (pairs.chosen, pairs.rejected)]
        with policy.reference():
            before = [step_of(policy, pairs.x_t, pairs.t, x, 5, pairs.cond) for x in (pairs.chosen, pairs.rejected)]
    ratios = [(side - reference).exp() for side, reference in zip(sides, before, strict=True)]
    kept = [ratio.clamp(1 - clip, 1 + clip).log() for ratio in ratios]
    loss, metrics = method.loss(pairs)
    expected = torch.nn.functional.softplus(-beta * (kept[0] - kept[1])).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    margin = beta * (ratios[0].log() - ratios[1].log())  # of the ratios as they are, not as they are clipped
    assert metrics["margin"].item() == pytest.approx(margin.mean().item(), rel=2e-2, abs=1e-4)
    assert metrics["clipped"].item() == pytest.approx(((ratios[0] - 1).abs() > clip).float().mean().item())
    assert metrics["ratio_chosen"].item() == pytest.approx(ratios[0].mean().item(), rel=1e-4)
    assert metrics["ratio_rejected"].item() == pytest.approx(ratios[1].mean().item(), rel=1e-4)


def test_the_loss_by_hand_with_another_beta_and_clip():
    """Ratios 1.3 and 0.9 at clip 0.2 and beta 2: log(1 + (0.9 / 1.2)^2) = log 1.5625."""
    ratios = [torch.tensor([r]).log() for r in (1.3, 0.9)]
    assert spo_loss(*ratios, beta=2.0, clip=0.2).item() == pytest.approx(math.log(1.5625))


def test_accuracy_at_the_reference_is_0(policy, data):
    """No side has become likelier than the other; and a policy that has moved is right of some."""
    method = build(policy)
    assert method.loss(rollout(method, data))[1]["accuracy"] == 0


def test_accuracy_is_the_share_of_positive_margins(new_policy, data):
    policy = new_policy(moved=0.05)
    method = build(policy)
    pairs = rollout(method, data, prompts=range(8))
    _, metrics = method.loss(pairs)
    turned = StepPairs(pairs.x_t, pairs.rejected, pairs.chosen, pairs.t, pairs.cond)
    _, mirrored = method.loss(turned)
    assert 0 < metrics["accuracy"] < 1
    assert (metrics["accuracy"] + mirrored["accuracy"]).item() == pytest.approx(1)
    assert metrics["margin"].item() == pytest.approx(-mirrored["margin"].item(), rel=1e-5)
