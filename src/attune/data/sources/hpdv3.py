"""Data source `hpdv3`: Human Preference Dataset v3, unpacked in a folder.

Source: Ma et al. 2025 (HPSv3), arXiv:2508.03789; MizzenAI/HPDv3 on the Hub (MIT), its images.tar.gz.* unpacked.

    train.json   [{"prompt", "path1", "path2", "model1", "model2", "choice_dist": [votes], "confidence"}]
    test.json    the same
    images/      the images; paths are relative to the folder

The image at path1 is the preferred one; equal votes are a tie. Without a test.json, test prompts are taken from train
by hash, as validation prompts always are. The lists are read object by object, not whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field

from attune.config.schema import Float
from attune.config.sources import PairFilesConfig
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow, ImageGenerator, Pair, Quota, Row
from attune.data.sources._cells import as_float, as_text, shown
from attune.data.sources._files import image_in, listed_test_prompts, prompt_texts
from attune.data.sources._json import stream_json_list
from attune.data.sources._layouts import begins_with
from attune.data.sources._tables import bad_row, cells_of
from attune.data.splits import hashed_split

GIVES = ("prompts", "pairs")
FREE_PROMPTS = True

COLUMNS = ("prompt", "path1", "path2")


class Config(PairFilesConfig):
    path: str = Field("data/raw/hpdv3", description="folder with train.json, images/ and, where there, test.json")
    min_confidence: Float = Field(0.0, ge=0, le=1, description="pairs of less confidence have a row in the quarantine")


def recognises(path: Path) -> bool:
    """A folder with train.json, whose entries have two paths each."""
    return begins_with(path / "train.json", ('"path1"',))


def read(config: Config, seed: int, generate_images: ImageGenerator, quota: Quota) -> Iterator[Row]:
    """All pairs, those of test.json first.

    Raises:
        SourceError: train.json is not there, or one of the two is no list.
    """
    root = Path(config.path)
    train, test = stream_json_list(root / "train.json"), _test(root)
    shares = (config.validation_share, config.test_share if test is None else 0.0)
    of_test = (_pair(entry, "test", row, root / "test.json", config) for row, entry in enumerate(test or ()))
    of_train = (
        _pair(entry, hashed_split(_prompt(entry), *shares), row, root / "train.json", config)
        for row, entry in enumerate(train)
    )
    return chain(
        listed_test_prompts(config.test_list),
        quota.take_until_full(of_test, "test"),
        quota.take_until_full(of_train, "train"),
    )


def needs_files(config: Config) -> list[Path]:
    """The folder whole."""
    return [Path(path) for path in (config.path, config.test_list) if path is not None]


def split_sizes(config: Config) -> dict[str, int] | None:
    """None: prompts are known only as the lists are read."""
    stream_json_list(Path(config.path) / "train.json")
    return None


def listed_prompts(config: Config) -> Iterator[str] | None:
    """The prompts of `test_list`; those of the data set are known only when it is read."""
    return prompt_texts(listed_test_prompts(config.test_list)) if config.test_list else None


def _test(root: Path) -> Iterator[Any] | None:
    return stream_json_list(root / "test.json") if (root / "test.json").exists() else None


def _prompt(entry: Any) -> str | None:
    prompt = entry.get("prompt") if isinstance(entry, Mapping) else None
    return prompt if isinstance(prompt, str) else None


def _pair(entry: Any, split: str, row: int, file: Path, config: Config) -> Pair | BadRow:
    if not isinstance(entry, Mapping):
        return BadRow("malformed_row", file.name, row, detail="expected an object with prompt, path1 and path2")
    try:
        prompt, *names = cells_of(entry, COLUMNS)
        text, label_0 = as_text(prompt, "prompt"), _label(entry.get("choice_dist"))
        _check_confidence(entry.get("confidence"), config.min_confidence)
    except RejectedRow as reason:
        return bad_row(reason, entry, file.name, row)
    first, second = (image_in(file.parent, name) for name in names)
    return Pair(text, first, second, label_0, 1 - label_0, split, file.name, row)


def _label(votes: Any) -> float:
    """1, or 0.5 where as many people preferred either image. Raises RejectedRow, `no_label`, for no votes at all."""
    if votes is None:
        return 1.0
    numbers = [as_float(vote) for vote in votes] if isinstance(votes, list) else []
    if len(numbers) != 2 or None in numbers:
        raise RejectedRow("no_label", f"choice_dist: expected the votes for two images, found {shown(votes)}")
    return 0.5 if numbers[0] == numbers[1] else 1.0


def _check_confidence(confidence: Any, least: float) -> None:
    """Raises RejectedRow: `low_confidence`, or `no_label` where there is none and one is asked for."""
    number = as_float(confidence)
    if least and number is None:
        raise RejectedRow("no_label", f"confidence: expected a number, found {shown(confidence)}")
    if number is not None and number < least:
        raise RejectedRow("low_confidence", f"confidence {number:g}; data.min_confidence is {least:g}")
