"""The quarantine for a page: rows by reason, what to do about each, and the first of them as examples."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from attune.data.quarantine import REDUNDANT
from attune.data.splits import normalize_prompt
from attune.text import cut

EXAMPLES = 3
CELL_CHARS = 160
LEAK = "prompt_in_later_split"
UNKNOWN = "see the column detail of the quarantine"
REMEDIES = {
    "empty_prompt": "write a prompt for each of these, or remove them",
    "malformed_row": "correct the row: the column detail says what was expected where",
    "unreadable_file": "fetch or write the file again: it is damaged",
    "no_label": "label these pairs: 1, 0, or 0.5 for a tie",
    "label_sum": "correct label_0 or label_1: together they are 1",
    "label_value": "write 1, 0, or 0.5 for a tie; a soft label is none that people gave",
    "missing_image": "put the image there or correct its name; images must lie inside the data's folder",
    "undecodable": "save the image again as PNG or JPEG: it is damaged, or of a type that is not read",
    "too_large": "save the image smaller: more than 89 million pixels or 268 MB are not read",
    "too_small": "bring larger images, or lower data.min_side",
    "too_narrow": "crop the image: one side is more than 100 times the other",
    "pixel_range": "save the image with 8 bits: its black and white are not known",
    "ambiguous_name": "give each pair a name of its own: these are equal but for their endings",
    "unused_file": "nothing, if these files belong to no pair; else name them as their pair",
    "no_other_image": "nothing: a prompt with a single image has nothing to compare",
    "low_confidence": "nothing, or lower data.min_confidence: people were not sure of these choices",
    "no_consensus": "nothing, or change data.consensus: scorers prefer the other image, or there was a tie",
    "not_finite": "leave the image out: a scorer gives it no finite score",
    "duplicate_pair": "nothing: the same choice about the same images counts once",
    "duplicate_image": "nothing: the same verdict about the same image counts once",
    LEAK: "nothing, or write the prompt in one split only: the later split keeps it",
}


@dataclass(frozen=True)
class Example:
    """A row of the quarantine, in cells that are short."""

    file: str
    row: str
    prompt: str
    detail: str


@dataclass(frozen=True)
class Rejected:
    """The rows of one reason."""

    reason: str
    rows: int
    is_bad: bool  # False: left out because the data have it already, or do not need it
    remedy: str
    examples: list[Example]


def rejected(file: Path, reasons: Mapping[str, int]) -> list[Rejected]:
    """The reasons of a quarantine file, bad ones first and then the most frequent ones."""
    examples: dict[str, list[Example]] = {reason: [] for reason in reasons}
    for cells in _rows(file):
        if len(examples[cells["reason"]]) < EXAMPLES:
            short = (cut(cells[name], CELL_CHARS) for name in ("file", "row", "prompt", "detail"))
            examples[cells["reason"]].append(Example(*short))
    found = [
        Rejected(reason, n, reason not in REDUNDANT, REMEDIES.get(reason, UNKNOWN), examples[reason])
        for reason, n in reasons.items()
    ]
    return sorted(found, key=lambda each: (not each.is_bad, -each.rows, each.reason))


def leaking_prompts(file: Path) -> int:
    """Prompts that were found in several splits, whatever their spelling."""
    return len({normalize_prompt(cells["prompt"]) for cells in _rows(file) if cells["reason"] == LEAK})


def _rows(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)
