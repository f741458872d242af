"""From settings to the plans of all stages, as values; nothing is written here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import permutations
from pathlib import Path

from attune.config import plugins
from attune.config.plan import (
    EvaluatePlan,
    GeneratePlan,
    Plugin,
    PluginKind,
    PreferencePlan,
    PreparePlan,
    ReportPlan,
    RunPlan,
    SearchPlan,
    Session,
    plan_file,
)
from attune.config.profile import BASE, DATA, PREFERENCE
from attune.config.resolve import Settings, held_out_prompts, read_yaml
from attune.config.schema import ConfigError, StrictModel, set_path
from attune.config.settings import MethodConfig, locations
from attune.data.splits import VERDICTS
from attune.paths import Paths
from attune.planning.code import code_digests
from attune.planning.local_files import Digests


def make(settings: Settings, digests: Digests) -> dict[Path, StrictModel]:
    """Every plan file and what it holds."""
    runs = {name: run_plan(name, settings, digests) for name in settings.runs}
    plans: dict[Path, StrictModel] = {
        plan_file("prepare"): _prepare(settings, digests),
        plan_file("preference"): _preference(settings, digests),
        plan_file("report"): _report(settings, digests),
        plan_file("session"): Session(
            profile=settings.profile,
            tracking=settings.tracking,
            tools=settings.tools,
            threads=settings.threads,
            checkpoint_seconds=settings.checkpoint_seconds,
            samples=settings.generate.sampling,
            trained_on=by_run(trained_on, settings),
            wanted=wanted_rows(settings),
            data_license=settings.data.license,
        ),
    }
    for name, run in runs.items():
        plans[plan_file("align", name)] = run
        plans[plan_file("generate", name)] = _generate(name, settings, digests)
        plans[plan_file("evaluate", name)] = _evaluate(name, settings, digests)
        plans[plan_file("sweep", name)] = _search(run, settings, digests)
    return plans


def run_plan(name: str, settings: Settings, digests: Digests) -> RunPlan:
    """The plan of a run. What it starts from is another run's model, if it comes after one."""
    run = settings.runs[name]
    config = settings.methods[name] if run.method is not None else None
    asked = _asked(config)
    modules = ["attune.stages.align"]
    if run.method is not None:
        modules.append(plugins.module_name("backbones", settings.model.backbone))
        modules.append(plugins.module_name("methods", run.method))
    if needs(run.method, "preference_model"):
        modules.append("attune.spm.model")
    modules += [plugins.module_name("rewards", settings.scorers[scorer].plugin) for scorer in asked]
    return RunPlan(
        profile=settings.profile,
        run=name,
        seed=settings.seed,
        model=settings.model,
        method=None if config is None else _plugin("methods", settings.method_of(name), config),
        released=run.released,
        after=None if run.after in (DATA, PREFERENCE) else run.after,
        needs_preference=needs(run.method, "preference_model"),
        scorers={scorer: _scorer(scorer, settings) for scorer in asked},
        files=digests.of([*_paths(settings.model), *_paths(config), *_paths(run), *_weights(asked, settings)]),
        code=code_digests(modules, without="" if config else "attune.finetune"),
    )


def trained_on(name: str, settings: Settings) -> list[str]:
    """The scorers that a run was trained on, itself or by what it comes after: its gains there are no evidence.

    Those of its method; the preference model's, which are the scorer whose CLIP it started from and the one that
    labelled its pairs; those of the run it goes on from; and what a released model states.
    """
    run = settings.runs.get(name)
    if run is None:
        return []
    found = list(run.trained_on)
    if run.method is not None:
        if run.after not in (DATA, PREFERENCE, name):
            found += trained_on(run.after, settings)
        found += settings.methods[name].trained_on
        if needs(run.method, "preference_model"):
            found += preference_trained_on(settings)
    return list(dict.fromkeys(found))


def preference_trained_on(settings: Settings) -> list[str]:
    """The scorers behind the preference model: those with the weights it starts from, and the one that labels pairs."""
    preference = settings.preference
    if preference is None:
        return []
    starts = [
        name for name, scorer in settings.scorers.items() if getattr(scorer.config, "path", None) == preference.clip
    ]
    return starts + ([preference.ai_feedback.scorer] if preference.ai_feedback else [])


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


def needs(method: str | None, what: str) -> bool:
    """Whether a method needs `preference_model` or `rewards`."""
    return method is not None and what in plugins.load("methods", method).Method.needs


def needs_preference_model(settings: Settings) -> bool:
    """Whether any run does, so that the model is trained at all."""
    return any(needs(run.method, "preference_model") for run in settings.runs.values())


def _prepare(settings: Settings, digests: Digests) -> PreparePlan:
    source = plugins.load("sources", settings.source)
    modules = ["attune.stages.prepare", plugins.module_name("sources", settings.source)]
    modules.append(plugins.module_name("backbones", settings.model.backbone))
    modules += [plugins.module_name("rewards", settings.scorers[name].plugin) for name in settings.data.score_with]
    files = [*_paths(settings.model), *source.needs_files(settings.data), *_weights(settings.data.score_with, settings)]
    return PreparePlan(
        profile=settings.profile,
        seed=settings.seed,
        model=settings.model,
        sampling=settings.sampling,
        source=_plugin("sources", settings.source, settings.data.model_copy(update={"license": None})),
        score_with={name: _scorer(name, settings) for name in settings.data.score_with},
        files=digests.of(files),
        code=code_digests(modules),
    )


def rows_of(method: str, source: str) -> str:
    """What a method's batches are drawn from: what it consumes; pairs, where it takes a source's pairs apart."""
    consumes = plugins.load("methods", method).Method.consumes
    return "pairs" if consumes in VERDICTS and "pairs" in plugins.load("sources", source).GIVES else consumes


def wanted_rows(settings: Settings) -> dict[str, int]:
    """Count -> the fewest that are needed, as `prepare` counts them: `prompts/<split>`, `pairs/train` and so on."""
    trained = {name: run.method for name, run in settings.runs.items() if run.method is not None}
    consumed = {name: rows_of(method, settings.source) for name, method in trained.items()}
    held_out = held_out_prompts(settings)
    pairs = "pairs" in consumed.values() or needs_preference_model(settings)
    choosing = [  # ties are dropped, unless a scorer decides them
        name
        for name, rows in consumed.items()
        if rows == "pairs" and getattr(settings.methods[name], "ai_feedback", None) is None
    ]
    wanted = {
        "prompts/train": int(bool(trained)),
        "prompts/validation": held_out["validation_prompts"],
        "prompts/test": held_out["test_prompts"],
        "pairs/train": int(pairs),
        "choices/train": int(bool(choosing)),
        **{name: 1 for rows in consumed.values() for name in VERDICTS.get(rows, ())},
    }
    return {name: n for name, n in wanted.items() if n}


def _preference(settings: Settings, digests: Digests) -> PreferencePlan:
    config = settings.preference if needs_preference_model(settings) else None
    modules = ["attune.stages.train_preference", plugins.module_name("backbones", settings.model.backbone)]
    return PreferencePlan(
        profile=settings.profile,
        seed=settings.seed,
        model=settings.model,
        settings=None if config is None else config.model_dump(mode="json"),
        files=digests.of([*_paths(settings.model), *_paths(config)]) if config else {},
        code=code_digests(modules) if config else {},
    )


def _generate(name: str, settings: Settings, digests: Digests) -> GeneratePlan:
    run = settings.runs[name]
    modules = ["attune.stages.generate", plugins.module_name("backbones", settings.model.backbone)]
    return GeneratePlan(
        profile=settings.profile,
        run=name,
        seed=settings.seed,
        model=settings.model,
        generate=settings.generate,
        files=digests.of([*_paths(settings.model), *_paths(run)]),
        code=code_digests(modules),
    )


def _evaluate(name: str, settings: Settings, digests: Digests) -> EvaluatePlan:
    used = [plugins.module_name("rewards", scorer.plugin) for scorer in settings.scorers.values()]
    return EvaluatePlan(
        profile=settings.profile,
        run=name,
        scorers={scorer: _scorer(scorer, settings) for scorer in settings.scorers},
        files=digests.of(_weights(settings.scorers, settings)),
        code=code_digests(["attune.stages.evaluate", *used]),
    )


def _report(settings: Settings, digests: Digests) -> ReportPlan:
    runs, paths = [BASE, *(name for name in settings.runs if name != BASE)], Paths(settings.profile)
    answers = [paths.people(a, b) for a, b in permutations(runs, 2)]
    return ReportPlan(
        profile=settings.profile,
        seed=settings.seed,
        runs=runs,
        trained_on=by_run(trained_on, settings),
        selected_by=by_run(selected_by, settings),
        files=digests.of(file for file in answers if file.exists()),
        code=code_digests(["attune.stages.report"]),
    )


def by_run(what: Callable[[str, Settings], list[str]], settings: Settings) -> dict[str, list[str]]:
    """Run -> `what(run, settings)`, of the runs for which it is not empty."""
    return {name: found for name in settings.runs if (found := what(name, settings))}


def _search(run: RunPlan, settings: Settings, digests: Digests) -> SearchPlan:
    search = settings.search.get(run.run) if run.method else None
    objectives = search.objectives if search else []
    used = [plugins.module_name("rewards", settings.scorers[scorer].plugin) for scorer in objectives]
    return SearchPlan(
        profile=settings.profile,
        run=run,
        search=None if search is None else search.model_dump(mode="json"),
        objectives={scorer: _scorer(scorer, settings) for scorer in objectives},
        sampling=settings.generate.sampling,
        files=digests.of(_weights(objectives, settings)),
        code=code_digests(["attune.stages.sweep", *used]) if search else {},
    )


def _asked(config: MethodConfig | None) -> list[str]:
    """The scorers that a training asks."""
    if config is None:
        return []
    watched = [config.validation.scorer] if config.validation else []
    return list(dict.fromkeys([*getattr(config, "rewards", {}), *watched]))


def _plugin(kind: PluginKind, name: str, config: StrictModel) -> Plugin:
    return Plugin(kind=kind, name=name, settings=config.model_dump(mode="json"))


def _scorer(name: str, settings: Settings) -> Plugin:
    scorer = settings.scorers[name]
    return _plugin("rewards", scorer.plugin, scorer.config)


def _weights(names: Iterable[str], settings: Settings) -> list[str]:
    """The local files of scorers."""
    return [path for name in names for path in _paths(settings.scorers[name].config)]


def _paths(config: StrictModel | None) -> list[str]:
    """The local files and folders that settings name, with the layout (.json) that may lie beside a file of weights."""
    found = [] if config is None else [s.place for s in locations(config).values() if s.commit is None]
    layouts = [str(Path(place).with_suffix(".json")) for place in found if Path(place).is_file()]
    return found + [layout for layout in layouts if layout not in found and Path(layout).exists()]
