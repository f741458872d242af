"""AlignProp: how the truncation is drawn, the loss of the weighted sum of scores, and the scorers it is given."""

from pathlib import Path

import pytest
import torch

import params
import tiny
from attune.build import load_rewards, load_scorer
from attune.data.batches import PromptBatch
from attune.methods import alignprop
from attune.methods.alignprop import reward_loss, truncation_step

ROOT = Path(__file__).parents[2]
PROMPTS = ["a cat", "a dog", "two owls"]


class Light:
    """Mean brightness."""

    differentiable = True

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


def settings(**changes):
    """Five steps, the last two with a gradient."""
    loop = {"lora": None, "lr": 1e-2, "batches": 1, "batch_size": 3}
    own = {"rewards": {"light": 1}, "steps": 5, "guidance_scale": 2, "truncation": "fixed", "truncation_range": [0.6]}
    return alignprop.Config(**(tiny.PLAIN | loop | own | changes))


# ---------------------------------------------------------------- the truncation


def drawn(truncation, truncation_range, n=4000):
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([truncation_step(truncation, truncation_range, 50, generator) for _ in range(n)])


def test_a_fixed_truncation_is_a_share_of_the_steps():
    """0 is the whole chain, K = N, which the authors' code cannot reach."""
    assert drawn("fixed", [0.98], 1).tolist() == [49]
    assert drawn("fixed", [0.0], 1).tolist() == [0]


def test_a_uniform_truncation_reaches_every_step():
    """Each of 50 indices has 80 of 4,000 draws, standard deviation 8.9; the fewest of 50 lie about 2.3 below."""
    counts = drawn("uniform", [0, 1]).bincount(minlength=50)
    assert len(counts) == 50
    assert counts.min() > 80 - 5 * 8.9
    assert counts.max() < 80 + 5 * 8.9


def test_a_gaussian_truncation_is_the_paper_s():
    """N(42, 5) below 50: b = 1.6, phi(b) / Phi(b) = 0.1109 / 0.9452 = 0.1173, so the mean is 42 - 5 * 0.1173 = 41.41
    and, rounded down, 0.5 less; standard deviation 4.5, so 4,000 draws have an error of 0.07."""
    found = drawn("gaussian", [0.84, 0.1])
    assert found.float().mean() == pytest.approx(40.91, abs=0.3)
    assert found.max() == 49


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"truncation": "gaussian", "truncation_range": [0.5]}, "truncation_range: gaussian takes 2 numbers"),
        ({"truncation": "fixed", "truncation_range": [0.5, 0.1]}, "truncation_range: fixed takes 1 number,"),
        ({"truncation": "fixed", "truncation_range": [1.0]}, "lies outside the run"),
        ({"truncation": "fixed", "truncation_range": [-0.1]}, "lies outside the run"),
        ({"truncation": "uniform", "truncation_range": [0.5, 0.5]}, "lies outside the run"),
        ({"truncation": "uniform", "truncation_range": [0.5, 1.1]}, "lies outside the run"),
        ({"truncation": "gaussian", "truncation_range": [0.5, 7.0]}, "lies outside the run"),
    ],
)
def test_a_truncation_outside_the_run_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        settings(**wrong)


# ---------------------------------------------------------------- the loss


def test_losses_by_hand():
    """r = 8, 12: with target 10, |r - 10| = 2, 2; without one, -r = -8, -12. HPS: |0.3 - 1| = 1 - 0.3."""
    reward = torch.tensor([8.0, 12.0])
    assert reward_loss(reward, None).tolist() == [-8, -12]
    assert reward_loss(reward, 10).tolist() == [2, 2]
    assert reward_loss(torch.tensor([0.3]), 1).item() == pytest.approx(0.7)


def test_the_loss_is_of_the_weighted_sum(new_policy):
    """2 r - 0.5 r = 1.5 r; times 0.01, negative."""
    policy = new_policy(moved=0.1)
    method = alignprop.Method(settings(rewards={"a": 2, "b": -0.5}, target=None), policy, {"a": Light(), "b": Light()})
    batch = PromptBatch(PROMPTS, policy.backbone.encode_prompts(PROMPTS))
    (minibatch,) = tiny.minibatches(method, batch)
    loss, metrics = method.loss(minibatch)
    light = metrics["reward_a"].item()
    assert metrics["reward"].item() == pytest.approx(1.5 * light, rel=1e-5)
    assert loss.item() == pytest.approx(-0.015 * light, rel=1e-5)
    assert metrics["gradient_steps"] == 2
    assert method.config.trained_on == ("a", "b")


# ---------------------------------------------------------------- the scorers it is given


@pytest.fixture
def scorers(monkeypatch):
    """The scorers of the profile tiny."""
    monkeypatch.chdir(ROOT)
    return params.scorers(params.shipped()[1])


@pytest.mark.parametrize("preprocess", ["tensor", "square"])
def test_training_shows_images_with_a_gradient_where_evaluation_has_none(scorers, preprocess):
    """HPSv2's own preprocessing has a gradient and is kept unless told otherwise; the oracle has no other."""
    names = ("pickscore", "hpsv2", "aesthetic", "oracle")
    block = {"rewards": dict.fromkeys(names, 1), "preprocess": preprocess, "steps": 5, "guidance_scale": 1}
    found = load_rewards(alignprop.Config(**block), scorers)
    assert [found[name].differentiable for name in names] == [True, True, True, False]
    hps = scorers["hpsv2"]
    blocks = [{**hps.settings, "preprocess": shown} for shown in ("hps", "square")]
    padded, squeezed = (load_scorer(hps.model_copy(update={"settings": block})) for block in blocks)
    wide = torch.rand(1, 3, 20, 40, generator=torch.Generator().manual_seed(0))
    scores = [scorer(wide, ["a red circle"]).item() for scorer in (found["hpsv2"], padded, squeezed)]
    assert scores[1] != scores[2]
    assert scores[0] == scores[1 if preprocess == "tensor" else 2]
    assert "preprocess" not in scorers["pickscore"].settings  # so that evaluation shows them as published
