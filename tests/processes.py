"""The same trainings in one process or in several, on the tiny model, and how each of them ends.

As a program, `torchrun ... tests/processes.py TASK FOLDER`: every process writes its results to FOLDER/<rank>.pt.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import params
import tiny
from attune.backbones.sd import load as load_sd
from attune.build import build_method, shard
from attune.config import plugins
from attune.config.plan import Plugin
from attune.config.profile import Params
from attune.config.resolve import resolve
from attune.config.schema import check
from attune.config.settings import Model
from attune.data.store import PreparedData
from attune.diffusion.policy import Policy
from attune.fsdp import full_tensor
from attune.interfaces import Backbone, Objective
from attune.spm.model import from_clip, save
from attune.spm.objective import Config, SPMObjective
from attune.training.checkpoint import Checkpoint
from attune.training.early_stopping import EarlyStopping
from attune.training.guard import NonFiniteError
from attune.training.loop import Callbacks, epoch_batches, epoch_rows, train
from attune.training.step import init_distributed
from trainables import at_batch

ROOT = Path(__file__).parents[1]
METHODS = plugins.available("methods")
# 4 rows divide by two; of 3 one process has two; of 1 the first process has none
SIZES = {"even": {"batch_size": 4}, "odd": {"batch_size": 3, "accumulation": 2}, "single": {"batch_size": 1}}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "spo, unequal minibatches": ("spo", {"minibatch_size": 5, "accumulation": 2}),  # 12 pairs are 5, 5 and 2
    "spo, inner steps": ("spo", {"inner_steps": 1, "steps": 6}),
    "alignprop, checkpointed": ("alignprop", {"checkpoint_steps": True, "accumulation": 2}),
    "draft, renoised": ("draft", {"n_renoised": 2}),
    "dpo, gradient checkpointing": ("dpo", {"gradient_checkpointing": True}),
    "alignprop, gradient checkpointing": ("alignprop", {"gradient_checkpointing": True}),
    "dpo, every weight": ("dpo", {"lora": None, "lr": 1e-4}),
}
CASES = {f"{name}, {size}": (name, SIZES[size]) for name in [*METHODS, "spm"] for size in SIZES}
CASES |= {label: (name, {"batch_size": 3} | changes) for label, (name, changes) in OPTIONS.items()}

End = dict[str, Any]
"""history: its rows; before, after: the trained weights, flat."""


@dataclass(frozen=True)
class Parts:
    """A base model, prepared data, a CLIP to train and a preference model, which the trainings share."""

    backbone: Backbone
    data: PreparedData
    clip: str
    preference: Path


@contextmanager
def parts() -> Iterator[Parts]:
    with chdir(ROOT), TemporaryDirectory() as folder:  # where the paths of params.yaml start
        backbone = load_sd(Model(backbone="sd", path=tiny.write_pipeline(Path(folder, "sd"))), torch.device("cpu"))
        clip = tiny.write_clip(Path(folder, "clip"))
        save(*from_clip(clip), Path(folder, "preference"))
        yield Parts(backbone, tiny.prepared(backbone), clip, Path(folder, "preference"))


def ends() -> dict[str, End]:
    """How every case ends, in this process."""
    with parts() as made:
        return {
            label: (preference if name == "spm" else partial(alignment, name))(made, changes)
            for label, (name, changes) in CASES.items()
        }


def method(name: str, made: Parts, changes: dict[str, Any]) -> Objective:
    """A method with the settings of the short profile, for four batches, and a policy that has moved."""
    runs, profile = params.shipped("short")
    settings = resolve(check(Params, runs), profile)
    config = next(config for block, config in settings.methods.items() if settings.method_of(block) == name)
    plugin = Plugin(kind="methods", name=name, settings={**config.model_dump(), "batches": 4, **changes})
    scorers = {
        scorer.name: Plugin(kind="rewards", name=scorer.plugin, settings=scorer.config.model_dump())
        for scorer in settings.scorers.values()
    }
    own = copy.copy(made.backbone)
    own.denoiser = copy.deepcopy(made.backbone.denoiser)
    policy = Policy(own, own.encode_prompts([""]))
    policy.shard = replace(shard(), sharded_weights="lora" in changes and shard().world_size > 1)
    if policy.shard.sharded_weights:
        init_distributed(policy.shard)
    policy.unfreeze() if "lora" in changes else policy.add_adapter(rank=2, seed=0)
    if changes.get("gradient_checkpointing"):
        policy.denoiser.enable_gradient_checkpointing()
    tiny.move(policy, 0.02)
    return build_method(plugin, policy, made.preference, scorers)


def alignment(name: str, made: Parts, changes: dict[str, Any], **options: Any) -> End:
    return trained(method(name, made, changes), made, **options)


def trained(built: Objective, made: Parts, **options: Any) -> End:
    before = flat(built.policy.parameters())
    history = tiny.run(built, made.data, **options)
    return {"history": history, "before": before, "after": flat(built.policy.parameters())}


def preference(made: Parts, changes: dict[str, Any]) -> End:
    """The preference model, on pairs with unequal weights and ties among them."""
    config = Config(**({"clip": "-", "lr": 1e-4, "batches": 4} | changes))
    base = Policy(made.backbone, made.backbone.encode_prompts([""]))
    objective = SPMObjective(config, *from_clip(made.clip), base)
    objective.shard = shard()
    n = len(made.data.pairs)
    columns = {"label_0": [[1.0, 0.5, 0.2][i % 3] for i in range(n)], "weight": [1 / (1 + i % 2) for i in range(n)]}
    data = replace(made.data, pairs=made.data.pairs.assign(**columns))
    # a key's bias shifts all attention logits alike: its gradient is rounding, of which AdamW makes full steps
    moving = [weight for name, weight in objective.model.named_parameters() if "k_proj.bias" not in name]
    before = flat(moving)

    history, _ = train(objective, objective, epoch_batches(n, config.batch_size, 0, data.pair_batch), seed=0)
    return {"history": history, "before": before, "after": flat(moving)}


def flat(weights: list[Tensor]) -> Tensor:
    return torch.cat([full_tensor(weight.detach()).flatten().clone() for weight in weights])


def interrupted(folder: Path, at: int | None = None, every_weight: bool = False) -> End:
    """A training with a checkpoint in the folder; the last of several processes is killed before batch `at`."""
    ours, changes = shard(), {"batch_size": 3} | (OPTIONS["dpo, every weight"][1] if every_weight else {})
    with parts() as made:
        built = method("dpo", made, changes)
        if at is not None and ours.rank == ours.world_size - 1:
            at_batch(built, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        checkpoint = Checkpoint(folder, "align@dpo", "key", every_seconds=0, writes=ours.is_main_process)
        return trained(built, made, checkpoint=checkpoint)


def errors() -> dict[str, str]:
    """What this process says when numbers of the second one stop being numbers, or the first one ends a training."""
    said = {}
    with parts() as made:
        spoilt = replace(made.data, latents=made.data.latents.clone())
        rows = epoch_rows(len(spoilt.pairs), 2, 1, 0).tolist()  # of batch 1; the second is the second process's
        spoilt.latents[spoilt.pairs.image_0[rows[1]]] = math.nan
        try:
            alignment("kto", replace(made, data=spoilt), {"batch_size": 2})
        except NonFiniteError as error:
            said["not finite"] = str(error)

        def pruned(batch: int, step: int, score: float) -> None:
            if batch == 2:
                raise KeyError("pruned")

        scores: list[float] = []
        stopping = EarlyStopping(lambda: scores.append(1.0) or len(scores), every=1)
        try:
            alignment("sft", made, {"batch_size": 2}, early_stopping=stopping, callbacks=Callbacks(on_score=pruned))
        except (KeyError, RuntimeError) as error:
            said["ended"] = f"{type(error).__name__}: {error}"
        said["scores computed"] = str(len(scores))
    return said


TASKS = {
    "ends": lambda folder: ends(),
    "killed": lambda folder: interrupted(folder, at=3),
    "killed, every weight": lambda folder: interrupted(folder, at=3, every_weight=True),
    "errors": lambda folder: errors(),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.save(TASKS[task](folder), folder / f"{shard().rank}.pt")
