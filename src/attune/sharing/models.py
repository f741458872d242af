"""Which model is meant by a word: a run of the parameters, or an adapter or denoiser wherever it lies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from attune.config.profile import BASE
from attune.config.resolve import Settings
from attune.config.settings import Model
from attune.hub import parse
from attune.paths import Paths
from attune.text import shown


class UnknownModelError(ValueError):
    """No model is meant, or it is not there yet; the message says what to do."""


@dataclass(frozen=True)
class NamedModel:
    """A model and what it is called in captions and folders."""

    name: str
    source: str | None  # None: the base model as it is
    own: bool = False  # trained here: it may equal the base, where early stopping found that the start was best


def find_models(words: Iterable[str], settings: Settings) -> list[NamedModel]:
    """The models that words mean, each once, in order; of two of one name the second is called `name-2`.

    Raises:
        UnknownModelError: as `find_model`.
    """
    found: dict[str, NamedModel] = {}
    for word in dict.fromkeys(words):
        model = find_model(word, settings)
        name, number = model.name, 2
        while name in found:
            name, number = f"{model.name}-{number}", number + 1
        found[name] = NamedModel(name, model.source, model.own)
    return list(found.values())


def find_model(word: str, settings: Settings) -> NamedModel:
    """The model that a word means: a run, `base`, or a file, a folder or `owner/name@commit`.

    Raises:
        UnknownModelError: there is no such run and nothing of that name; or the run has not been trained.
    """
    if word == BASE:
        return NamedModel(BASE, None)
    if word in settings.runs:
        return _run(word, settings)
    known = ", ".join(dict.fromkeys([BASE, *settings.runs]))
    try:
        source = parse(word)
    except (OSError, ValueError) as error:
        reason = f": {error}" if "/" in word else ""
        raise UnknownModelError(f"no run {shown(word)}; runs of params.yaml: {known}{reason}") from None
    if source.commit is None and not Path(source.place).exists():
        raise UnknownModelError(f"no run and no file {shown(word)}; runs of params.yaml: {known}")
    return NamedModel(re.sub(r"[^\w.-]+", "-", source.stem)[:60].strip(".-") or "model", word)


def trained_folder(run: str, settings: Settings) -> Path:
    """The folder of a run that was trained here.

    Raises:
        UnknownModelError: there is no such run, it trains nothing, or it has not been trained.
    """
    if run not in settings.runs:
        raise UnknownModelError(f"no run {shown(run)}; runs of params.yaml: {', '.join(settings.runs)}")
    if settings.runs[run].method is None:
        raise UnknownModelError(
            f"runs.{run}: nothing is trained, so there is nothing to share; say a run with a method"
        )
    folder = Paths(settings.profile).model(run)
    try:
        made = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnknownModelError(f"{folder}: {run} is not trained yet: `dvc repro align@{run}`") from None
    except ValueError as error:
        raise UnknownModelError(f"{folder}/run.json is not JSON ({error}): `dvc repro --force align@{run}`") from None
    if not _is_same(made.get("base"), settings.model):
        raise UnknownModelError(
            f"{folder}: {run} was trained on another base model than params/{settings.profile}.yaml:model says: "
            f"`dvc repro align@{run}`"
        )
    return folder


def _is_same(base: object, model: Model) -> bool:
    """Whether run.json names this base; settings that there were none of at that time are what they are by default."""
    try:
        return Model.model_validate(base) == model
    except ValidationError:
        return False


def _run(name: str, settings: Settings) -> NamedModel:
    run = settings.runs[name]
    if run.method is None:
        return NamedModel(name, run.released)
    return NamedModel(name, str(trained_folder(name, settings)), own=True)
