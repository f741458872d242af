"""Data source `folder`: chosen/ and rejected/ with images of the same name, the simplest data set of one's own.

    <path>/chosen/<name>.png     <path>/rejected/<name>.jpg     any type and ending, names without ending must agree
    <path>/captions.json         {"<name>": "the prompt"}, or captions.jsonl with {"name", "prompt" or "caption"}
    <path>/metadata.jsonl        {"file_name", "text" or "caption"}, or metadata.csv, as `imagefolder` reads them
    <path>/chosen/<name>.txt     or <path>/<name>.txt: the prompt of one pair, where there are no captions

Hidden files are passed over; every other file is used or has a row in the quarantine. Prompts are hashed into splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pydantic import Field

from attune.config.settings import PairFilesConfig
from attune.data.local import MAX_TEXT_BYTES, inside, is_hidden, read_regular
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadImage, BadRow, ImageGenerator, Pair, Quota, Row, SourceError
from attune.data.sources._captions import FILES, Captions, plain_name, read_captions, stem
from attune.data.sources._files import image_in, listed_test_prompts, prompt_texts
from attune.data.splits import count_rows, hashed_split

HAS_PAIRS = True
FREE_PROMPTS = True

SIDES = ("chosen", "rejected")
UNUSED_LIST = f"one file of prompts is read, the first of {', '.join(FILES)} in the folder itself, else in chosen/"
UNUSED = "belongs to no image of chosen/ and rejected/"


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
    files = _files(root)
    captions = read_captions([root, root / "chosen"])
    return chain(listed_test_prompts(config.test_list), _all_rows(root, files, captions, config))


def _files(root: Path) -> dict[str, list[str]]:
    """chosen, rejected and "" for elsewhere -> the names of the files there, below that folder; hidden ones are not.

    A link to a folder counts as a file: what is behind it is not read, so it must be told.

    Raises:
        SourceError: one of the two folders is not there.
    """
    for side in SIDES:
        if not (root / side).is_dir():
            raise SourceError(f"data.path: {root / side} is not there")
    found = {side: list(_walk(root / side)) for side in SIDES}
    return found | {"": [name for name in _walk(root) if name.partition("/")[0] not in SIDES]}


def _walk(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not is_hidden(name) and (path.is_symlink() or not path.is_dir()):
            yield name.as_posix()


def _all_rows(
    root: Path, files: Mapping[str, Sequence[str]], captions: Captions | None, config: Config
) -> Iterator[Row]:
    """A row for each pair of images, then one for each prompt and each file that belongs to none."""
    texts = _texts(files)
    used_captions: set[str] = set()
    used_texts: set[str] = set()
    used_file = captions.path.relative_to(root).as_posix() if captions else ""
    for match in _matches(files):
        names = match.names
        used_texts.update(name for name in names if name in texts)
        found = list(dict.fromkeys(text for name in names for text in texts.get(name, ())))
        caption = captions.find(names) if captions else None
        used_captions.update([caption] if caption else [])
        if match.ambiguous:
            yield match.ambiguous
        elif captions and caption and not captions.prompts[caption].bad:
            prompt = captions.prompts[caption].prompt
            yield _pair(match, prompt, root, config)
            yield from _other_texts(found, prompt, root)
        else:
            bad = captions.prompts[caption].bad if captions and caption else None
            yield from [bad] if bad else []
            if found or not bad:
                row = _with_text(match, found[0] if found else None, root, config)
                yield row
                yield from _other_texts(found[1:], row.prompt, root)
    if captions:
        yield from captions.bad
        yield from captions.unused(used_captions)
    apart = [text for name in texts.keys() - used_texts for text in texts[name]]
    apart += [name for name in files[""] if not name.lower().endswith(".txt")]
    apart += [f"{side}/{name}" for side in SIDES for name in files[side] if name in FILES]
    lists = {used_file, Path(config.test_list or "").name}
    for name in sorted(apart):
        if name not in lists:
            yield BadRow("unused_file", "", name, detail=UNUSED_LIST if Path(name).name in FILES else UNUSED)


@dataclass(frozen=True)
class Match:
    """The files of a name in the two folders; `ambiguous` where there are too many of them."""

    name: str
    chosen: str | None
    rejected: str | None
    ambiguous: BadRow | None = None

    @property
    def names(self) -> list[str]:
        """The names under which a prompt is looked up, the most exact first."""
        own = [plain_name(name) for name in (self.chosen, self.name, self.rejected) if name]
        return [*own, *(f"chosen/{name}" for name in own)]


def _matches(files: Mapping[str, Sequence[str]]) -> Iterator[Match]:
    """Files whose names agree without their endings, or, where there are several of these, with them."""
    by_stem: dict[str, dict[str, list[str]]] = {}
    for side in SIDES:
        for name in files[side]:
            if not name.lower().endswith(".txt") and name not in FILES:
                by_stem.setdefault(stem(plain_name(name)), {side: [] for side in SIDES})[side].append(name)
    for key, sides in sorted(by_stem.items()):
        chosen, rejected = sides.values()
        same = [name for name in chosen if name in rejected] if len(chosen) + len(rejected) > 2 else []
        yield from (Match(name, name, name) for name in same)
        chosen, rejected = ([name for name in side if name not in same] for side in (chosen, rejected))
        if len(chosen) > 1 or len(rejected) > 1:
            for side, name in [*(("chosen", name) for name in chosen), *(("rejected", name) for name in rejected)]:
                detail = f"several files are called {key}, but for their endings; give each pair a name of its own"
                yield Match(key, name, None, BadRow("ambiguous_name", side, name, detail=detail))
        elif chosen or rejected:
            yield Match(key, next(iter(chosen), None), next(iter(rejected), None))


def _texts(files: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Name without .txt -> the .txt with that prompt, below the top folder; beside a chosen image it counts first."""
    found: dict[str, list[str]] = {}
    for side in ("chosen", "", "rejected"):
        for name in files[side]:
            if name.lower().endswith(".txt"):
                found.setdefault(plain_name(name)[: -len(".txt")], []).append(f"{side}/{name}".removeprefix("/"))
    return found


def _with_text(match: Match, text: str | None, root: Path, config: Config) -> Pair | BadRow:
    """The pair with the prompt of a .txt."""
    if text is None:
        expected = f"expected a prompt in {' or '.join(FILES)}, or in chosen/{match.name}.txt"
        return BadRow("empty_prompt", "chosen", match.name, detail=expected)
    try:
        return _pair(match, _text(root, text), root, config)
    except RejectedRow as reason:
        return BadRow("empty_prompt", "chosen", match.name, detail=reason.detail)


def _other_texts(texts: Sequence[str], prompt: str | None, root: Path) -> Iterator[BadRow]:
    """A row for each .txt of a pair that has another prompt than the one that is used."""
    for text in texts:
        try:
            other = _text(root, text)
        except RejectedRow as reason:
            yield BadRow("unused_file", "", text, detail=reason.detail)
            continue
        if other != (prompt or "").strip():
            yield BadRow("unused_file", "", text, other, "another prompt of the same pair is used")


def _text(root: Path, name: str) -> str:
    """The prompt in a .txt. Raises RejectedRow for one that cannot be read."""
    return read_regular(inside(root, name), MAX_TEXT_BYTES).decode("utf-8-sig", errors="surrogateescape").strip()


def _pair(match: Match, prompt: str | None, root: Path, config: Config) -> Pair:
    split = hashed_split(prompt, config.validation_share, config.test_share)
    chosen, rejected = (_image(root, side, match) for side in SIDES)
    return Pair(prompt, chosen, rejected, 1.0, 0.0, split, "chosen", match.name)


def _image(root: Path, side: str, match: Match) -> Path | BadImage:
    name = getattr(match, side)
    if name is None:
        return BadImage("missing_image", f"{side} has no image {match.name}")
    return image_in(root, f"{side}/{name}")
