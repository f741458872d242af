"""Groups of a prompt's images, and the losses of their scores."""

import math

import pandas as pd
import pytest
import torch

import tiny
from attune.data.rows import SourceError
from attune.data.store import groups_of, scored_images
from attune.diffusion.losses import preference_loss
from attune.methods import listwise

SETTINGS = tiny.PLAIN | {"lr": 1e-3, "batches": 3, "batch_size": 4, "lora": {"rank": 2}}


def pairs() -> pd.DataFrame:
    """Prompt 0 has images 4, 1 and 2 in three pairs, prompt 1 images 7 and 8, prompt 2 one image twice."""
    rows = [(0, 4, 1), (0, 1, 2), (0, 4, 2), (1, 8, 7), (2, 9, 9)]
    first, second = ([row[i] for row in rows] for i in (1, 2))
    return pd.DataFrame(
        {
            "prompt": [f"p{row[0]}" for row in rows],
            "prompt_row": [row[0] for row in rows],
            "image_0": first,
            "image_1": second,
            "label_0": 1.0,
            "good_0": [i / 10 for i in first],
            "good_1": [i / 10 for i in second],
            "split": "train",
        }
    )


def test_every_image_of_a_prompt_is_there_once_with_its_score():
    found = scored_images(pairs())
    assert list(found.columns) == ["prompt", "prompt_row", "image", "good"]
    assert found.prompt_row.tolist() == [0, 0, 0, 1, 1, 2]
    assert found.image.tolist() == [1, 2, 4, 7, 8, 9]
    assert found.good.tolist() == pytest.approx([0.1, 0.2, 0.4, 0.7, 0.8, 0.9])
    assert [part.tolist() for part in groups_of(found.prompt_row, 4)] == [[0, 1, 2], [3, 4]]


def test_single_images_are_groups_too():
    table = pd.DataFrame(
        {"prompt": ["a", "b", "a"], "prompt_row": [0, 1, 0], "image": [2, 1, 0], "liked": True, "split": "train"}
    ).assign(good=[0.2, 0.1, 0.0])
    found = scored_images(table)
    assert found.to_dict("list") == {
        "prompt": ["a", "a", "b"],
        "prompt_row": [0, 0, 1],
        "image": [0, 2, 1],
        "good": [0, 0.2, 0.1],
    }
    assert [part.tolist() for part in groups_of(found.prompt_row, 4)] == [[0, 1]]


@pytest.mark.parametrize(("count", "most"), [(2, 3), (3, 3), (4, 3), (5, 3), (7, 3), (9, 4), (10, 4), (100, 7)])
def test_no_image_is_left_out_or_alone(count, most):
    parts = groups_of(pd.Series([5] * count), most)
    assert sorted(row for part in parts for row in part) == list(range(count))
    assert all(2 <= len(part) <= most for part in parts)


def test_without_two_images_of_a_prompt_there_is_nothing_to_compare():
    with pytest.raises(SourceError, match="no prompt has two images"):
        groups_of(pd.Series([0, 1, 2]), 4)


def test_a_batch_holds_the_images_of_each_prompt_side_by_side(data):
    n, draw = data.rows_for("groups", 4)
    batch = draw([0, n - 1])
    assert batch.sizes == [3, 3]  # of six images two groups
    assert batch.prompt_rows.tolist() == [0, 0, 0, 1, 1, 1]
    assert list(batch.prompts) == [tiny.PROMPTS[0], tiny.PROMPTS[-1]]
    assert len(batch.latents) == len(batch.scores_by("pickscore")) == 6
    assert torch.equal(batch.latents[:3], data.latents[:3])
    with pytest.raises(ValueError, match="no scores by 'hpsv2'"):
        batch.scores_by("hpsv2")


def test_images_of_a_prompt_share_timestep_noise_and_caption(new_policy, data):
    method = listwise.Method(listwise.Config(**SETTINGS), new_policy())
    (minibatch,) = tiny.minibatches(method, data.rows_for("groups")[1]([0, 5]))
    for side in (slice(0, 3), slice(3, 6)):
        assert len(minibatch.noised.t[side].unique()) == 1
        assert all(torch.equal(minibatch.noised.noise[side][0], other) for other in minibatch.noised.noise[side])
    assert minibatch.noised.t[0] != minibatch.noised.t[3]
    assert len(minibatch.noised.cond) == 6


REWARDS = torch.tensor([0.3, 2.0, -1.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_lair_begins_at_0_and_pulls_by_its_weights(temperature):
    s = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    loss = listwise.lair_loss(s, REWARDS, temperature, 50.0)
    (gradient,) = torch.autograd.grad(loss, s)
    weight = torch.softmax(REWARDS / temperature, 0) - 1 / 4
    assert loss.item() == 0
    assert weight.sum().abs() < 1e-15
    torch.testing.assert_close(gradient, -weight)


def test_lairs_minimum_is_where_the_paper_says():
    best = 4 * (torch.softmax(REWARDS, 0) - 1 / 4) / (2 * 50.0)
    best.requires_grad_()
    (gradient,) = torch.autograd.grad(listwise.lair_loss(best, REWARDS, 1.0, 50.0), best)
    assert gradient.abs().max() < 1e-15


def test_equal_rewards_pull_nowhere_but_to_the_reference():
    s = torch.tensor([0.1, -0.2, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(listwise.lair_loss(s, torch.ones(3), 1.0, 2.0), s)
    torch.testing.assert_close(gradient, 4 / 3 * s.detach(), rtol=1e-5, atol=1e-7)


def test_plackett_luce_of_two_images_is_dpo_and_begins_at_log_n_factorial():
    implicit = torch.tensor([0.7, -0.4], dtype=torch.float64)
    for rewards, margin in (([1.0, 0.0], 1.1), ([0.0, 1.0], -1.1)):
        loss = listwise.plackett_luce_loss(implicit, torch.tensor(rewards))
        torch.testing.assert_close(loss, preference_loss(torch.tensor(margin, dtype=torch.float64)))
    for n in (2, 3, 6):
        loss = listwise.plackett_luce_loss(torch.zeros(n), torch.rand(n))
        assert loss.item() == pytest.approx(math.log(math.factorial(n)), rel=1e-6)


@pytest.mark.parametrize(("loss", "at_reference"), [("lair", 0.0), ("plackett_luce", math.log(6))])
def test_steps_on_a_minibatch_put_its_images_in_order(new_policy, data, loss, at_reference):
    policy = new_policy(rank=4)
    own = {"loss": loss, "beta": 200, "ridge": 3, "temperature": 0.01, "caption_dropout": 0}
    method = listwise.Method(listwise.Config(**(SETTINGS | own)), policy)
    (minibatch,) = tiny.minibatches(method, data.rows_for("groups")[1]([0, 5]))
    optimizer, losses = torch.optim.Adam(policy.parameters(), lr=3e-3), []
    for _ in range(25):
        value, metrics = method.loss(minibatch)
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(at_reference, abs=1e-5)
    assert losses[-1] < at_reference - 1e-3
    assert metrics["accuracy"] > 0.8
