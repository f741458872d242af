"""What no block of settings can know by itself: whether they fit together, and the machine. One line per problem.

Each line names the key that is to blame and what to do. Nothing here loads a model or asks the network.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attune.config import plugins
from attune.config.profile import BASE, DATA, PREFERENCE
from attune.config.resolve import Settings
from attune.config.schema import ConfigError, StrictModel, check, number_type, set_path
from attune.config.settings import locations
from attune.planning.base_problems import base
from attune.planning.costs import Row, facts, size
from attune.planning.data_problems import data, prompts
from attune.planning.make import needs_preference_model
from attune.text import shown

RESERVED = (DATA, PREFERENCE, "embedded")  # names of folders beside those of runs
TOLD = "embedded_guidance"
LARGE = 500_000_000  # weights of a denoiser, from which on training on a CPU is not meant


@dataclass(frozen=True)
class Machine:
    """What the plan asks of the machine."""

    gpus: int
    gpu_bytes: int  # of the smallest; 0 without one
    ram_bytes: int
    free_disk_bytes: int


def machine() -> Machine:
    """This machine."""
    import psutil
    import torch

    ram = psutil.virtual_memory().total
    memory = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    if not memory and torch.backends.mps.is_available():
        memory = [ram]  # Apple's GPU shares it
    return Machine(len(memory), min(memory, default=0), ram, shutil.disk_usage(".").free)


def problems(settings: Settings, denoiser_weights: int, here: Machine) -> list[str]:
    """All that would stop a run later on.

    Args:
        denoiser_weights: how many the base model's denoiser has.
    """
    checks = (_runs, _orders, _model, _scorers, _labels, base, data, prompts, _searches)
    found = [problem for one in checks for problem in one(settings)]
    return found + list(_machine(settings, denoiser_weights, here))


def _runs(s: Settings) -> Iterator[str]:
    where = f"params/{s.profile}.yaml"
    for name in s.runs:
        if name in RESERVED:
            yield f"runs.{name}: the name is taken by a folder of models/{s.profile}; choose another"
    first = s.runs.get(BASE)
    if first is None or first.method or first.released:
        yield f"runs.{BASE}: is what every run is compared with; write `after: {DATA}` below it, and no method or from"
    for name in s.methods:
        if name in s.runs and s.runs[name].method is None:
            yield f"{where}:methods.{name}: runs.{name} has no method, so its settings are never used; remove them"
        elif s.model.quantize is not None and name in s.runs and s.methods[name].lora is None:
            yield f"{where}:model.quantize: weights of {s.model.quantize} cannot be trained; set methods.{name}.lora"
    if s.preference is None and needs_preference_model(s):
        yield f"{where}:preference: is missing, and a run of spo needs the step-aware preference model"


def _model(s: Settings) -> Iterator[str]:
    """Settings that only some base models have."""
    where, module = f"params/{s.profile}.yaml", plugins.load("backbones", s.model.backbone)
    if s.model.t5 and module.downloads(s.model) == module.downloads(s.model.model_copy(update={"t5": False})):
        yield f"{where}:model.t5: {s.model.backbone} has no T5 that may be left out; remove the line"
    if facts(s).guidance == "embedded":
        return
    says = f"{s.model.backbone} is not told its guidance, which must be 1 in losses of given images; remove the line"
    for name, config in s.methods.items():
        if getattr(config, TOLD, 1) != 1:
            yield f"{where}:methods.{name}.{TOLD}: {says}"
    for name, search in s.search.items():
        if TOLD in {*search.space, *search.fixed}:
            yield f"{where}:search.{name}: {TOLD}: {says}"


def _orders(s: Settings) -> Iterator[str]:
    """`after` orders DVC's stages, so all that a run needs must come before it."""
    for name, run in s.runs.items():
        chain = _chain(name, s)
        if chain is None:
            yield f"runs.{name}.after: goes round in a circle"
            continue
        if run.after not in (DATA, PREFERENCE) and run.after not in s.runs:
            yield f"runs.{name}.after: {run.after!r} is none of {', '.join([DATA, PREFERENCE, *s.runs])}"
        elif run.after == BASE:
            yield f"runs.{name}.after: every training starts from the base model; write {DATA}"
        elif plugins.needs(run.method, "preference_model") and PREFERENCE not in chain:
            yield f"runs.{name}.after: {run.method} needs the preference model; write {PREFERENCE}, or a run after it"
        elif run.method is None and run.after != DATA:
            yield f"runs.{name}.after: nothing is trained, so write {DATA}"
        elif run.method and s.methods[name].start and run.after in s.runs:
            where = f"params/{s.profile}.yaml:methods.{name}.start"
            yield f"{where}: the run starts from runs.{run.after}; remove one of the two"


def _chain(name: str, s: Settings) -> list[str] | None:
    """What comes before a run, nearest first; None if it comes before itself."""
    found: list[str] = []
    while name in s.runs:
        name = s.runs[name].after
        if name in found:
            return None
        found.append(name)
    return found


def _scorers(s: Settings) -> Iterator[str]:
    """A scorer that is asked for by name must have a block."""
    where = f"params/{s.profile}.yaml"
    asked = {f"{where}:data.score_with": list(s.data.score_with)}
    for name, config in s.methods.items():
        asked[f"{where}:methods.{name}.rewards"] = list(getattr(config, "rewards", {}))
        asked[f"{where}:methods.{name}.validation.scorer"] = [config.validation.scorer] if config.validation else []
    for name, search in s.search.items():
        asked[f"{where}:search.{name}.objectives"] = list(search.objectives)
    for key, names in asked.items():
        for unknown in [name for name in names if name not in s.scorers]:
            yield f"{key}: {unknown!r} is not in scorers ({', '.join(s.scorers)}); add its block there"


def _labels(s: Settings) -> Iterator[str]:
    """A scorer can label pairs, or rank images, only if prepare writes its scores beside them."""
    where = f"params/{s.profile}.yaml"
    blocks = {"preference": s.preference} | {f"methods.{name}": config for name, config in s.methods.items()}
    found: dict[str, Any] = {f"{key}.ai_feedback": getattr(block, "ai_feedback", None) for key, block in blocks.items()}
    found |= {f"methods.{name}": s.methods[name] for name in s.runs if hasattr(s.methods.get(name), "scorer")}
    for key, block in found.items():
        if block is not None and block.scorer not in s.data.score_with:
            yield f"{where}:{key}.scorer: {block.scorer!r} must be in data.score_with, so add it there"


def _searches(s: Settings) -> Iterator[str]:
    """A search may only ask for settings that its run's method accepts, at both ends of every range."""
    for name in s.search:
        where = f"params/{s.profile}.yaml:search.{name}"
        if name not in s.methods:
            yield f"{where}: there is no run and no block methods.{name}; remove it, or add the run"
            continue
        try:
            _try_search(name, s, where)
        except ConfigError as error:
            yield str(error)


def _try_search(name: str, s: Settings, where: str) -> None:
    search, method = s.search[name], type(s.methods[name])
    values = s.methods[name].model_dump()
    for key, value in search.fixed.items():
        values = _changed(method, values, key, value, f"{where}.fixed.{key}")
    for key, spread in search.space.items():
        is_integer = spread.choices is None and number_type(method, key, f"{where}.space.{key}") is int
        ends = [] if spread.choices else [int(end) if is_integer else end for end in spread.ends]
        for value in spread.choices or ends:
            _changed(method, values, key, value, f"{where}.space.{key}")


def _changed(method: type[StrictModel], values: dict, key: str, value: object, where: str) -> dict:
    """The settings with a value put in. Raises ConfigError at `where` if the method does not accept them."""
    try:
        changed = set_path(values, key, value)
        check(method, changed)
    except ConfigError as error:
        raise ConfigError(f"{where}: {shown(value)} is not accepted: {error}") from None
    return changed


def _machine(s: Settings, denoiser_weights: int, here: Machine) -> Iterator[str]:
    trains = any(run.method for run in s.runs.values())
    if trains and denoiser_weights >= LARGE and not here.gpus and not s.allow_cpu:
        yield (
            f"params/{s.profile}.yaml:allow_cpu: this machine has no GPU, and training a denoiser of "
            f"{denoiser_weights / 1e6:.0f} million weights on a CPU takes weeks; use a GPU, or set allow_cpu: true"
        )


def too_large(s: Settings, table: Iterable[Row], here: Machine) -> Iterator[str]:
    """Stages that cannot fit the smallest GPU, and all together the disk.

    What is counted is the least that is needed; a stage whose time is known has run here, so its files count no more.
    """
    where, disk = f"params/{s.profile}.yaml", 0.0
    for row in table:
        disk += 0 if row.time else row.disk or 0
        if here.gpus and (row.gpu or 0) > here.gpu_bytes:
            yield (
                f"{where}:{_block(row.stage)}: {row.stage} needs {size(row.gpu)} of GPU memory for weights, gradients "
                f"and the optimizer's state alone, and this machine's GPU has {size(here.gpu_bytes)}; "
                f"{_smaller(row.stage)}model.dtype bfloat16, model.quantize nf4 where only adapters are trained, or a "
                "larger GPU"
            )
    if disk > here.free_disk_bytes:
        yield (
            f"{where}: the stages that have not run here write about {size(disk)} (make plan lists them), and the "
            f"disk has {size(here.free_disk_bytes)} free; free some, or take fewer data.pairs or generate.prompts"
        )


def _block(stage: str) -> str:
    """The block of settings that a stage's memory depends on."""
    kind, _, run = stage.partition("@")
    return {"align": f"methods.{run}", "train_preference": "preference"}.get(kind, "model")


def _smaller(stage: str) -> str:
    """What makes a stage's own part smaller."""
    optimizer = "take optimizer adamw8bit or adafactor, " if stage.startswith(("align", "train")) else "take "
    return f"train an adapter (lora), {optimizer}" if stage.startswith("align") else optimizer


def blocks_of_weights(s: Settings) -> dict[str, StrictModel | None]:
    """Key -> block, of all that may name weights, here or on the Hub."""
    where = f"params/{s.profile}.yaml"
    found: dict[str, StrictModel | None] = {f"{where}:model": s.model, f"{where}:preference": s.preference}
    found |= {f"{where}:methods.{name}": config for name, config in s.methods.items() if name in s.runs}
    found |= {f"{where}:scorers.{name}": scorer.config for name, scorer in s.scorers.items()}
    return found | {f"runs.{name}": run for name, run in s.runs.items()}


def missing_files(s: Settings) -> Iterator[str]:
    """What the settings name here and is not here: weights, and the data that the source reads."""
    where = f"params/{s.profile}.yaml"
    for path in plugins.load("sources", s.source).needs_files(s.data):
        if not Path(path).exists():
            yield f"{where}:data: {path} is not there; put the data there, or correct the path (docs/data.md)"
    for key, config in blocks_of_weights(s).items():
        for field, source in locations(config).items() if config else ():
            if source.commit is None and not Path(source.place).exists():
                page = "docs/scorers.md" if "scorers" in key else "docs/full_size.md"
                field = "from" if field == "released" else field
                yield f"{key}.{field}: {source.place} is not here; {page} says where to get it, or correct the path"
