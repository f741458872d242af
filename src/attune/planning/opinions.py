"""The scorers that had a part in a run: what it was trained on, and what it was selected by."""

from __future__ import annotations

from collections.abc import Callable

from attune.config import plugins
from attune.config.profile import DATA, PREFERENCE
from attune.config.resolve import Settings, read_yaml
from attune.config.schema import ConfigError, set_path
from attune.config.settings import MethodConfig
from attune.paths import Paths


def trained_on(name: str, settings: Settings) -> list[str]:
    """The scorers that a run was trained on, itself or by what it comes after: its gains there are no evidence.

    Those of its method; those that chose which pairs it learns from; the preference model's, which are the scorer whose
    CLIP it started from and the one that labelled its pairs; those of the run it goes on from; and what a released
    model states.
    """
    run = settings.runs.get(name)
    if run is None:
        return []
    found = list(run.trained_on)
    if run.method is not None:
        if run.after not in (DATA, PREFERENCE, name):
            found += trained_on(run.after, settings)
        found += settings.methods[name].trained_on
        if plugins.load("methods", run.method).Method.consumes != "prompts":
            found += _consensus(settings)
        if plugins.needs(run.method, "preference_model"):
            found += preference_trained_on(settings)
    return list(dict.fromkeys(found))


def preference_trained_on(settings: Settings) -> list[str]:
    """The scorers behind the preference model: those it starts from, and those that choose or label its pairs."""
    preference = settings.preference
    if preference is None:
        return []
    starts = [
        name for name, scorer in settings.scorers.items() if getattr(scorer.config, "path", None) == preference.clip
    ]
    return starts + _consensus(settings) + ([preference.ai_feedback.scorer] if preference.ai_feedback else [])


def _consensus(settings: Settings) -> list[str]:
    """The scorers that chose which training pairs are kept."""
    return settings.data.consensus.scorers if settings.data.consensus else []


def selected_by(name: str, settings: Settings) -> list[str]:
    """The scorers by which a run was selected.

    Those of its early stopping, of the search whose best settings it has, and of the run it goes on from.
    """
    run = settings.runs.get(name)
    if run is None or run.method is None:
        return []
    config = settings.methods[name]
    found = [] if run.after in (DATA, PREFERENCE, name) else selected_by(run.after, settings)
    if config.validation and config.validation.patience:
        found.append(config.validation.scorer)
    found += _searched_by(name, config, Paths(settings.profile))
    return list(dict.fromkeys(found))


def _searched_by(name: str, config: MethodConfig, paths: Paths) -> list[str]:
    """The objectives of the last search of a run, if its settings are the best that this found."""
    file = paths.best_settings(name)
    if not file.exists():
        return []
    found, values = read_yaml(file), config.model_dump()
    try:
        applied = all(set_path(values, key, value) == values for key, value in found["params"].items())
    except ConfigError:  # of a block that the run no longer has
        return []
    return list(found["scores"]) if applied else []


def by_run(what: Callable[[str, Settings], list[str]], settings: Settings) -> dict[str, list[str]]:
    """Run -> `what(run, settings)`, of the runs for which it is not empty."""
    return {name: found for name in settings.runs if (found := what(name, settings))}
