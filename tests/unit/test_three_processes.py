"""Three processes, more than some minibatches have rows: they read, draw and weigh what one process does alone."""

import copy
from dataclasses import replace

import pytest
import torch

import tiny
from attune.config import plugins
from attune.diffusion.noise import Draws
from attune.diffusion.policy import Policy
from attune.distributed import Part, Shard
from attune.spm.model import from_clip
from attune.spm.objective import Config as PreferenceConfig
from attune.spm.objective import SPMObjective
from attune.training.step import TrainStep
from forked import together
from trainables import Line

LOOP = {"lora": None, "lr": 1e-3, "batches": 1}


class Light:
    differentiable = True

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


def own(policy, shard):
    """A policy of its own that takes part in a training as `shard`."""
    backbone = copy.copy(policy.backbone)
    backbone.denoiser = copy.deepcopy(policy.denoiser)
    found = Policy(backbone, policy.uncond)
    found.denoiser.requires_grad_(False)
    for name, weight in found.denoiser.named_parameters():
        weight.requires_grad = "lora_" in name
    found.shard = shard
    return found


def build(name, policy, **changes):
    module = plugins.load("methods", name)
    needed = {"spo": [tiny.brightness], "alignprop": [{"light": Light()}], "draft": [{"light": Light()}]}
    config = module.Config(**(tiny.PLAIN | LOOP | changes))
    return module.Method(config, policy, *needed.get(name, [{"light": Light()}] if name == "refl" else []))


# ---------------------------------------------------------------- collectives


def test_rows_come_together_in_the_order_of_ranks_and_padding_does_not(tmp_path):
    """Of one, two or five rows the idle processes give a row that is not theirs, which must not be counted."""

    def work(shard):
        found = []
        for n in (1, 2, 5):
            rows = torch.arange(10.0, 10 + n)[:, None]
            idle = replace(shard, padding=shard.count(n) == 0)
            found.append(idle.gather(rows[shard.rows(n)]).flatten().tolist())
        return found

    expected = [[10.0], [10.0, 11.0], [10.0, 11.0, 12.0, 13.0, 14.0]]
    assert together(3, tmp_path, work) == [expected] * 3


def test_sums_and_values_of_all(tmp_path):
    def work(shard):
        values = shard.all_gather_object({"rank": shard.rank})
        asked = []
        told = shard.broadcast_from_main(lambda: asked.append(1) or shard.rank + 5)
        return shard.all_reduce_sum([shard.rank + 1.0, 0.1]), values, told, len(asked)

    found = together(3, tmp_path, work)
    ranks = [{"rank": rank} for rank in range(3)]
    assert found == [([6.0, pytest.approx(0.3)], ranks, 5, int(rank == 0)) for rank in range(3)]


def test_an_error_of_the_main_process_is_everybodys(tmp_path):
    def fail():
        raise KeyError("pruned")

    def work(shard):
        try:
            shard.broadcast_from_main(fail)
        except (KeyError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"

    told = "EndedElsewhereError: the first process has ended the work: KeyError: 'pruned'"
    assert together(3, tmp_path, work) == ["KeyError: 'pruned'", told, told]


# ---------------------------------------------------------------- minibatches


def tensors(value):
    """Every tensor of a minibatch that has a row per row, by name."""
    found = {key: x for key, x in vars(value).items() if isinstance(x, torch.Tensor) and key not in NOT_ROWS}
    return found | (dict(value.cond.tensors) if hasattr(value, "cond") else {})


def put_together(parts, ranks):
    """The tensors of a minibatch by the rows of all processes; of several copies of the rows, each copy by itself."""
    found = {}
    for key in tensors(parts[0].rows):
        pieces = []
        for part, shard in zip(parts, ranks, strict=True):
            rows, here = tensors(part.rows)[key], max(1, shard.count(part.n))
            rows = rows.transpose(0, 1) if key == "pixel_values" else rows
            pieces.append(rows.unflatten(0, (len(rows) // here, here))[:, : shard.count(part.n)])
        found[key] = torch.cat(pieces, dim=1).flatten(0, 1)
    return found


NOT_ROWS = ("timesteps", "weight_sum")
ROLLOUTS = {
    "spo": {"steps": 4, "start_step": 1, "candidates": 2, "threshold": 0.0, "minibatch_size": 5, "guidance_scale": 1},
    "spo, inner steps": {"steps": 5, "start_step": 1, "candidates": 2, "threshold": 0.0, "minibatch_size": 5}
    | {"inner_steps": 1, "guidance_scale": 1},
    "spin": {"steps": 2, "guidance_scale": 1, "eta": 0.5},
    "sft": {},
    "dpo": {"caption_dropout": 0.5},
    "kto": {"caption_dropout": 0.5},
    "alignprop": {"rewards": {"light": 1}, "steps": 3, "guidance_scale": 1, "target": None},
    "draft": {"rewards": {"light": 1}, "steps": 3, "guidance_scale": 1, "eta": 1},
    "draft, renoised": {"rewards": {"light": 1}, "steps": 3, "guidance_scale": 1, "n_renoised": 2},
    "refl": {"rewards": {"light": 1}, "steps": 3, "guidance_scale": 1},
}
OFFLINE = ("sft", "dpo", "kto")


@pytest.mark.parametrize("label", ROLLOUTS)
@pytest.mark.parametrize("n", [2, 5])
def test_the_rows_of_all_processes_are_those_that_one_would_have(new_policy, data, tmp_path, label, n):
    """Of two rows one process is idle; of five the shares are unequal. What is read and drawn is equal to the bit."""
    policy, name = new_policy(moved=0.1), label.partition(",")[0]

    def minibatches(trained):
        method = build(name, trained, **ROLLOUTS[label])
        batch = data.rows_for(method.consumes)[1](list(range(n))[trained.shard.rows(n)])
        return list(method.minibatches(batch, Draws.of_batch(0, 0, n, trained.shard)))

    expected, ranks = minibatches(policy), [Shard(rank, 3) for rank in range(3)]
    found = together(3, tmp_path, lambda shard: minibatches(own(policy, shard)))
    for alone, *parts in zip(expected, *found, strict=True):
        assert {part.n for part in parts} == {alone.n}
        ours, all_rows = put_together(parts, ranks), put_together([alone], [Shard()])
        for key, value in all_rows.items():
            rolled_out = {} if key in ("t", "noise") or name in OFFLINE else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(ours[key], value, **(rolled_out or {"rtol": 0, "atol": 0}))


def test_the_preference_models_pairs_are_what_one_process_prepares(new_policy, data, clip_folder, tmp_path):
    base = new_policy(adapter=False)
    weighted = replace(data, pairs=data.pairs.assign(weight=[1 / (1 + i % 2) for i in range(len(data.pairs))]))

    def prepared(shard):
        config = PreferenceConfig(clip=clip_folder, lr=1e-4, batches=1, batch_size=2)
        objective = SPMObjective(config, *from_clip(clip_folder), base)
        objective.shard = shard
        batch = weighted.pair_batch([0, 1][shard.rows(2)])
        (part,) = objective.minibatches(batch, Draws.of_batch(0, 0, 2, shard))
        return part

    alone, ranks = prepared(base.shard), [Shard(rank, 3) for rank in range(3)]
    parts = together(3, tmp_path, prepared)
    ours, expected = put_together(parts, ranks), put_together([alone], [Shard()])
    torch.testing.assert_close(ours.pop("pixel_values"), expected.pop("pixel_values"), rtol=1e-4, atol=1e-4)
    assert ours.keys() == {"input_ids", "t", "label_0", "weight"}
    assert all(torch.equal(ours[key], value) for key, value in expected.items())
    assert [part.rows.weight_sum.item() for part in (alone, *parts)] == pytest.approx([1.5, 0.75, 0.75, 0.75])


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("group", [[(3.0,)], [(1.0, 2.0)], [(1.0, 2.0, 6.0, 7.0)], [(1.0, 5.0), (4.0,)]], ids=str)
def test_a_step_is_the_step_of_one_process(tmp_path, group):
    """Gradient and metrics are the mean over the rows of all, whoever has how many of them.

    A row's loss is x w at w = 0, so the gradient's norm is the mean x; AdamW's first step is the rate, 0.1.
    """
    mean = sum(map(sum, group)) / sum(map(len, group))

    def work(shard):
        line = Line()
        line.shard = shard
        parts = [Part(rows[shard.rows(len(rows))], len(rows)) for rows in group]
        row = TrainStep(line, line.config)(line, parts, 1, 0.1)
        return {key: row[key] for key in ("x", "grad_norm", "lr")}, line.parameters()[0].item()

    for row, w in together(3, tmp_path, work):
        assert row == pytest.approx({"x": mean, "grad_norm": mean, "lr": 0.1})
        assert w == pytest.approx(-0.1, abs=1e-6)
