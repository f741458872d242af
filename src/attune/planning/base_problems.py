"""Settings that the base model cannot have: told from its kind, and from its files where they are here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attune.backbones._diffusers import in_diffusers
from attune.config import plugins
from attune.config.resolve import Settings
from attune.hub import parse
from attune.planning.costs import facts
from attune.text import shown
from attune.weights import tensor_names


def base(s: Settings) -> Iterator[str]:
    """A line for each setting that would be refused when the model is loaded, or when a training begins."""
    yield from _refused(s)
    yield from _times(s)
    yield from _resolution(s)
    yield from _targets(s)
    yield from _flow(s)


def notes(s: Settings) -> Iterator[str]:
    """What stops nothing and is to be known."""
    if not _is_flow(s):
        return
    where = f"params/{s.profile}.yaml"
    for key, sampling in (("sampling", s.sampling), ("generate.sampling", s.generate.sampling)):
        if sampling.eta > 0:
            yield f"{where}:{key}.eta: {sampling.eta:g} adds noise at every step; published samplers of flows have 0"


def _is_flow(s: Settings) -> bool:
    names = in_diffusers(s.model)
    return names is not None and names.is_flow


def _refused(s: Settings) -> Iterator[str]:
    """What a backbone says of its block alone: its file may have `check_settings(model)`, which raises ValueError."""
    check = getattr(plugins.load("backbones", s.model.backbone), "check_settings", None)
    try:
        if check is not None:
            check(s.model)
    except ValueError as error:
        yield f"params/{s.profile}.yaml:{error}"


def _times(s: Settings) -> Iterator[str]:
    """What the scheduler of a flow model says against it, where it is here."""
    tell, source = getattr(plugins.load("backbones", s.model.backbone), "times", None), parse(s.model.path)
    if tell is None or source.commit is not None or not Path(source.place).is_dir():
        return
    try:
        tell(s.model)
    except (ValueError, OSError) as error:
        yield f"params/{s.profile}.yaml:model.path: {error}"


def _resolution(s: Settings) -> Iterator[str]:
    resolution, multiple = s.model.resolution, facts(s).multiple
    if resolution is not None and resolution % multiple:
        below = resolution // multiple * multiple
        near = f"{below} or {below + multiple}" if below else str(multiple)
        yield (
            f"params/{s.profile}.yaml:model.resolution: {resolution} is not a multiple of {multiple}, the pixels that "
            f"{s.model.backbone} puts together; write {near}"
        )


def _targets(s: Settings) -> Iterator[str]:
    """Endings of `lora.targets` that fit no module, where the denoiser is here."""
    names, source = in_diffusers(s.model), parse(s.model.path)
    folder = Path(source.place) / names.part if names and source.commit is None else None
    listed = {
        name: config.lora.targets
        for name, config in s.methods.items()
        if name in s.runs and config.lora is not None and not isinstance(config.lora.targets, str)
    }
    if folder is None or not folder.is_dir() or not listed:
        return
    weights = [name.removesuffix(".weight") for name in tensor_names(folder) if name.endswith(".weight")]
    if not weights:  # loading says what is missing
        return
    for name, targets in listed.items():
        for ending in targets:
            if not any(f".{weight}".endswith(f".{ending}") for weight in weights):
                key = f"params/{s.profile}.yaml:methods.{name}.lora.targets"
                yield f"{key}: no module of {folder} ends in {shown(ending)}; one is called {shown(weights[0])}"


def _flow(s: Settings) -> Iterator[str]:
    where = f"params/{s.profile}.yaml"
    if not _is_flow(s):
        return
    for name, config in s.methods.items():
        if name in s.runs and getattr(config, "min_snr", None) is not None:
            yield (
                f"{where}:methods.{name}.min_snr: is for models that predict noise, and {s.model.backbone} is a flow; "
                "leave it out, model.density says which times its training sees"
            )
        start, steps = getattr(config, "start_step", None), getattr(config, "steps", None)
        if name in s.runs and start is not None and steps is not None and start >= steps - 1:
            yield (
                f"{where}:methods.{name}.start_step: {start} of {steps} steps leaves no candidates, because the last "
                f"step of a flow adds no noise; write less than {steps - 1}"
            )
