"""The same trainings in one process or in several, on the tiny model: what each of them comes to.

As a program, `torchrun ... tests/processes.py FOLDER`: every process writes its ends to FOLDER/<rank>.pt.
"""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import tiny
from attune import plugins
from attune.assembly import build_method, share
from attune.backbones.sd import load as load_sd
from attune.blocks import Model, Params, Profile
from attune.config import check, method_of, read_params
from attune.data.prepared import PreparedData
from attune.diffusion.policy import Policy
from attune.interfaces import Backbone
from attune.preference.model import from_clip, save
from attune.preference.objective import Config, SPMObjective
from attune.training.loop import epoch_rows, train

ROOT = Path(__file__).parents[1]
METHODS = plugins.available("methods")
# 4 rows divide by two; of 3 one process has two; of 1 the first process has none
SIZES = {"even": {"batch_size": 4}, "odd": {"batch_size": 3, "accumulation": 2}, "single": {"batch_size": 1}}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "spo, inner steps": ("spo", {"inner_steps": 1, "steps": 6}),
    "alignprop, checkpointed": ("alignprop", {"checkpointed": True, "accumulation": 2}),
    "alignprop, renoised": ("alignprop", {"cut": "fixed", "cut_at": [0.75], "steps": 4, "renoised": 2}),
    "dpo, gradient checkpointing": ("dpo", {"gradient_checkpointing": True}),
    "alignprop, gradient checkpointing": ("alignprop", {"gradient_checkpointing": True}),
    "dpo, every weight": ("dpo", {"lora": None, "lr": 1e-4}),
}
CASES = {f"{name}, {size}": (name, SIZES[size]) for name in [*METHODS, "spm"] for size in SIZES}
CASES |= {label: (name, {"batch_size": 3} | changes) for label, (name, changes) in OPTIONS.items()}

End = dict[str, Any]
"""history: its rows; before, after: the trained weights, flat."""


def ends() -> dict[str, End]:
    """How every case ends, in this process."""
    os.chdir(ROOT)  # where the paths of params.yaml start
    with TemporaryDirectory() as folder:
        backbone = load_sd(Model(backbone="sd", path=tiny.write_pipeline(Path(folder, "sd"))), torch.device("cpu"))
        clip = tiny.write_clip(Path(folder, "clip"))
        save(*from_clip(clip), Path(folder, "preference"))
        data = tiny.prepared(backbone)
        return {
            label: preference(backbone, data, clip, changes)
            if name == "spm"
            else alignment(name, backbone, data, Path(folder, "preference"), changes)
            for label, (name, changes) in CASES.items()
        }


def alignment(name: str, backbone: Backbone, data: PreparedData, judge: Path, changes: dict[str, Any]) -> End:
    """A method's settings of the short profile, for four batches."""
    params = check(Params, read_params(ROOT / "params.yaml"))
    short = params.profiles["short"]
    block = next(block for run, block in short["methods"].items() if method_of(run, params) == name)
    profile = check(Profile, {**short, "methods": {name: {**block, "batches": 4, **changes}}}, "short")
    own = copy.copy(backbone)
    own.denoiser = copy.deepcopy(backbone.denoiser)
    policy = Policy(own, own.encode_prompts([""]))
    policy.unfreeze() if "lora" in changes else policy.add_adapter(rank=2, seed=0)
    if changes.get("gradient_checkpointing"):
        policy.denoiser.enable_gradient_checkpointing()
    tiny.move(policy, 0.02)
    policy.share = share()
    before = flat(policy.parameters())
    history = tiny.run(build_method(name, profile, policy, judge, name), data)
    return {"history": history, "before": before, "after": flat(policy.parameters())}


def preference(backbone: Backbone, data: PreparedData, clip: str, changes: dict[str, Any]) -> End:
    """The preference model, on pairs with unequal weights and ties among them."""
    config = Config(**({"clip": "-", "lr": 1e-4, "batches": 4} | changes))
    objective = SPMObjective(config, *from_clip(clip), Policy(backbone, backbone.encode_prompts([""])))
    objective.share = share()
    n = len(data.pairs)
    columns = {"label_0": [[1.0, 0.5, 0.2][i % 3] for i in range(n)], "weight": [1 / (1 + i % 2) for i in range(n)]}
    data = replace(data, pairs=data.pairs.assign(**columns))
    before = flat(objective.parameters())
    drawn = lambda b, generator: data.pair_batch(epoch_rows(n, config.batch_size, b, 0))  # noqa: E731
    history, _ = train(objective, objective, drawn, config, seed=0)
    return {"history": history, "before": before, "after": flat(objective.parameters())}


def flat(weights: list[Tensor]) -> Tensor:
    return torch.cat([weight.detach().flatten().clone() for weight in weights])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(ends(), Path(sys.argv[1], f"{share().rank}.pt"))
