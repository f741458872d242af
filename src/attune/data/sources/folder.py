"""Data source `folder`: chosen/ and rejected/ with images of the same name, the simplest data set of one's own.

    <path>/chosen/<name>.png     <path>/rejected/<name>.jpg     any type, names without ending must agree
    <path>/captions.json         {"<name>": "the prompt"}, or captions.jsonl with {"name", "prompt" or "caption"}
    <path>/chosen/<name>.txt     or <path>/<name>.txt: the prompt of one pair, where there are no captions

Prompts are hashed into splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field

from attune.config.settings import PairFilesConfig
from attune.data.rows import ImageGenerator, Pair, Quota, Row, SourceError
from attune.data.sources._files import listed_test_prompts, prompt_texts, read_json, read_rows
from attune.data.splits import count_rows, hashed_split

HAS_PAIRS = True
FREE_PROMPTS = True

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Config(PairFilesConfig):
    path: str = Field("data/raw/pairs", description="folder with chosen/ and rejected/")


def read(config: Config, seed: int, generate_images: ImageGenerator, quota: Quota) -> Iterator[Row]:
    """A pair for each name; one that is in a single folder has lost its other image.

    Raises:
        SourceError: one of the two folders is not there, or the captions are not a mapping.
    """
    return _rows(config)


def needs_files(config: Config) -> list[Path]:
    """The folder whole: images and captions of any name may be used."""
    return [Path(path) for path in (config.path, config.test_list) if path is not None]


def split_sizes(config: Config) -> dict[str, int]:
    """All of them, by the names of the files."""
    return count_rows(_rows(config), Quota.of(config))


def listed_prompts(config: Config) -> Iterator[str]:
    """All prompts."""
    return prompt_texts(_rows(config))


def _rows(config: Config) -> Iterator[Row]:
    root = Path(config.path)
    chosen, rejected = (_images(root / side) for side in ("chosen", "rejected"))
    captions = _captions(root)
    return chain(listed_test_prompts(config.test_list), _pairs(chosen, rejected, captions, config))


def _images(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise SourceError(f"data.path: {folder} is not there")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES)
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _captions(root: Path) -> Mapping[str, Any] | None:
    if (root / "captions.json").exists():
        captions = read_json(root / "captions.json")
        if not isinstance(captions, Mapping):
            raise SourceError(f"{root / 'captions.json'}: must be a mapping of names to prompts")
        return {_stem(name): prompt for name, prompt in captions.items()}
    if (root / "captions.jsonl").exists():
        rows = [row for _, row in read_rows(root / "captions.jsonl") if isinstance(row, Mapping)]
        return {_stem(str(row.get("name"))): row.get("prompt", row.get("caption")) for row in rows}
    return None


def _stem(name: str) -> str:
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in IMAGES else name


def _pairs(
    chosen: Mapping[str, Path], rejected: Mapping[str, Path], captions: Mapping[str, Any] | None, config: Config
) -> Iterator[Pair]:
    for name in sorted({*chosen, *rejected}):
        prompt = _beside(Path(config.path), name) if captions is None else captions.get(name)
        split = hashed_split(prompt if isinstance(prompt, str) else None, config.validation_share, config.test_share)
        yield Pair(prompt, chosen.get(name), rejected.get(name), 1.0, 0.0, split, "chosen", name)


def _beside(root: Path, name: str) -> str | None:
    for file in (root / "chosen" / f"{name}.txt", root / f"{name}.txt"):
        if file.is_file():
            return file.read_text(encoding="utf-8-sig", errors="surrogateescape").strip()
    return None
