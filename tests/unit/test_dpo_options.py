"""Diffusion-DPO: what its options do to the loss, and how labels of a scorer get there."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import params
import preparing
import tiny
from attune.config.plugins import plugin_config
from attune.config.resolve import load
from attune.config.schema import ConfigError
from attune.config.settings import AIFeedback
from attune.data.labels import with_ai_feedback
from attune.diffusion.losses import hinge_loss, ipo_loss, preference_loss
from attune.distributed import Part
from attune.methods import dpo
from attune.stages import align
from attune.stages.plan import write as write_plans

ROOT = Path(__file__).parents[2]
BLOCK = tiny.PLAIN | {"lora": None, "caption_dropout": 0, "lr": 1e-3, "batches": 2, "batch_size": 4, "beta": 100}


def first(policy, data, **options):
    """Loss and metrics of the first batch."""
    method = dpo.Method(dpo.Config(**(BLOCK | options)), policy)
    (minibatch,) = tiny.minibatches(method, data.pair_batch(range(4)))
    return method.loss(minibatch)


@pytest.mark.parametrize(("loss", "start"), [("sigmoid", math.log(2)), ("ipo", 0.25), ("hinge", 1.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_every_loss_starts_at_its_own_value(policy, data, loss, start, smoothing):
    """At m = 0 a flipped label costs the same, so smoothing changes nothing yet."""
    assert first(policy, data, loss=loss, label_smoothing=smoothing)[0].item() == pytest.approx(start, abs=1e-7)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_every_loss_widens_the_margin(new_policy, data, loss):
    """On one batch shown over and over, with the same noise."""
    policy = new_policy()
    method = dpo.Method(dpo.Config(**(BLOCK | {"loss": loss, "batches": 12})), policy)
    minibatch = tiny.minibatches(method, data.pair_batch(range(4)))[0]
    method.minibatches = lambda batch, draws: [Part(minibatch, draws.n)]
    history = tiny.run(method, data)
    assert history[-1]["margin"] > 0.02 > history[0]["margin"] == 0
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize(("name", "loss"), [("sigmoid", preference_loss), ("ipo", ipo_loss), ("hinge", hinge_loss)])
def test_the_loss_is_the_one_asked_for_and_expected_over_the_label(new_policy, data, name, loss):
    """A share of 0.2 flipped: 0.8 loss(m) + 0.2 loss(-m). One pair, so that the mean margin is the margin."""
    policy = new_policy(moved=0.3)
    method = dpo.Method(dpo.Config(**(BLOCK | {"loss": name, "label_smoothing": 0.2})), policy)
    (minibatch,) = tiny.minibatches(method, data.pair_batch([0]))
    value, metrics = method.loss(minibatch)
    margin = metrics["margin"]
    assert abs(margin) > 0.1
    assert value.item() == pytest.approx((0.8 * loss(margin) + 0.2 * loss(-margin)).item(), rel=1e-6)


def test_a_soft_label_weighs_both_orders(new_policy, data):
    """label_0 = 0.3: image 1 is the chosen one, with probability 0.7."""
    policy = new_policy(moved=0.3)
    soft = data.with_pairs(data.pairs.assign(label_0=0.3))
    batch = soft.pair_batch([0])
    assert torch.equal(batch.chosen, batch.latents_1)
    assert batch.p_chosen.tolist() == pytest.approx([0.7])
    method = dpo.Method(dpo.Config(**BLOCK), policy)
    (minibatch,) = tiny.minibatches(method, batch)
    loss, metrics = method.loss(minibatch)
    margin = metrics["margin"]
    assert loss.item() == pytest.approx((0.7 * preference_loss(margin) + 0.3 * preference_loss(-margin)).item())


def test_turning_a_pair_and_its_label_round_changes_nothing(new_policy, data):
    policy = new_policy(moved=0.3)
    soft = data.with_pairs(data.pairs.assign(label_0=[0.1, 0.8] * 12))
    turned = soft.pairs.assign(label_0=1 - soft.pairs.label_0, image_0=soft.pairs.image_1, image_1=soft.pairs.image_0)
    a, b = (first(policy, d)[0].item() for d in (soft, soft.with_pairs(turned)))
    assert a == pytest.approx(b, rel=1e-6)


def test_ties_are_dropped_and_weights_are_of_what_is_left(data):
    """Of the three pairs of a prompt one ties: two are left, each with weight 1/2."""
    tied = data.with_pairs(data.pairs.assign(label_0=[0.5, 1.0, 0.2] * 8))
    assert tied.pairs.label_0.tolist() == [1.0, 0.2] * 8
    assert set(tied.pairs.weight) == {0.5}
    assert tied.pairs.index.tolist() == list(range(16))
    assert len(tied.with_pairs(tied.pairs.assign(label_0=0.5), keep_ties=True).pairs) == 16


def test_a_tie_of_people_is_decided_by_the_scorer_and_a_tie_of_the_scorer_is_dropped(data):
    """Hard labels: scores 3 apart are sure, 0.1 apart are not, whatever people said."""
    scored = data.pairs.assign(label_0=0.5, judge_0=[3.0, 0.0, 0.1] * 8, judge_1=[0.0, 3.0, 0.0] * 8)
    hard = with_ai_feedback(scored, AIFeedback(scorer="judge", threshold=0.1))
    assert data.with_pairs(hard).pairs.label_0.tolist() == [1.0, 0.0] * 8


def test_the_align_stage_applies_the_scorers_opinion(data, tiny_folder, tmp_path, monkeypatch):
    """A sure scorer that contradicts people everywhere is as good as people who say the opposite.

    Where it ties, the pair is dropped, as a tie of people is where nobody asks a scorer.
    """
    opposite = 1 - data.pairs.label_0
    tie = pd.Series([True, False, False] * 8)
    scored = data.pairs.assign(pickscore_0=9 * opposite.mask(tie, 0), pickscore_1=9 * (1 - opposite).mask(tie, 0))
    asked = {"ai_feedback": {"scorer": "pickscore", "threshold": 0.1}}
    runs = {"scorer": (scored, asked), "people": (data.pairs.assign(label_0=opposite.mask(tie, 0.5)), {})}
    given, short = params.shipped("short")
    short |= {"model": {"backbone": "sd", "path": tiny_folder}, "search": {}}
    runs_given = {"base": {"after": "data"}, "dpo": {"method": "dpo", "after": "data"}}
    monkeypatch.chdir(ROOT)
    histories, seen = [], []
    for name, (pairs, options) in runs.items():
        profile = short | {"methods": {"dpo": BLOCK | {"lora": {"rank": 2}} | options}}
        folder = params.write(tmp_path / name, given | {"runs": runs_given}, profile)
        preparing.write_split(folder / "data" / "short" / "prepared", data, pairs, "train")
        (folder / "models").mkdir()
        (folder / "models" / "embedded").symlink_to(ROOT / "models" / "embedded")
        settings = load(folder)
        monkeypatch.chdir(folder)
        write_plans(settings)
        monkeypatch.setattr("sys.argv", ["align", "--run", "dpo"])
        align.main()
        histories.append(pd.read_csv("reports/short/train/dpo.csv"))
        seen.append(json.loads(Path("reports/short/train/dpo.json").read_text())["trained_on"])
        monkeypatch.chdir(ROOT)
    pd.testing.assert_frame_equal(*histories)
    assert seen == [["pickscore"], []]


def test_wrong_options_name_their_key():
    for wrong in ({"loss": "log"}, {"label_smoothing": 0.5}, {"ai_feedback": {"scorer": "x", "weight": 2}}):
        with pytest.raises(ConfigError, match=rf"here\.{next(iter(wrong))}"):
            plugin_config("methods", "dpo", BLOCK | wrong, "here")


def test_certain_labels_need_not_be_given(policy, data):
    """`NoisedBatch` pairs without probabilities is what people's labels are."""
    method = dpo.Method(dpo.Config(**BLOCK), policy)
    (minibatch,) = tiny.minibatches(method, data.pair_batch(range(4)))
    assert minibatch.p_chosen.tolist() == [1.0] * 4
    assert method.loss(replace(minibatch, p_chosen=1.0))[0] == method.loss(minibatch)[0]
