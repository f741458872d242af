"""Supervised fine-tuning, weighed by the signal-to-noise ratio."""

import copy

import pytest
import torch

import tiny
from attune.diffusion.path import Flow, logit_normal
from attune.diffusion.process import Level
from attune.methods import sft

SETTINGS = tiny.PLAIN | {"lr": 1e-3, "batches": 1, "batch_size": 6, "lora": {"rank": 2}}


def test_the_weight_is_that_of_the_paper():
    alpha2 = torch.tensor([0.999, 0.9, 5 / 6, 0.5, 0.001])
    snr = alpha2 / (1 - alpha2)
    weight = sft.min_snr_weight(Level(alpha2, 1 - alpha2), 5.0)
    torch.testing.assert_close(weight, torch.minimum(snr, torch.tensor(5.0)) / snr)
    assert weight[3:].tolist() == [1, 1]


def test_the_loss_is_the_mean_of_weighed_errors(new_policy, data):
    policy, losses = new_policy(moved=0.2), {}
    for gamma in (None, 1e9, 5.0):
        method = sft.Method(sft.Config(**SETTINGS, min_snr=gamma), policy)
        (minibatch,) = tiny.minibatches(method, data.rows_for("liked images")[1](range(6)))
        losses[gamma] = method.loss(minibatch)[0].item()
    alpha2 = policy.backbone.path.alphas_cumprod[minibatch.t]
    errors = [sft.Method(sft.Config(**SETTINGS), policy).loss(row(minibatch, i))[0].item() for i in range(6)]
    by_hand = [min(1, 5 * (1 - a) / a) * e for a, e in zip(alpha2.tolist(), errors, strict=True)]
    assert losses[1e9] == losses[None]
    assert losses[5.0] == pytest.approx(sum(by_hand) / 6, rel=1e-5)
    assert losses[5.0] < losses[None]


def row(m, i):
    return sft.NoisedBatch(m.x_0[[i]], m.t[[i]], m.noise[[i]], m.cond[[i]])


def test_a_flow_has_no_such_weight(new_policy):
    policy = new_policy()
    policy.backbone = copy.copy(policy.backbone)
    policy.backbone.path = Flow(lambda steps: torch.linspace(1, 0, steps + 1), logit_normal(3.0))
    policy.backbone.prediction_type = "flow"
    with pytest.raises(ValueError, match="min_snr: is for models that predict noise"):
        sft.Method(sft.Config(**SETTINGS, min_snr=5), policy)
