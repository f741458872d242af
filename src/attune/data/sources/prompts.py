"""Data source `prompts`: prompt lists and no pairs, for methods that generate their own images.

A list is a .txt with a prompt per line, or a .json or .jsonl of strings or of objects with `prompt` or `caption`.
Validation and test prompts have lists of their own or are taken from `path` by hash,
those that runs ask for first.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from pydantic import Field

from attune.config.schema import Float
from attune.config.sources import TEST_PROMPTS, VALIDATION_PROMPTS, SourceConfig
from attune.data.rows import ImageGenerator, Quota, Row
from attune.data.sources._files import are_small, prompt_list, prompt_texts
from attune.data.sources._layouts import begins_with
from attune.data.splits import HeldOut, count_rows, with_splits

GIVES = ("prompts",)
FREE_PROMPTS = True


class Config(SourceConfig):
    path: str = Field("data/raw/prompts.txt", description="a prompt list")
    validation_list: str | None = Field(None, description="a prompt list; null = a share of `path`")
    test_list: str | None = Field(None, description="a prompt list; null = a share of `path`")
    validation_share: Float = Field(0.05, ge=0, le=0.5, description="of `path`, if there is no validation_list")
    test_share: Float = Field(0.05, ge=0, le=0.5, description="of `path`, if there is no test_list")
    validation_prompts: int | None = VALIDATION_PROMPTS
    test_prompts: int | None = TEST_PROMPTS
    max_bad_share: Float = Field(0.2, ge=0, le=1, description="a larger share of quarantined rows stops the stage")


def recognises(path: Path) -> bool:
    """A .txt, a JSON list, or a .jsonl whose rows name no image."""
    return path.suffix == ".txt" or (
        path.suffix in (".json", ".jsonl") and not begins_with(path, ('"image', '"path1"'))
    )


def read(config: Config, seed: int, generate_images: ImageGenerator, quota: Quota) -> Iterator[Row]:
    """The prompts of all lists.

    Raises:
        SourceError: a list is not there or no list.
    """
    return _rows(config)


def needs_files(config: Config) -> list[Path]:
    """The lists."""
    return [Path(path) for path in _lists(config)]


def split_sizes(config: Config) -> dict[str, int] | None:
    """All of them, of lists that are read in less than a second."""
    return count_rows(_rows(config), Quota()) if are_small(*_lists(config)) else None


def listed_prompts(config: Config) -> Iterator[str] | None:
    """All prompts of lists that are read in less than a second."""
    return prompt_texts(_rows(config)) if are_small(*_lists(config)) else None


def _lists(config: Config) -> list[str]:
    return [path for path in (config.test_list, config.validation_list, config.path) if path]


def _rows(config: Config) -> Iterator[Row]:
    lists = {"test": config.test_list, "validation": config.validation_list}
    listed = chain.from_iterable([prompt_list(path, split) for split, path in lists.items() if path])
    shares = {f"{split}_share": 0.0 for split, path in lists.items() if path}
    return with_splits(listed, lambda: prompt_list(config.path), HeldOut.of(config, **shares))
