"""Stage plan: checks all settings against each other and the machine, and writes what every stage is to do.

`make plan` (`--show`) prints the table and the problems and writes nothing: a check before any work. With problems it
ends with 1 and a line for each. ONLINE=1 (`--online`) asks the Hub too, whether what is to be downloaded exists.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from attune import hub
from attune.config.plan import FOLDER, to_json
from attune.config.profile import BASE
from attune.config.resolve import Settings, load
from attune.config.schema import ConfigError, StrictModel
from attune.config.settings import locations
from attune.costs import noted_seconds
from attune.files import write_atomically
from attune.paths import CHECKPOINTS, Paths, project_root
from attune.planning import base_problems, costs
from attune.planning.checkpoints import saved_trainings
from attune.planning.data_problems import notes
from attune.planning.local_files import Digests
from attune.planning.make import make
from attune.planning.problems import blocks_of_weights, machine, missing_files, problems, too_large
from attune.text import message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", action="store_true", help="print the table and the problems, and write nothing")
    parser.add_argument("--online", action="store_true", help="ask the Hub whether what is to be downloaded exists")
    given = parser.parse_args()
    try:
        settings = load()
    except ConfigError as error:
        sys.exit(str(error))
    try:
        table, found = checked(settings, given.online)
    except (ValueError, OSError) as error:  # a file of the base model is no good, and says so by its path
        sys.exit(message(f"plan: {error}"))
    if given.show:
        say(costs.as_text(table))
    if found:
        sys.exit(message("\n".join(found)))
    if given.show:
        for note in [*base_problems.notes(settings), *notes(settings)]:
            say(f"\nnote: {note}")
        say_saved(settings)
    else:
        write(settings)


def checked(settings: Settings, online: bool) -> tuple[list[costs.Row], list[str]]:
    """The table, and a line for each problem. Raises ValueError or OSError if a file of the base cannot be read."""
    here, table = machine(), list(costs.rows(settings, _downloads(settings), noted_seconds(), _rows_here(settings)))
    found = [*missing_files(settings), *problems(settings, costs.facts(settings).denoiser, here)]
    return table, [*found, *too_large(settings, table, here), *(_missing_on_the_hub(settings) if online else ())]


def texts(settings: Settings) -> dict[Path, str]:
    """Every plan file and its text."""
    digests = Digests(project_root() / CHECKPOINTS / "digests.json")
    plans = {file: to_json(plan) for file, plan in make(settings, digests).items()}
    digests.save()
    return plans


def write(settings: Settings, folder: Path = FOLDER) -> None:
    """Writes the plans that have changed, and removes those of runs that are gone."""
    plans = {folder / file.name: text for file, text in texts(settings).items()}
    for stale in set(folder.glob("*.json")) - set(plans):
        stale.unlink()
    for file, text in plans.items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_atomically(file, text.encode())


def say_saved(settings: Settings) -> None:
    """Lists the checkpoints of trainings that did not end."""
    if saved := list(saved_trainings(project_root(), settings.profile, texts(settings))):
        listed = "\n".join(f"  {training}" for training in saved)
        say(f"\ncheckpoints of trainings that did not end (make clean-checkpoints removes the stale ones):\n{listed}")


def say(text: str) -> None:
    """Writes to the terminal; this is what `make plan` is asked for."""
    sys.stdout.write(text + "\n")


def _rows_here(settings: Settings) -> dict[str, int]:
    """Training rows that are prepared already."""
    file = Paths(settings.profile).reports / "data.json"
    if not file.exists():
        return {}
    counts = json.loads(file.read_text())
    return costs.training_rows(counts)


def _downloads(settings: Settings) -> dict[str, float | None]:
    """Stage -> bytes to download: None where something on the Hub is not in the cache and its size is not known."""
    configs: dict[str, list[StrictModel | None]] = {
        "prepare": [settings.model, settings.data],
        "train_preference": [settings.preference],
        f"evaluate@{BASE}": [scorer.config for scorer in settings.scorers.values()],
    }
    sources = {stage: [s for c in some if c for s in locations(c).values()] for stage, some in configs.items()}
    return {stage: 0 if all(map(hub.is_here, found)) else None for stage, found in sources.items()}


def _missing_on_the_hub(settings: Settings) -> Iterator[str]:
    """What the settings name on the Hub and the Hub does not have."""
    blocks = {f"params/{settings.profile}.yaml:data": settings.data, **blocks_of_weights(settings)}
    keys: dict[hub.Source, str] = {}
    for key, config in blocks.items():
        for field, source in locations(config).items() if config else ():
            keys.setdefault(source, f"{key}.{'from' if field == 'released' else field}")
    for source, key in keys.items():
        if source.commit is not None and (problem := _problem_on_the_hub(source)):
            yield f"{key}: {problem}"


def _problem_on_the_hub(source: hub.Source) -> str | None:
    """Why a source cannot be fetched, as a line; None if it can. It may be a model or a data set."""
    problems = []
    for repo_type in ("model", "dataset"):
        try:
            there = hub.list_files(source, repo_type)
        except hub.HubError as error:
            problems.append(str(error))
        else:
            return None if there else f"{source}: the repository has no such file at this commit"
    return problems[0]


if __name__ == "__main__":
    main()
