"""Full fine-tuning of the transformers of flow models, of which each process holds a piece."""

import copy
from dataclasses import replace

import pytest
import torch

import tiny
import tiny_flow_models
from attune.backbones import flux, sd3
from attune.config.settings import Model
from attune.diffusion.policy import Policy
from attune.distributed import Shard
from attune.fsdp import is_sharded
from forked import together
from trainables import every_weight, flat, method

pytestmark = pytest.mark.integration
BASES = {"sd3": (sd3, tiny_flow_models.write_sd3_pipeline), "flux": (flux, tiny_flow_models.write_flux_pipeline)}


@pytest.mark.parametrize("name", BASES)
def test_two_processes_with_pieces_train_what_one_trains(name, tmp_path):
    """Also where activations are computed again, for which blocks are put together once more."""
    module, write = BASES[name]
    model = Model(backbone=name, path=write(tmp_path / "base"), resolution=16, max_sequence_length=16)
    backbone = module.load(model, torch.device("cpu"))
    data = tiny.prepared(backbone)

    def trained(shard):
        own = copy.copy(backbone)
        own.denoiser = copy.deepcopy(backbone.denoiser)
        policy = every_weight(Policy(own, own.encode_prompts([""])), shard)
        policy.denoiser.enable_gradient_checkpointing()
        blocks = sum(map(is_sharded, policy.denoiser.modules())) - 1
        history = tiny.run(method("dpo", policy, batch_size=2, batches=2), data)
        return blocks, history, flat(policy.parameters())

    _, history, weights = trained(Shard())
    (tmp_path / "meeting").mkdir()
    cut = together(2, tmp_path / "meeting", lambda shard: trained(replace(shard, sharded_weights=True)))
    for blocks, found, pieces in cut:
        assert blocks == 2
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in history], rel=1e-4)
        torch.testing.assert_close(pieces, weights, rtol=1e-3, atol=1e-5)
