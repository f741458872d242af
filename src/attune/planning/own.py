"""A profile for a data set of one's own: runs that can learn from it, and settings that fit its size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attune.config import plugins
from attune.config.profile import BASE, DATA, PREFERENCE
from attune.config.schema import check
from attune.data.rows import SourceError
from attune.data.sources._files import listed_test_prompts, prompt_texts
from attune.planning.make import rows_of
from attune.world.grammar import is_of_the_world

RUNS = {"pairs": ("dpo",), "images": ("kto",), "prompts": ("alignprop",)}
"""What a source gives -> the methods that are trained on it, unless others are asked for."""

FEWEST_PROMPTS = 3  # two to test with
TEST_SHARE = 0.2  # of the prompts, which no training sees
IMAGES = 48  # of the test prompts together, so that few prompts get several images each
MOST_IMAGES = 4  # of one prompt
PASSES = 20  # of a training over its rows, at most, unless that makes fewer steps than
STEPS = 100


@dataclass(frozen=True)
class Found:
    """What a data set holds."""

    source: str
    rows: Mapping[str, int]  # `pairs`, `images` and `prompts`, as far as they can be counted
    of_the_world: bool  # whether every prompt is one of the embedded world's, so that the oracle can score it
    test_list: str | None = None

    @property
    def kind(self) -> str:
        """The most that there is to learn from."""
        return next(kind for kind in RUNS if kind in plugins.load("sources", self.source).GIVES)


def look(path: Path, test_list: Path | None) -> Found:
    """Which source reads a file or folder, and what it holds.

    Raises:
        SourceError: none does, it is not there, or it holds too few prompts to train on and to test with.
    """
    source = _source_of(path)
    plugin = plugins.load("sources", source)
    config = plugin.Config(path=str(path))
    sizes = plugin.split_sizes(config) or {}
    rows = {kind: sum(n for name, n in sizes.items() if name.startswith(f"{kind}/")) for kind in RUNS}
    if sizes and rows["prompts"] < FEWEST_PROMPTS and test_list is None:
        raise SourceError(
            f"{path}: {rows['prompts']} different prompts, and some must be kept to test with: bring {FEWEST_PROMPTS} "
            "or more, or give a list of test prompts (--test-list prompts.txt)"
        )
    prompts = [*(plugin.listed_prompts(config) or ()), *prompt_texts(listed_test_prompts(_text(test_list)))]
    return Found(
        source, {kind: n for kind, n in rows.items() if n}, all(map(is_of_the_world, prompts)), _text(test_list)
    )


def _source_of(path: Path) -> str:
    """The source that knows a file or folder as its own. Raises SourceError if none does."""
    if not path.exists():
        raise SourceError(f"{path} is not there")
    for name in plugins.available("sources"):
        if plugins.load("sources", name).recognises(path):
            return name
    raise SourceError(
        f"{path} is no data that is known: a folder with chosen/ and rejected/ or liked/ and disliked/, a .csv or "
        ".jsonl with the columns that docs/data.md lists, or a list of prompts"
    )


def runs(methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """The block `runs` of params.yaml: the base, and a run for each method."""
    after = {True: PREFERENCE, False: DATA}
    trained = {name: {"method": name, "after": after[plugins.needs(name, "preference_model")]} for name in methods}
    return {BASE: {"after": DATA}, **trained}


def blocks(base: Mapping[str, Any], path: Path, found: Found, methods: Sequence[str]) -> dict[str, Any]:
    """Top-level blocks of a profile that differ from those of the profile it is made from; None: it has none of it.

    Args:
        base: values of that profile.
        path: the data.
    """
    data: dict[str, Any] = {"source": found.source, "path": str(path)}
    if found.test_list is not None:
        data["test_list"] = found.test_list
    changed: dict[str, Any] = {"data": data, "search": None}
    if any(plugins.needs(name, "preference_model") for name in methods):
        data |= {key: value for key, value in base["data"].items() if key == "score_with"}
    else:
        changed["preference"] = None
    if not found.of_the_world:
        changed["scorers"] = {name: block for name, block in base["scorers"].items() if name != "oracle"}
    return changed


def numbers(base: Mapping[str, Any], found: Found, methods: Sequence[str]) -> dict[str, int]:
    """Dotted key -> value: how many test prompts and images there are to be, and how long each training is.

    Empty where the rows cannot be counted: then the numbers stay those of the profile it is made from.
    """
    if "prompts" not in found.rows:
        return {}
    listed = None if found.test_list is None else len(set(prompt_texts(listed_test_prompts(found.test_list))))
    test = min(base["generate"]["prompts"], listed or max(2, round(TEST_SHARE * found.rows["prompts"])))
    images = min(MOST_IMAGES, max(base["generate"].get("images_per_prompt", 1), math.ceil(IMAGES / test)))
    changed = {"generate.prompts": test, "generate.images_per_prompt": images}
    for name in methods:
        kind = "images" if "images" in (rows := rows_of(name, found.source)) else rows
        config = check(plugins.config_class("methods", name), base["methods"].get(name, {}), f"methods.{name}")
        if kind in found.rows and kind != "prompts":
            passes = math.ceil(PASSES * found.rows[kind] / config.batch_size)
            changed[f"methods.{name}.batches"] = min(config.batches, max(passes, STEPS * config.accumulation))
    return changed


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
