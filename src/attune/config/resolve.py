"""From the parameter files to checked, typed settings.

`params.yaml` names the profile, `params/<profile>.yaml` holds what it decides, and an untracked `params.local.yaml` may
override single values of it. Every block is strict, and a method, scorer or source checks its own (`Config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from attune.config import plugins
from attune.config.plain import FILE_BYTES, check_expanded, check_plain, yaml_fault
from attune.config.profile import Generate, Params, Profile, Run
from attune.config.schema import ConfigError, check
from attune.config.search import Config as SearchConfig
from attune.config.settings import MethodConfig, Model, PreferenceConfig, Sampling, ScorerConfig
from attune.config.sources import SourceConfig
from attune.text import shown

PARAMS, LOCAL, PROFILES = Path("params.yaml"), Path("params.local.yaml"), Path("params")


@dataclass(frozen=True)
class Scorer:
    """A scorer of a profile: its name there, the plug-in it is, and that plug-in's settings."""

    name: str
    plugin: str
    config: ScorerConfig


@dataclass(frozen=True)
class Settings:
    """All that the parameter files decide, every default filled in."""

    profile: str
    runs: Mapping[str, Run]
    tracking: str | None
    tools: Mapping[str, bool | str]
    seed: int
    threads: int
    checkpoint_seconds: float
    allow_cpu: bool
    model: Model
    sampling: Sampling
    source: str
    data: SourceConfig
    preference: PreferenceConfig | None
    methods: Mapping[str, MethodConfig]  # of every run that trains, and of blocks that no run uses
    generate: Generate
    scorers: Mapping[str, Scorer]
    search: Mapping[str, SearchConfig]

    def method_of(self, name: str) -> str:
        """The method that the block `methods.<name>` belongs to."""
        return method_of(name, self.runs)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """A YAML file as plain values. ruamel, not PyYAML: DVC writes `1e-05`, which PyYAML reads as a string.

    Raises:
        ConfigError: naming the file, and the line or the key; `attune.config.plain` has the rules.
    """
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size > FILE_BYTES:
            raise ConfigError(f"{path} has more than {FILE_BYTES:,} bytes, so it is no parameter file")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no file")
        check_expanded(YAML(typ="safe").compose(path), path)
        values = YAML(typ="safe").load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; run from the repository's root") from None
    except ConfigError:
        raise
    except Exception as error:  # whatever a constructor of YAML meets in a text that is none
        raise ConfigError(f"{path} is not valid YAML: {yaml_fault(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping, found {type(values).__name__}")
    check_plain(values, path)
    return values


def load(root: Path | str = ".") -> Settings:
    """Reads and checks the parameter files below `root`.

    Raises:
        ConfigError: with a line for each mistake, naming key and file.
    """
    root = Path(root)
    params = check(Params, read_yaml(root / PARAMS))
    return resolve(params, _profile_values(root, params.profile), f"params/{params.profile}.yaml:")


def resolve(params: Params, values: Mapping[str, Any], where: str = "") -> Settings:
    """Checks a profile's values, with the blocks of its plug-ins.

    Args:
        where: put before the keys of the profile in messages, without a dot between them.
    """
    profile = check(Profile, values, where)
    plugins.find("backbones", profile.model.backbone, f"{where}model.backbone")
    for name, run in params.runs.items():
        if run.method is not None:
            plugins.find("methods", run.method, f"runs.{name}.method")
    source, data = _source(profile.data, where)
    searched = [name for name in profile.search if method_of(name, params.runs) in plugins.available("methods")]
    trained = [name for name, run in params.runs.items() if run.method is not None]
    blocks: dict[str, Mapping[str, Any]] = {name: {} for name in [*trained, *searched]}
    blocks |= profile.methods
    methods = {
        name: plugins.plugin_config("methods", method_of(name, params.runs), block, f"{where}methods.{name}")
        for name, block in blocks.items()
    }
    block = profile.preference
    preference = None if block is None else check(PreferenceConfig, block, f"{where}preference")
    settings = Settings(
        profile=params.profile,
        runs=params.runs,
        tracking=params.tracked.mlflow,
        tools=params.tracked.tools,
        **{key: getattr(profile, key) for key in ("seed", "threads", "checkpoint_seconds", "allow_cpu")},
        **{key: getattr(profile, key) for key in ("model", "sampling", "generate")},
        source=source,
        data=data,
        preference=preference,
        methods=methods,
        scorers={name: _scorer(name, block, where) for name, block in profile.scorers.items()},
        search={name: check(SearchConfig, block, f"{where}search.{name}") for name, block in profile.search.items()},
    )
    return replace(settings, data=_with_wanted(data, held_out_prompts(settings)))


def held_out_prompts(settings: Settings) -> dict[str, int]:
    """`validation_prompts` and `test_prompts` -> how many prompts of that split the runs ask for at most."""
    trained = {name for name, run in settings.runs.items() if run.method is not None}
    watched = [config.validation for name, config in settings.methods.items() if name in trained]
    searched = [search.prompts for name, search in settings.search.items() if name in trained]
    validation = max([*(each.prompts for each in watched if each), *searched], default=0)
    return {"validation_prompts": validation, "test_prompts": settings.generate.prompts}


def _with_wanted(data: SourceConfig, wanted: Mapping[str, int]) -> SourceConfig:
    """The block `data` with what the runs ask for in place of null, where the source has such a setting."""
    return data.model_copy(update={key: n for key, n in wanted.items() if getattr(data, key, n) is None})


def method_of(name: str, runs: Mapping[str, Run]) -> str:
    """The method a block `methods.<name>` belongs to: its run's, or of a block without a run, as its name begins."""
    run = runs.get(name)
    if run is not None and run.method is not None:
        return run.method
    methods = sorted(plugins.available("methods"), key=len)
    return next((method for method in reversed(methods) if f"{name}_".startswith(f"{method}_")), name)


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with others put over them: mappings are merged, everything else is replaced."""
    result = dict(values)
    for key, change in changes.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(change, Mapping):
            result[key] = merged(old, change)
        else:
            result[key] = change
    return result


def _profile_values(root: Path, profile: str) -> dict[str, Any]:
    """What params/<profile>.yaml says, with params.local.yaml over it."""
    file = root / PROFILES / f"{profile}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in (root / PROFILES).glob("*.yaml"))) or "none"
        raise ConfigError(f"profile: there is no {PROFILES / file.name}; there are: {known}")
    values = read_yaml(file)
    if not (root / LOCAL).exists():
        return values
    local = read_yaml(root / LOCAL)
    if unknown := sorted(set(local) - {path.stem for path in (root / PROFILES).glob("*.yaml")}):
        raise ConfigError(
            f"{LOCAL}: {unknown[0]} is not a profile; this file overrides values of profiles, say "
            f"`{profile}: {{threads: 4}}`, and DVC reads profile and runs from {PARAMS} alone"
        )
    for name, block in local.items():
        if not isinstance(block, Mapping | None):
            raise ConfigError(f"{LOCAL}: {name}: must be a block of settings (given {shown(block)})")
    return merged(values, local.get(profile) or {})


def _source(block: Mapping[str, Any], where: str) -> tuple[str, SourceConfig]:
    rest = {key: value for key, value in block.items() if key != "source"}
    name: Any = block.get("source")  # checked with the rest
    return name, plugins.plugin_config("sources", name, rest, f"{where}data")


def _scorer(name: str, block: Mapping[str, Any], where: str) -> Scorer:
    plugin = block.get("scorer", name)
    if plugin not in plugins.available("rewards"):
        known = ", ".join(plugins.available("rewards"))
        raise ConfigError(f"{where}scorers.{name}.scorer: no scorer {shown(plugin)}; there are {known}")
    rest = {key: value for key, value in block.items() if key != "scorer"}
    return Scorer(name, plugin, plugins.plugin_config("rewards", plugin, rest, f"{where}scorers.{name}"))
