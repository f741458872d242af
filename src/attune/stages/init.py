"""Writes params/own.yaml for pictures of your own, from the profile of a base model, and names its runs in params.yaml.

It counts what is there and chooses what fits: the source that reads it, the methods that can learn from it, how many
prompts are kept to test with, how long the trainings are. Both files are to be read and changed like any other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from attune.config import plugins
from attune.config.edit import replace_blocks, update_params_file
from attune.config.resolve import PARAMS, PROFILES, read_yaml
from attune.config.schema import ConfigError
from attune.data.rows import SourceError
from attune.planning import own
from attune.stages.plan import say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="a folder with chosen/ and rejected/, or liked/ and disliked/; a table")
    parser.add_argument("--base", default="tiny", help="the profile of params/ it is made from: tiny, sd15_24gb, ...")
    parser.add_argument("--methods", nargs="+", help="the methods to train, instead of what suits the data")
    parser.add_argument("--test-list", type=Path, help="a list of prompts to test with; else a fifth of the data's")
    parser.add_argument("--profile", default="own", help="name of the profile that is written")
    given = parser.parse_args()
    try:
        init(given.data.expanduser(), given.base, given.profile, given.methods, given.test_list)
    except (ConfigError, SourceError) as error:
        sys.exit(str(error))


def init(data: Path, base: str, profile: str, methods: list[str] | None, test_list: Path | None) -> None:
    """Writes both files. Raises ConfigError or SourceError, and then writes nothing."""
    template, file = (PROFILES / f"{name}.yaml" for name in (base, profile))
    if not template.exists():
        known = ", ".join(sorted(path.stem for path in PROFILES.glob("*.yaml")))
        raise ConfigError(f"--base: there is no {template}; there are: {known}")
    if file.exists():
        raise ConfigError(f"{file} is there already: change it, remove it, or choose another name (--profile)")
    found, values = own.look(data, test_list), read_yaml(template)
    chosen = methods or list(own.RUNS[found.kind])
    if unknown := sorted(set(chosen) - set(plugins.available("methods"))):
        raise ConfigError(f"--methods: there is no {unknown[0]}; there are {', '.join(plugins.available('methods'))}")
    numbers = own.numbers(values, found, chosen)
    replace_blocks(own.blocks(values, data, found, chosen), template, to=file)
    update_params_file(numbers, file)
    replace_blocks({"profile": profile, "runs": own.runs(chosen)}, PARAMS)
    counted = ", ".join(f"{n:,} {kind}" for kind, n in found.rows.items()) or "not counted before they are read"
    say(f"{data}: source {found.source}: {counted}")
    say(f"{file}: as {template}, with " + ", ".join(f"{key}: {value}" for key, value in numbers.items()))
    say(f"{PARAMS}: profile {profile}, runs base, {', '.join(chosen)}")
    say("next: make plan, make repro")


if __name__ == "__main__":
    main()
