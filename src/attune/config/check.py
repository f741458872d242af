"""params.yaml -> typed values, in well under a second: nothing here imports torch.

One file, one `profile:` and complete `profiles.<name>` blocks, so that `dvc exp run -S` always means what it
says. Every block is strict: an unknown key, a wrong type or a value out of range is an error that names the
key and the file. A method, scorer or data source brings its own `Config` (see `attune.config.plugins`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from attune.config import plugins
from attune.config.plugins import plugin_config
from attune.config.profile import Params, Profile, Run
from attune.config.schema import ConfigError, StrictModel, check, number_type, set_path
from attune.config.search import Config as SearchConfig
from attune.config.settings import PreferenceConfig

RESERVED = ("base", "embedded", "preference")  # a run's name is a folder of models/ and a file of reports/train


def read_params(path: Path | str = "params.yaml") -> dict[str, Any]:
    """The file as plain values. ruamel, not PyYAML: DVC writes `1e-05`, which PyYAML reads as a string."""
    try:
        values = YAML(typ="safe").load(Path(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; run from the repository root") from None
    except YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping, found {type(values).__name__}")
    return values


def load(path: Path | str = "params.yaml") -> tuple[Params, Profile]:
    """Reads and checks the file and its active profile, plug-in blocks included.

    Raises:
        ConfigError: naming the key.
    """
    params = check(Params, read_params(path))
    if params.profile not in params.profiles:
        raise ConfigError(f"profile: {params.profile!r} is not in profiles: {', '.join(params.profiles)}")
    where = f"profiles.{params.profile}"
    profile = check(Profile, params.profiles[params.profile], where)
    plugins.find("backbones", profile.model.backbone, f"{where}.model.backbone")
    plugin_config("sources", profile.data.get("source"), _without(profile.data, "source"), f"{where}.data")
    check(PreferenceConfig, profile.preference, f"{where}.preference")
    for name, run in params.run_methods.items():
        plugins.find("methods", run.method, f"run_methods.{name}.method")
    for name, block in profile.methods.items():
        plugin_config("methods", method_of(name, params), block, f"{where}.methods.{name}")
    for name, block in profile.scorers.items():
        plugin_config("rewards", name, block, f"{where}.scorers.{name}")
    _check_together(params, profile, where)
    _check_search(params, profile, where)
    return params, profile


def _check_together(params: Params, profile: Profile, where: str) -> None:
    """What no block can know by itself."""
    if profile.data.get("test_prompts", profile.generate.prompts) < profile.generate.prompts:
        raise ConfigError(f"{where}.generate.prompts: {profile.generate.prompts} is more than data.test_prompts")
    _check_scorers(profile, where)
    _check_feedback(profile, where)
    for name, run in params.run_methods.items():
        if name in RESERVED:
            raise ConfigError(f"run_methods.{name}: the name is taken")
        if name not in profile.methods:
            raise ConfigError(f"run_methods.{name}: {where}.methods has no block of that name")
        _check_start(name, run, profile.methods[name].get("start"), params, where)
        _check_watched(name, run, profile.methods[name])
    for name in params.evaluate.extra:
        if name == "base" or name in profile.methods:
            raise ConfigError(f"evaluate.extra.{name}: the name is taken")


def _check_scorers(profile: Profile, where: str) -> None:
    """Every scorer that is asked for by name must have a block."""
    asked = {f"{where}.data.score_with": profile.data.get("score_with", [])}
    for name, block in profile.methods.items():
        asked[f"{where}.methods.{name}.rewards"] = block.get("rewards", [])
        asked[f"{where}.methods.{name}.validation.scorer"] = [(block.get("validation") or {}).get("scorer")]
    for key, names in asked.items():
        if unknown := [name for name in names if name is not None and name not in profile.scorers]:
            raise ConfigError(f"{key}: {unknown[0]!r} is not in scorers: {', '.join(profile.scorers)}")


def _check_feedback(profile: Profile, where: str) -> None:
    """A scorer can label pairs only if the prepare stage writes its scores beside them."""
    scored = profile.data.get("score_with", [])
    blocks = {"preference": profile.preference}
    blocks |= {f"methods.{name}": block for name, block in profile.methods.items()}
    for key, block in blocks.items():
        feedback = block.get("ai_feedback")
        if feedback is not None and feedback["scorer"] not in scored:
            asked = f"{where}.{key}.ai_feedback.scorer"
            raise ConfigError(f"{asked}: {feedback['scorer']!r} is not in data.score_with: {scored}")


def _check_watched(name: str, run: Run, block: Mapping[str, Any]) -> None:
    """DVC must notice a change of the scorers that a training asks: their blocks, and their code."""
    asks = "validation" if block.get("validation") else "rewards" if block.get("rewards") else None
    if asks and run.reads != "scorers":
        raise ConfigError(f"run_methods.{name}.reads: must be scorers, for its block has {asks} (given {run.reads!r})")
    if asks == "validation" and run.code != "src/attune":
        raise ConfigError(
            f"run_methods.{name}.code: must be src/attune, for its block has held_out (given {run.code!r})"
        )


def _check_start(name: str, run: Run, start: str | None, params: Params, where: str) -> None:
    """DVC orders and watches by `needs` and `code`, training goes by `start`: of models here they must agree."""
    watched, to_be_made = {run.needs, run.code}, {f"models/{other}" for other in params.run_methods}
    for model in watched & to_be_made:
        if start != model:
            raise ConfigError(f"{where}.methods.{name}.start: must be {model}, which run_methods.{name} stands on")
    if start is None or "@" in start:
        return
    if start not in watched:
        raise ConfigError(f"run_methods.{name}.needs: must be {start}, where the run starts (given {run.needs!r})")
    if start == f"models/{name}" or (start not in to_be_made and not Path(start).exists()):
        raise ConfigError(f"{where}.methods.{name}.start: {start} is neither here nor another run's model")


def _check_search(params: Params, profile: Profile, where: str) -> None:
    """A search may only ask for settings that its run's method accepts, at both ends of every range."""
    for name, block in profile.search.items():
        here = f"{where}.search.{name}"
        if name not in profile.methods:
            raise ConfigError(f"{here}: {where}.methods has no block of that name")
        search = check(SearchConfig, block, here)
        if unknown := [scorer for scorer in search.objectives if scorer not in profile.scorers]:
            raise ConfigError(f"{here}.objectives: {unknown[0]!r} is not in scorers: {', '.join(profile.scorers)}")
        method = plugins.config_class("methods", method_of(name, params))
        settings = dict(profile.methods[name])
        for key, value in search.fixed.items():
            settings = try_setting(method, settings, key, value, f"{here}.fixed.{key}")
        for key, dimension in search.space.items():
            whole = dimension.choices is None and number_type(method, key, f"{here}.space.{key}") is int
            for value in dimension.choices or (dimension.low, dimension.high):
                try_setting(method, settings, key, int(value) if whole else value, f"{here}.space.{key}")


def try_setting(
    method: type[StrictModel], settings: Mapping[str, Any], key: str, value: Any, where: str
) -> dict[str, Any]:
    """The settings with a value put in, if the method accepts them; else an error at `where`, the one to blame."""
    try:
        changed = set_path(settings, key, value)
        check(method, changed)
    except ConfigError as error:
        raise ConfigError(f"{where}: {value!r} does not do: {error}") from None
    return changed


def update_params_file(changes: Mapping[str, Any], path: Path | str = "params.yaml") -> None:
    """Sets values in the file, by dotted key; comments, order and every other line stay as they are.

    Raises:
        ConfigError: a value is shared with another block by an anchor, which would change too; nothing is written.
    """
    yaml, wanted, written = _round_trip(), read_params(path), StringIO()
    values = yaml.load(Path(path))
    for dotted, value in changes.items():
        *blocks, last = dotted.split(".")
        reduce(lambda place, block: place[block], blocks, values)[last] = value
        wanted = set_path(wanted, dotted, value)
    yaml.dump(values, written)
    if YAML(typ="safe").load(written.getvalue()) != wanted:
        raise ConfigError(
            f"{path}: {', '.join(changes)}: another block shares these by an anchor; write them out there"
        )
    Path(path).write_text(written.getvalue(), encoding="utf-8")


def write_yaml(values: Mapping[str, Any], path: Path) -> None:
    """Plain values as a YAML file."""
    _round_trip().dump(dict(values), path)


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True  # no line is broken anew
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml


def method_of(name: str, params: Params) -> str:
    """The method a block `methods.<name>` belongs to: its run's, or of a block that is not run, as its name begins."""
    if name in params.run_methods:
        return params.run_methods[name].method
    methods = sorted(plugins.available("methods"), key=len)
    return next((method for method in reversed(methods) if f"{name}_".startswith(f"{method}_")), name)


def _without(block: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name != key}
