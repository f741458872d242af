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

from attune.config.settings import PairFilesConfig
from attune.data.rows import BadRow, ImageGenerator, Pair, Prompt, Quota, Row, SourceError
from attune.data.sources._files import inside, listed_test_prompts, prompt_texts, read_json
from attune.data.sources._labels import as_float, ranked_pairs
from attune.data.splits import count_rows, hashed_split

HAS_PAIRS = True
FREE_PROMPTS = True


class Config(PairFilesConfig):
    path: str = Field("data/raw/hpdv2", description="folder with train.json and, where there, test.json")


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
    return (Prompt(_prompt(entry), "test", "test.json", row) for row, entry in enumerate(test))


def _index(path: Path) -> list[Any]:
    index = read_json(path)
    if not isinstance(index, list):
        raise SourceError(f"{path}: must be a list of prompts with their images")
    return index


def _prompt(entry: Any) -> str | None:
    prompt = entry.get("prompt") if isinstance(entry, Mapping) else None
    return prompt if isinstance(prompt, str) else None


def _pairs(entry: Any, split: str, row: int, root: Path, file: str) -> Iterator[Pair | BadRow]:
    prompt = _prompt(entry)
    ranks: Any = None
    names: Any = None
    if isinstance(entry, Mapping):
        names = entry.get("image_path", entry.get("file_path"))
        chosen: Any = entry.get("human_preference")
        ranks = [-c for c in chosen] if _numbers(chosen) else entry.get("rank")
    if not (_numbers(ranks) and isinstance(names, list) and len(names) == len(ranks) > 1):
        yield BadRow("malformed_row", file, row, prompt)
        return
    images = [_find(root, file.removesuffix(".json"), name) for name in names]
    for i, j, label_0 in ranked_pairs(ranks):
        yield Pair(prompt, images[i], images[j], label_0, 1 - label_0, split, file, f"{row}:{i}-{j}")


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(as_float(value) is not None for value in values)


def _find(root: Path, folder: str, name: Any) -> Path | None:
    candidates = [inside(root / folder, name), inside(root, name)]
    return next((path for path in candidates if path and path.is_file()), None)
