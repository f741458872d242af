"""What every preference loss must start from, on the embedded flow model and in half precision too."""

import math
from pathlib import Path

import pytest
import torch

import tiny
from attune.backbones import sd3
from attune.config.settings import Model
from attune.data.batches import PromptBatch
from attune.diffusion.policy import Policy
from attune.methods import dpo, spo

EMBEDDED = Path(__file__).parents[2] / "models/embedded/flow"
PROMPTS = ["a large red circle on a white background", "three green crosses on a pink background"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def policy(request):
    model = Model(backbone="sd3", path=str(EMBEDDED), max_sequence_length=16, dtype=request.param)
    backbone = sd3.load(model, torch.device("cpu"))
    policy = Policy(backbone, backbone.encode_prompts([""]))
    policy.add_adapter(rank=4, seed=0, targets="all")
    return policy


def test_a_loss_of_pairs_is_ln_2_exactly(policy):
    config = dpo.Config(batches=1, batch_size=6, lora={"rank": 4}, lr=1e-3, caption_dropout=0.0)
    method, data = dpo.Method(config, policy), tiny.prepared(policy.backbone)
    (minibatch,) = tiny.minibatches(method, data.rows_for(method.consumes)[1](range(6)))
    loss, _ = method.loss(minibatch)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert any(w.grad is not None and w.grad.any() for w in policy.parameters())


def test_the_ratio_of_the_first_minibatch_is_1(policy):
    """Latents of a rollout stay float32: rounded to bfloat16, their densities would not be those they were drawn from.

    Of the rollout's ten steps each has its own noise, and each ratio is a mean over 256 numbers.
    """
    config = spo.Config(batches=1, batch_size=2, lora={"rank": 4}, steps=10, threshold=0.0, guidance_scale=2.0)
    method = spo.Method(config, policy, tiny.brightness)
    batch = PromptBatch(PROMPTS, policy.backbone.encode_prompts(PROMPTS))
    found = method.rollout(batch, tiny.draws(2).noise, tiny.draws(2).integers)
    assert found.x_t.dtype == torch.float32
    loss, metrics = method.loss(found)
    assert metrics["ratio_chosen"].item() == pytest.approx(1, abs=1e-6)
    assert metrics["ratio_rejected"].item() == pytest.approx(1, abs=1e-6)
    assert loss.item() == pytest.approx(spo.LOSS_AT_REFERENCE, abs=1e-6)
    assert metrics["clipped"].item() == 0
