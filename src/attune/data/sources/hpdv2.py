"""Data source `hpdv2`: Human Preference Dataset v2, unpacked in a folder.

Source: Wu et al. 2023, arXiv:2306.09341; ymhao/HPDv2 on the Hub, its train.tar.gz and test.tar.gz unpacked.

    train.json   [{"prompt", "file_path" or "image_path": [names], "human_preference": [1 for the chosen, else 0]}]
    test.json    [{"prompt", "image_path": [names], "rank": [1 = best]}]
    train/ test/ the images; names are looked up in the folder of their split, then in the top one

n ranked images make n (n - 1) / 2 pairs. Without a test.json, test prompts are taken from train by hash, as
validation prompts always are. The two indices are read whole (train.json: 116 MB), images when their turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field

from attune.config.sources import PairFilesConfig
from attune.data.rows import BadImage, BadRow, ImageGenerator, Pair, Prompt, Quota, Row, SourceError
from attune.data.sources._cells import as_float, shown
from attune.data.sources._files import image_in, listed_test_prompts, prompt_texts
from attune.data.sources._json import read_json_list
from attune.data.sources._layouts import begins_with
from attune.data.sources._ranks import MAX_IMAGES, ranked_pairs, too_many_images
from attune.data.splits import count_rows, hashed_split

GIVES = ("prompts", "pairs")
FREE_PROMPTS = True


class Config(PairFilesConfig):
    path: str = Field("data/raw/hpdv2", description="folder with train.json and, where there, test.json")


def recognises(path: Path) -> bool:
    """A folder with train.json, whose entries have several images each."""
    return begins_with(path / "train.json", ('"file_path"', '"image_path"'))


def read(config: Config, seed: int, generate_images: ImageGenerator, quota: Quota) -> Iterator[Row]:
    """All pairs of the ranked images, test.json first.

    Raises:
        SourceError: train.json is not there, or an index is no list.
    """
    root = Path(config.path)
    train = _index(root / "train.json")
    test = _test_index(root)
    test_share = 0 if test else config.test_share
    of_test = (pair for row, entry in enumerate(test) for pair in _pairs(entry, "test", row, root, "test.json"))
    of_train = (
        pair
        for row, entry in enumerate(train)
        for pair in _pairs(
            entry, hashed_split(_prompt(entry), config.validation_share, test_share), row, root, "train.json"
        )
    )
    return chain(
        listed_test_prompts(config.test_list),
        _test_prompts(test),
        quota.take_until_full(of_test, "test"),
        quota.take_until_full(of_train, "train"),
    )


def needs_files(config: Config) -> list[Path]:
    """The folder whole."""
    return [Path(path) for path in (config.path, config.test_list) if path is not None]


def split_sizes(config: Config) -> dict[str, int] | None:
    """The test prompts, where there is a test.json; train.json is too large to be read for a count."""
    test = _test_index(Path(config.path))
    if not test:
        return None
    counts = count_rows(chain(listed_test_prompts(config.test_list), _test_prompts(test)), Quota())
    return {"prompts/test": counts["prompts/test"]}


def listed_prompts(config: Config) -> Iterator[str] | None:
    """The prompts of `test_list`; those of the data set are known only when it is read."""
    return prompt_texts(listed_test_prompts(config.test_list)) if config.test_list else None


def _test_index(root: Path) -> list[Any]:
    return _index(root / "test.json") if (root / "test.json").exists() else []


def _test_prompts(test: list[Any]) -> Iterator[Prompt]:
    prompts = ((row, _prompt(entry)) for row, entry in enumerate(test))
    return (Prompt(prompt, "test", "test.json", row) for row, prompt in prompts if prompt is not None)


def _index(path: Path) -> list[Any]:
    index = read_json_list(path)
    if index is None:
        raise SourceError(f"{path}: must be a list of prompts with their images")
    return index


def _prompt(entry: Any) -> str | None:
    prompt = entry.get("prompt") if isinstance(entry, Mapping) else None
    return prompt if isinstance(prompt, str) else None


def _pairs(entry: Any, split: str, row: int, root: Path, file: str) -> Iterator[Pair | BadRow]:
    prompt = _prompt(entry)
    if isinstance(entry, Mapping) and prompt is None and entry.get("prompt") is not None:
        yield BadRow("malformed_row", file, row, detail=f"prompt: expected text, found {shown(entry['prompt'])}")
        return
    names, ranks = _names_and_ranks(entry)
    if ranks is None or names is None or not len(names) == len(ranks) > 1:
        expected = "expected a list of images (image_path or file_path) and as many numbers (human_preference or rank)"
        yield BadRow("malformed_row", file, row, prompt, expected)
        return
    if len(names) > MAX_IMAGES:
        yield BadRow("malformed_row", file, row, prompt, too_many_images(len(names)))
        return
    images = [_find(root, file.removesuffix(".json"), name) for name in names]
    for i, j, label_0 in ranked_pairs(ranks):
        yield Pair(prompt, images[i], images[j], label_0, 1 - label_0, split, file, f"{row}:{i}-{j}")


def _names_and_ranks(entry: Any) -> tuple[list[Any] | None, list[float] | None]:
    """The names of an entry's images, and their ranks, the smaller the better; None for what is not there."""
    if not isinstance(entry, Mapping):
        return None, None
    names, chosen = entry.get("image_path", entry.get("file_path")), _numbers(entry.get("human_preference"))
    ranks = _numbers(entry.get("rank")) if chosen is None else [-choice for choice in chosen]
    return names if isinstance(names, list) else None, ranks


def _numbers(values: Any) -> list[float] | None:
    """A list of numbers, also where they are written as text; None if it is none."""
    if not isinstance(values, list):
        return None
    numbers = [number for value in values if (number := as_float(value)) is not None]
    return numbers if len(numbers) == len(values) else None


def _find(root: Path, folder: str, name: Any) -> Path | BadImage:
    candidates = [image_in(root / folder, name), image_in(root, name)]
    here = next((path for path in candidates if isinstance(path, Path) and path.exists()), None)
    bad = next((image for image in candidates if isinstance(image, BadImage)), None)
    return here or bad or candidates[0]
