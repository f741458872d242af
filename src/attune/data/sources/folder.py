"""Data source `folder`: chosen/ and rejected/ with images of the same name, the simplest data set of one's own.

    <path>/chosen/<name>.png     <path>/rejected/<name>.jpg     any type and ending, names without ending must agree
    <path>/captions.json         {"<name>": "the prompt"}, or captions.jsonl with {"name", "prompt" or "caption"}
    <path>/metadata.jsonl        {"file_name", "text" or "caption"}, or metadata.csv, as `imagefolder` reads them
    <path>/chosen/<name>.txt     or <path>/<name>.txt: the prompt of one pair, where there are no captions

Hidden files are passed over; every other file is used or has a row in the quarantine. Prompts are put into splits by
their hash, those that runs ask for first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from pydantic import Field

from attune.config.sources import TEST_PROMPTS, VALIDATION_PROMPTS, PairFilesConfig
from attune.data.rows import BadImage, BadRow, ImageGenerator, Pair, Quota, Row
from attune.data.sources._captions import Captions, plain_name, read_captions, stem
from attune.data.sources._files import image_in, listed_test_prompts, prompt_texts
from attune.data.sources._folders import Match, images_of, sides_of, texts_of, unused_files, with_prompts
from attune.data.splits import HeldOut, count_rows, with_splits

GIVES = ("prompts", "pairs")
FREE_PROMPTS = True

SIDES = ("chosen", "rejected")


class Config(PairFilesConfig):
    path: str = Field("data/raw/pairs", description="folder with chosen/ and rejected/")
    validation_prompts: int | None = VALIDATION_PROMPTS
    test_prompts: int | None = TEST_PROMPTS


def recognises(path: Path) -> bool:
    """A folder with chosen/ and rejected/."""
    return all((path / side).is_dir() for side in SIDES)


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
    files, captions = sides_of(root, SIDES), read_captions([root, root / "chosen"])
    rows = partial(_pairs, root, files, captions, config.test_list)
    return with_splits(listed_test_prompts(config.test_list), rows, HeldOut.of(config))


def _pairs(
    root: Path, files: Mapping[str, Sequence[str]], captions: Captions | None, test_list: str | None
) -> Iterator[Row]:
    """A row for each pair of images, then one for each prompt and each file that belongs to none."""
    matches = list(_matches(files))
    used = {text for match in matches for text in match.texts} | {Path(test_list or "").name}
    used |= {captions.path.relative_to(root).as_posix()} if captions else set()
    for found in with_prompts(root, matches, captions):
        yield found if isinstance(found, BadRow) else _pair(*found, root)
    yield from unused_files(root, files, used, "the folder itself, else in chosen/", "chosen/ and rejected/")


def _matches(files: Mapping[str, Sequence[str]]) -> Iterator[Match]:
    """Files whose names agree without their endings, or, where there are several of these, with them."""
    texts = texts_of(files, ("chosen", "", "rejected"))  # a text beside a chosen image counts first
    by_stem: dict[str, dict[str, list[str]]] = {}
    for side in SIDES:
        for name in images_of(files[side]):
            by_stem.setdefault(stem(plain_name(name)), {side: [] for side in SIDES})[side].append(name)
    for key, sides in sorted(by_stem.items()):
        chosen, rejected = sides.values()
        same = [name for name in chosen if name in rejected] if len(chosen) + len(rejected) > 2 else []
        yield from (_match(name, name, name, texts) for name in same)
        chosen, rejected = ([name for name in side if name not in same] for side in (chosen, rejected))
        if len(chosen) > 1 or len(rejected) > 1:
            for side, name in [*(("chosen", name) for name in chosen), *(("rejected", name) for name in rejected)]:
                detail = f"several files are called {key}, but for their endings; give each pair a name of its own"
                yield _match(key, name, None, texts, BadRow("ambiguous_name", side, name, detail=detail))
        elif chosen or rejected:
            yield _match(key, next(iter(chosen), None), next(iter(rejected), None), texts)


def _match(
    name: str,
    chosen: str | None,
    rejected: str | None,
    texts: Mapping[str, Sequence[str]],
    ambiguous: BadRow | None = None,
) -> Match:
    own = [plain_name(each) for each in (chosen, name, rejected) if each]
    found = dict.fromkeys(text for each in own for text in texts.get(each, ()))
    names = [*own, *(f"chosen/{each}" for each in own)]
    return Match(name, {"chosen": chosen, "rejected": rejected}, names, list(found), ambiguous)


def _pair(match: Match, prompt: str | None, root: Path) -> Pair:
    chosen, rejected = (_image(root, side, match) for side in SIDES)
    return Pair(prompt, chosen, rejected, 1.0, 0.0, "", "chosen", match.name)


def _image(root: Path, side: str, match: Match) -> Path | BadImage:
    name = match.images[side]
    if name is None:
        return BadImage("missing_image", f"{side} has no image {match.name}")
    return image_in(root, f"{side}/{name}")
