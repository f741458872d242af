"""The pairs that people are shown: images of two runs or two folders, or of one, with the same prompt.

A run's folder has an index.parquet with prompt, ordinal and file. A plain folder has images and their prompts, in a
captions file or in a `.txt` beside each, as the data source `folder` reads them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from attune.data.images import decode
from attune.data.local import MAX_TEXT_BYTES, inside, is_hidden, read_regular
from attune.data.quarantine import RejectedRow
from attune.data.rows import SourceError
from attune.data.sources._captions import FILES, read_captions, stem
from attune.evaluation.images import PACKED_ABOVE, is_packed
from attune.paths import Paths

INDEX = "index.parquet"


class LabelError(ValueError):
    """There is nothing to label; the message names the side or the file, and the remedy."""


@dataclass(frozen=True)
class Side:
    """Where one of the two images of every pair comes from."""

    name: str  # as it was given
    folder: Path
    is_run: bool


@dataclass(frozen=True)
class LabelPair:
    """Two images of a prompt, of side a and of side b."""

    prompt: str
    ordinal: int
    files: tuple[Path, Path]
    digests: tuple[str, str] = ("", "")  # as `files.digest` has them

    @property
    def key(self) -> tuple[str, int, tuple[str, str]]:
        """What identifies the pair, so that answers are about these images and no others."""
        return self.prompt, self.ordinal, self.digests


@dataclass(frozen=True)
class Found:
    """Pairs to label, and a line for each kind of image that is left out."""

    pairs: Sequence[LabelPair]
    notes: Sequence[str]


def find_side(name: str, paths: Paths) -> Side:
    """A run of the profile with that name, else a folder.

    Raises:
        LabelError: neither is there.
    """
    generated = paths.generated("base").parent
    if re.fullmatch(r"[\w-]+", name) and (generated / name / INDEX).is_file():
        return Side(name, generated / name, is_run=True)
    if Path(name).is_dir():
        return Side(name, Path(name), is_run=False)
    runs = sorted(file.parent.name for file in generated.glob(f"*/{INDEX}"))
    known = f"runs with images are {', '.join(runs)}" if runs else f"no run has images in {generated}"
    raise LabelError(f"{name!r} is no run with images and no folder; {known}; `dvc repro generate@<run>` makes them")


def session_name(sides: Sequence[Side]) -> str:
    """What the answers about these sides are filed under; of folders with a digest of where they are."""
    return "-vs-".join(_session_part(side) for side in sides)


def _session_part(side: Side) -> str:
    if side.is_run:
        return side.name
    where = str(side.folder.resolve())
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", side.folder.resolve().name)[:40] or "folder"
    return f"{plain}@{hashlib.sha256(where.encode(errors='surrogateescape')).hexdigest()[:8]}"


def find_pairs(sides: Sequence[Side], prompts: int | None = None) -> Found:
    """The pairs of two sides, or of one with itself, every image decoded once.

    Images of two sides are paired by prompt and ordinal, those of two plain folders by name. Images of one side alone
    are paired in the order of their ordinals: the first with the second, the third with the fourth.

    Args:
        sides: one or two.
        prompts: use the first so many prompts; None for all.

    Raises:
        LabelError: no pair is left, or a side cannot be read.
    """
    pairs, notes = _within(*sides) if len(sides) == 1 else _between(*sides)
    readable = [pair for pair in pairs if _is_utf_8(pair.prompt)]
    if len(readable) < len(pairs):
        notes = [*notes, f"{len(pairs) - len(readable)} pairs have a prompt that is no UTF-8: left out"]
    kept = set(list(dict.fromkeys(pair.prompt for pair in readable))[:prompts])
    checked, bad = _checked([pair for pair in readable if pair.prompt in kept])
    if not checked:
        between = " and ".join(side.name for side in sides)
        raise LabelError("; ".join([f"there is no pair of images of one prompt in {between}", *notes, *bad[:1]]))
    return Found(checked, [*notes, *bad])


def _is_utf_8(text: str) -> bool:
    """Whether text can be saved; JSON may hold halves of characters (lone surrogates), which cannot."""
    return text.encode(errors="replace").decode() == text


Images = dict[tuple[str, int], Path]  # (prompt, ordinal) -> file


def _within(side: Side) -> tuple[list[LabelPair], list[str]]:
    by_prompt: defaultdict[str, list[tuple[int, Path]]] = defaultdict(list)
    images, notes = _images(side)
    for (prompt, ordinal), file in images.items():
        by_prompt[prompt].append((ordinal, file))
    pairs = []
    for prompt, found in by_prompt.items():
        found.sort(key=lambda image: image[0])
        pairs += [
            LabelPair(prompt, ordinal, (file, other))
            for (ordinal, file), (_, other) in zip(found[::2], found[1::2], strict=False)
        ]
    odd = sum(len(found) % 2 for found in by_prompt.values())
    return pairs, notes + ([f"{side.name}: {odd} images have no second one of their prompt: left out"] if odd else [])


def _between(a: Side, b: Side) -> tuple[list[LabelPair], list[str]]:
    if (a.folder / INDEX).exists() or (b.folder / INDEX).exists():
        (ours, notes), (theirs, other_notes) = _images(a), _images(b)
        notes = notes + other_notes
    else:
        ours, theirs, notes = _same_names(a, b)
    pairs = [LabelPair(*key, (file, theirs[key])) for key, file in ours.items() if key in theirs]
    for side, lonely in ((a, len(ours) - len(pairs)), (b, len(theirs) - len(pairs))):
        if lonely:
            notes.append(f"{side.name}: {lonely} images have no partner on the other side: left out")
    return pairs, notes


def _images(side: Side) -> tuple[Images, list[str]]:
    """The images of a side that have a prompt."""
    if not (side.folder / INDEX).exists():
        files, prompts = _files(side.folder), _prompts(side.folder)
        named = {name: prompts[name] for name in sorted(files) if name in prompts}
        bare = len(files) - len(named)
        notes = [f"{side.name}: {bare} images have no prompt: left out; {_WHERE_PROMPTS}"] if bare else []
        return _numbered(files, named), notes
    import pandas as pd

    try:
        table = pd.read_parquet(side.folder / INDEX, columns=["prompt", "ordinal", "file"])
        rows = zip(table.prompt, table.ordinal, table.file, strict=True)
        if any(is_packed(Path(file)) for file in table.file):
            raise LabelError(
                f"{side.name}: more than {PACKED_ABOVE:,} images, which are in tar files; the page shows files: lower "
                "generate.prompts, or give a folder of images"
            )
        return {(str(p), int(k)): inside(side.folder, file) for p, k, file in rows}, []
    except LabelError:
        raise
    except RejectedRow as reason:
        raise LabelError(f"{side.folder / INDEX}: {reason.detail}") from None
    except (OSError, ValueError, KeyError) as error:
        raise LabelError(f"{side.folder / INDEX}: expected prompt, ordinal and file: {error}") from None


def _same_names(a: Side, b: Side) -> tuple[Images, Images, list[str]]:
    """Two plain folders. A prompt may be in either; where both have one they must agree."""
    ours, theirs, prompts = _files(a.folder), _files(b.folder), _prompts(a.folder)
    for name, prompt in _prompts(b.folder).items():
        if prompts.setdefault(name, prompt) != prompt:
            raise LabelError(f"{name}: {a.name} and {b.name} have different prompts; correct one of them")
    shared = {name: prompts[name] for name in sorted(ours.keys() & theirs.keys()) if name in prompts}
    bare = sum(name not in prompts for name in ours.keys() & theirs.keys())
    notes = [f"{bare} pairs of images have no prompt: left out; {_WHERE_PROMPTS}"] if bare else []
    for side, files, others in ((a, ours, theirs), (b, theirs, ours)):
        if lonely := sorted(files.keys() - others.keys()):
            notes.append(f"{side.name}: {len(lonely)} images have no partner of their name, as {lonely[0]}: left out")
    return _numbered(ours, shared), _numbered(theirs, shared), notes


def _numbered(files: Mapping[str, Path], prompts: Mapping[str, str]) -> Images:
    """Images by prompt, and the place of their name among those of the prompt."""
    counts: Counter[str] = Counter()
    images = {}
    for name, prompt in prompts.items():
        images[prompt, counts[prompt]] = files[name]
        counts[prompt] += 1
    return images


def _files(folder: Path) -> dict[str, Path]:
    """Name without ending -> image. Raises LabelError for two files of one such name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        text = path.suffix.lower() == ".txt" or path.name in FILES
        if path.is_dir() or text or is_hidden(Path(path.name)):
            continue
        if stem(path.name) in found:
            raise LabelError(f"{folder}: {found[stem(path.name)].name} and {path.name} have one name; rename one")
        found[stem(path.name)] = path
    return found


def _prompts(folder: Path) -> dict[str, str]:
    """Name without ending -> prompt, of those in the captions file and those in a `.txt`."""
    try:
        found = {
            stem(path.name): read_regular(inside(folder, path.name), MAX_TEXT_BYTES).decode("utf-8").strip()
            for path in sorted(folder.glob("*.txt"))
        }
        captions = read_captions([folder])
    except (RejectedRow, SourceError) as reason:
        raise LabelError(str(getattr(reason, "detail", reason))) from None
    except UnicodeDecodeError as error:
        raise LabelError(f"{folder}: a .txt is not UTF-8: {error}; save it as UTF-8") from None
    for name, caption in captions.prompts.items() if captions else ():
        if caption.prompt and caption.prompt.strip():
            found[stem(name)] = caption.prompt.strip()
    return {name: prompt for name, prompt in found.items() if prompt}


def _checked(pairs: Sequence[LabelPair]) -> tuple[list[LabelPair], list[str]]:
    """The pairs whose images can be shown, with their digests; and why the others cannot."""
    files = list(dict.fromkeys(file for pair in pairs for file in pair.files))
    with ThreadPoolExecutor() as pool:
        found = tqdm(pool.map(_digest, files), "check images", len(files), unit="image")
        digests = dict(zip(files, found, strict=True))
    reasons = {file: each for file, each in digests.items() if isinstance(each, RejectedRow)}
    bad = [f"{file}: {reason.detail}: its pair is left out" for file, reason in reasons.items()]
    good = []
    for pair in pairs:
        first, second = (digests[file] for file in pair.files)
        if isinstance(first, str) and isinstance(second, str):
            good.append(LabelPair(pair.prompt, pair.ordinal, pair.files, (first, second)))
    return good, bad


def _digest(file: Path) -> str | RejectedRow:
    """The digest of an image that can be decoded, else why it cannot."""
    try:
        data = read_regular(inside(file.parent, file.name))
        decode(data)
        return digest_of(data)
    except RejectedRow as reason:
        return reason


def digest_of(data: bytes) -> str:
    """What `files.digest` says of a file with these bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


_WHERE_PROMPTS = f"prompts are in {', '.join(FILES)}, or in a .txt beside each image"
