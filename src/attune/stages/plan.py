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

from attune.config import costs
from attune.config.local_files import Digests
from attune.config.make_plan import make
from attune.config.plan import FOLDER, to_json
from attune.config.resolve import Settings, load
from attune.config.schema import ConfigError
from attune.config.together import machine, missing_files, problems
from attune.files import write_atomically
from attune.paths import Paths, project_root
from attune.stages.common import TIMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", action="store_true", help="print the table and the problems, and write nothing")
    parser.add_argument("--online", action="store_true", help="ask the Hub whether what is to be downloaded exists")
    given = parser.parse_args()
    try:
        settings = load()
    except ConfigError as error:
        sys.exit(
            "\n".join(f"params.yaml: {line}" if ":" not in line.split(" ")[0][:-1] else line for line in _lines(error))
        )
    found = [*missing_files(settings), *problems(settings, costs.base_weights(settings).denoiser, machine())]
    found += list(_missing_on_the_hub(settings)) if given.online else []
    if given.show:
        say(costs.as_text(list(costs.rows(settings, _downloads(settings), _seconds(), _rows_here(settings)))))
    if found:
        sys.exit("\n".join(found))
    if not given.show:
        write(settings)


def write(settings: Settings, folder: Path = FOLDER) -> None:
    """Writes the plans that have changed, and removes those of runs that are gone."""
    digests = Digests(project_root() / ".checkpoints" / "digests.json")
    plans = {folder / file.name: to_json(plan) for file, plan in make(settings, digests).items()}
    digests.save()
    for stale in set(folder.glob("*.json")) - set(plans):
        stale.unlink()
    for file, text in plans.items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_atomically(file, text.encode())


def say(text: str) -> None:
    """Writes to the terminal; this is what `make plan` is asked for."""
    sys.stdout.write(text + "\n")


def _lines(error: ConfigError) -> list[str]:
    return str(error).splitlines()


def _seconds() -> dict[str, float]:
    """Stage -> how long it took here the last time."""
    try:
        return json.loads((project_root() / TIMES).read_text())
    except (OSError, ValueError):
        return {}


def _rows_here(settings: Settings) -> dict[str, int]:
    """Training rows that are prepared already."""
    file = Paths(settings.profile).reports / "data.json"
    if not file.exists():
        return {}
    counts = json.loads(file.read_text())
    return {kind: counts[f"{kind}/train"] for kind in ("prompts", "pairs") if f"{kind}/train" in counts}


def _downloads(settings: Settings) -> dict[str, float | None]:
    """Stage -> bytes to download: None where something on the Hub is not in the cache and its size is not known."""
    from attune import hub

    asked = {
        "prepare": [settings.model, settings.data],
        "train_preference": [settings.preference],
        **{f"evaluate@{name}": [s.config for s in settings.scorers.values()] for name in list(settings.runs)[:1]},
    }
    missing = {
        stage: [s for c in configs if c for s in hub.sources_of(c) if not hub.is_here(s)]
        for stage, configs in asked.items()
    }
    return {stage: None if sources else 0 for stage, sources in missing.items()}


def _missing_on_the_hub(settings: Settings) -> Iterator[str]:
    """What the settings name on the Hub and the Hub does not have."""
    from attune import hub

    configs = [settings.model, settings.data, settings.preference, *settings.methods.values()]
    configs += [scorer.config for scorer in settings.scorers.values()]
    for config in filter(None, configs):
        for source in hub.sources_of(config):
            if problem := hub.problem_online(source):
                yield problem


if __name__ == "__main__":
    main()
