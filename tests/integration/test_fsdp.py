"""Full fine-tuning of which each process holds a piece: it trains what one process trains, and needs less memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import tiny
from attune.diffusion.noise import Draws
from attune.distributed import Shard
from attune.fsdp import is_sharded, local, shard_with_frozen_copy
from attune.training.guard import NonFiniteError
from attune.training.step import TrainStep
from forked import together
from trainables import equal, every_weight, flat, method

pytestmark = pytest.mark.integration

CASES = {
    "dpo, accumulated": ("dpo", {"batch_size": 3, "accumulation": 2, "batches": 4}),
    "dpo, gradient checkpointing": ("dpo", {"batch_size": 4, "gradient_checkpointing": True, "batches": 2}),
    "sft": ("sft", {"batch_size": 3, "batches": 2}),
    "sft, one row": ("sft", {"batch_size": 1, "batches": 2}),
    "spo": ("spo", {"batch_size": 3, "minibatch_size": 4, "batches": 2}),
    "ddpo": ("ddpo", {"batch_size": 3, "minibatch_size": 7, "batches": 1}),
    "alignprop": ("alignprop", {"batch_size": 3, "batches": 2}),
    "alignprop, steps checkpointed": ("alignprop", {"batch_size": 3, "checkpoint_steps": True, "batches": 2}),
}


def cut(shard: Shard) -> Shard:
    return replace(shard, sharded_weights=True)


def trained(policy, data, name, changes):
    """The history, and all weights before and after."""
    built = method(name, policy, **changes)
    if changes.get("gradient_checkpointing"):
        policy.denoiser.enable_gradient_checkpointing()
    before = flat(policy.parameters())
    return tiny.run(built, data), before, flat(policy.parameters())


@pytest.mark.parametrize("names", [[name for name in CASES if name != "ddpo"], ["ddpo"]], ids=["all but ddpo", "ddpo"])
def test_two_processes_with_pieces_train_what_one_trains(new_policy, data, tmp_path, names):
    """Rows that divide by two, that do not, and one alone; network calls in a row, and computed again going back.

    Apart by rounding of float32, which a beta of 500 and the short way of a few steps make larger.
    """

    def all_of_them(shard):
        policies = (every_weight(new_policy(adapter=False), shard) for _ in names)
        return {case: trained(policy, data, *CASES[case]) for case, policy in zip(names, policies, strict=True)}

    alone = all_of_them(Shard())
    first, second = together(2, tmp_path, lambda shard: all_of_them(cut(shard)))
    for case in names:
        (history, before, after), (ours, started, ended) = alone[case], first[case]
        assert ours == second[case][0], case
        assert torch.equal(ended, second[case][2]), case
        assert torch.equal(started, before), case
        assert len(ours) == len(history) >= 2, case
        apart = max(
            abs(a[key] - b[key]) / (abs(b[key]) + 1e-6) for a, b in zip(ours, history, strict=True) for key in b
        )
        way = ((after - ended).norm() / (after - before).norm()).item()
        print(f"{case}: history {apart:.1e}, weights {way:.1e}")
        for row, expected in zip(ours, history, strict=True):
            assert row.keys() == expected.keys()
            assert row == pytest.approx(expected, rel=5e-4, abs=1e-4), case
        assert (after - before).abs().max() > 1e-5
        assert way < 2e-3, case


def held(policy, data):
    """Bytes of weights, gradients, optimizer state and reference in this process, with two minibatches accumulated."""
    built = method("dpo", policy)
    step = TrainStep(policy, built.config)
    ours = policy.shard.rows(2)
    drawn = [data.rows_for("pairs")[1](rows[ours]) for rows in ([0, 1], [2, 3])]
    group = [part for batch in drawn for part in built.minibatches(batch, Draws.of_batch(0, 0, 2, policy.shard))]
    step(built, group, 1, 1e-3)
    step.gradient(built, group, 2)
    parameters = policy.parameters()
    states = [value for state in step.optimizer.state.values() for value in state.values()]
    parts = {
        "weights": parameters,
        "gradients": [weight.grad for weight in parameters],
        "optimizer": states,
        "reference": list(policy.reference_model.parameters()),
    }
    return {name: sum(local(x).numel() * x.element_size() for x in tensors) for name, tensors in parts.items()}


def test_half_the_memory_of_all_four_parts(new_policy, data, tmp_path):
    """20 bytes per weight in one process; in each of two half of that, apart from weights that have a single row."""
    alone = held(every_weight(new_policy(adapter=False), Shard()), data)
    count = sum(weight.numel() for weight in new_policy(adapter=False).denoiser.parameters())
    assert alone["weights"] == alone["gradients"] == alone["reference"] == 4 * count
    for found in together(2, tmp_path, lambda shard: held(every_weight(new_policy(adapter=False), cut(shard)), data)):
        assert found == {name: pytest.approx(total / 2, rel=0.01) for name, total in alone.items()}


def test_most_weights_lie_in_blocks_that_are_put_together_one_by_one(new_policy, new_xl_policy, tmp_path):
    """What is outside of them, the first and last convolution and embeddings, is put together for a whole call."""

    def outside(shard, new):
        policy = every_weight(new(adapter=False), cut(shard))
        blocks = [module for module in policy.denoiser.modules() if is_sharded(module)][1:]
        inside = {id(weight) for block in blocks for weight in block.parameters()}
        weights = list(policy.denoiser.parameters())
        return sum(w.numel() for w in weights if id(w) not in inside) / sum(w.numel() for w in weights)

    for name, new in {"sd": new_policy, "sdxl": new_xl_policy}.items():
        (folder := tmp_path / name).mkdir()
        for share in together(2, folder, lambda shard, new=new: outside(shard, new)):
            assert share < 0.15


def test_a_saved_model_is_the_one_that_one_process_saves(new_policy, data, tmp_path):
    """The main process alone writes; the same configuration, and weights that diffusers reads."""

    def work(shard):
        policy = every_weight(new_policy(adapter=False), cut(shard))
        policy.save(tmp_path / f"sharded-{shard.rank}")

    together(2, tmp_path, work)
    alone = every_weight(new_policy(adapter=False), Shard())
    alone.save(tmp_path / "whole")
    assert not (tmp_path / "sharded-1").exists()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        ours, expected = (tmp_path / folder / "unet" / name for folder in ("sharded-0", "whole"))
        assert ours.read_bytes() == expected.read_bytes(), name
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "sharded-0/unet")
    assert equal(list(loaded.parameters()), alone.parameters())
    again = new_policy(adapter=False)
    again.load(tmp_path / "sharded-0")
    assert equal(list(again.denoiser.parameters()), alone.parameters())


def test_numbers_that_are_none_are_the_error_of_both(new_policy, data, tmp_path):
    """In the data; in a weight whose piece the second process has; and in an output that is too large for float32."""
    spoilt = replace(data, latents=torch.full_like(data.latents, math.nan))
    harms = ((spoilt, None), (data, math.nan), (data, 3e38))

    def work(shard):
        said = []
        for given, value in harms:
            policy = every_weight(new_policy(adapter=False), cut(shard))
            if value is not None and shard.rank == 1:
                local(dict(policy.denoiser.named_parameters())["conv_out.weight"]).data.fill_(value)
            with pytest.raises(NonFiniteError) as error:
                tiny.run(method("sft", policy, batch_size=4), given)
            said.append(str(error.value))
        return said

    first, second = together(2, tmp_path, work)
    assert first == second
    assert "process 0: the data, x_0 of row 0 of the minibatch, is not finite; process 1: the data, x_0" in first[0]
    assert first[1].endswith(": process 1: weight conv_out.weight is not finite")
    assert first[2].endswith(
        "process 0: first bad output in module conv_out; process 1: first bad output in module conv_out"
    )


def test_a_gradient_that_is_too_large_in_one_piece_halves_the_scale_of_all(tmp_path):
    """Of losses that are scaled for float16: processes with different scales would make different steps."""

    def work(shard):
        net, scaler = nn.Linear(4, 4), torch.amp.GradScaler("cpu")
        shard_with_frozen_copy(net)
        optimizer = torch.optim.AdamW(net.parameters())
        scaler.scale(net(torch.ones(2, 4)).sum()).backward()
        if shard.rank == 1:
            local(net.weight.grad)[0, 0] = math.inf
        scaler.unscale_(optimizer)
        before = scaler.get_scale()
        scaler.update()
        return before / scaler.get_scale()

    assert together(2, tmp_path, work) == [2.0, 2.0]


def test_weights_that_are_put_into_the_pieces_are_computed_with(tmp_path):
    """After a prediction without gradients, as when the weights of the best score are put back."""

    def work(shard):
        net = nn.Linear(4, 4)
        shard_with_frozen_copy(net)
        parameters = list(net.parameters())
        with torch.no_grad():
            before = net(torch.ones(1, 4))
            for weight in parameters:
                weight.zero_()
            return bool(before.any()), bool(net(torch.ones(1, 4)).any())

    assert together(2, tmp_path, work) == [(True, False)] * 2
