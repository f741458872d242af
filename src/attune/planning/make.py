"""From settings to the plans of all stages, as values; nothing is written here."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations
from pathlib import Path

from attune.config import plugins
from attune.config.plan import (
    EvaluatePlan,
    GeneratePlan,
    Origin,
    Plugin,
    PluginKind,
    PreferencePlan,
    PreparePlan,
    ReportPlan,
    RunFacts,
    RunPlan,
    SearchPlan,
    Session,
    plan_file,
)
from attune.config.profile import BASE, DATA, PREFERENCE
from attune.config.resolve import Settings, held_out_prompts
from attune.config.schema import StrictModel
from attune.config.settings import MethodConfig, Model
from attune.data.splits import VERDICTS
from attune.licenses import base_license
from attune.paths import Paths
from attune.planning.code import code_digests
from attune.planning.local_files import Digests
from attune.planning.opinions import by_run, selected_by, trained_on
from attune.planning.parts import generated_part, paths_in, prepared_parts, scorer_part
from attune.planning.seeds import settings_sha


def make(settings: Settings, digests: Digests) -> dict[Path, StrictModel]:
    """Every plan file and what it holds."""
    runs = {name: run_plan(name, settings, digests) for name in settings.runs}
    plans: dict[Path, StrictModel] = {
        plan_file("prepare"): _prepare(settings, digests),
        plan_file("preference"): _preference(settings, digests),
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
    plans[plan_file("report")] = _report(settings, digests, settings_sha(plans))
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
    if plugins.needs(run.method, "preference_model"):
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
        needs_preference=plugins.needs(run.method, "preference_model"),
        scorers={scorer: _scorer(scorer, settings) for scorer in asked},
        files=digests.of([*paths_in(settings.model), *paths_in(config), *paths_in(run), *_weights(asked, settings)]),
        code=code_digests(modules, without="" if config else "attune.finetune"),
    )


def _without_training(settings: Settings) -> Model:
    """The base model for stages that train nothing: what matters in a training alone is not set."""
    return settings.model.model_copy(update={"density": None})


def needs_preference_model(settings: Settings) -> bool:
    """Whether any run does, so that the model is trained at all."""
    return any(plugins.needs(run.method, "preference_model") for run in settings.runs.values())


def _prepare(settings: Settings, digests: Digests) -> PreparePlan:
    source = plugins.load("sources", settings.source)
    modules = ["attune.stages.prepare", plugins.module_name("sources", settings.source)]
    modules.append(plugins.module_name("backbones", settings.model.backbone))
    modules += [plugins.module_name("rewards", settings.scorers[name].plugin) for name in settings.data.score_with]
    files = [
        *paths_in(settings.model),
        *source.needs_files(settings.data),
        *_weights(settings.data.score_with, settings),
    ]
    return PreparePlan(
        profile=settings.profile,
        seed=settings.seed,
        model=_without_training(settings),
        sampling=settings.sampling,
        source=_plugin("sources", settings.source, settings.data.model_copy(update={"license": None})),
        score_with={name: _scorer(name, settings) for name in settings.data.score_with},
        files=digests.of(files),
        code=code_digests(modules),
        parts=prepared_parts(settings, digests),
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
    groups = "groups" in consumed.values() and "pairs" in plugins.load("sources", settings.source).GIVES
    pairs = "pairs" in consumed.values() or groups or needs_preference_model(settings)
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
        files=digests.of([*paths_in(settings.model), *paths_in(config)]) if config else {},
        code=code_digests(modules) if config else {},
    )


def _generate(name: str, settings: Settings, digests: Digests) -> GeneratePlan:
    run = settings.runs[name]
    return GeneratePlan(
        profile=settings.profile,
        run=name,
        seed=settings.seed,
        model=_without_training(settings),
        generate=settings.generate,
        files=digests.of([*paths_in(settings.model), *paths_in(run)]),
        code=code_digests(["attune.stages.generate", plugins.module_name("backbones", settings.model.backbone)]),
        parts={"images": generated_part(settings, settings.generate.sampling, paths_in(run), digests)},
    )


def _evaluate(name: str, settings: Settings, digests: Digests) -> EvaluatePlan:
    used = [plugins.module_name("rewards", scorer.plugin) for scorer in settings.scorers.values()]
    return EvaluatePlan(
        profile=settings.profile,
        run=name,
        scorers={scorer: _scorer(scorer, settings) for scorer in settings.scorers},
        files=digests.of(_weights(settings.scorers, settings)),
        code=code_digests(["attune.stages.evaluate", *used]),
        parts={name: scorer_part(name, "attune.evaluation.scoring", settings, digests) for name in settings.scorers},
    )


def _report(settings: Settings, digests: Digests, identity: str) -> ReportPlan:
    runs, paths = [BASE, *(name for name in settings.runs if name != BASE)], Paths(settings.profile)
    read = [file for a, b in permutations(runs, 2) if (file := paths.people(a, b)).exists()]
    others = [file for file in paths.seeds.glob("seed*.json") if file != paths.seed(settings.seed)]
    return ReportPlan(
        profile=settings.profile,
        seed=settings.seed,
        runs=runs,
        trained_on=by_run(trained_on, settings),
        selected_by=by_run(selected_by, settings),
        settings=identity if others else None,
        origin=_origin(settings),
        facts={name: _facts(run_plan(name, settings, digests)) for name in settings.runs},
        files=digests.of([*read, *others]),
        code=code_digests(["attune.stages.report"]),
    )


def _origin(settings: Settings) -> Origin:
    return Origin(
        base=settings.model.path,
        base_license=base_license(settings.model.path),
        source=settings.source,
        data_path=settings.data.model_dump().get("path"),
        data_license=settings.data.license,
    )


def _facts(run: RunPlan) -> RunFacts:
    method = run.method
    return RunFacts(
        method=method.name if method else None,
        paper=plugins.paper("methods", method.name) if method else None,
        starts_from=run.after or run.released,
        changed=plugins.changed_settings("methods", method.name, method.settings) if method else [],
    )


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
    return [path for name in names for path in paths_in(settings.scorers[name].config)]
