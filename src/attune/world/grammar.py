"""The prompt grammar of the embedded world: 22,500 prompts, each a `Scene`, each read back exactly.

Three kinds of prompt:
    one       "a large red circle on a white background"
    count     "three green crosses on a pink background"
    relation  "a blue ring above a yellow square on a gray background"

Splits hold out *combinations*: with d = (shape - colour) mod 6, every test prompt has an object with d = 0 (red
circles, green squares, ...) and no other prompt has one; every validation prompt has one with d = 1, and no
training prompt has. So a method that only memorised its training prompts gains nothing on the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.10, 0.60, 0.18),
    "blue": (0.12, 0.22, 0.88),
    "yellow": (0.98, 0.86, 0.08),
    "orange": (0.98, 0.47, 0.02),
    "purple": (0.52, 0.10, 0.62),
}
BACKGROUNDS = {
    "white": (0.98, 0.98, 0.98),
    "black": (0.05, 0.05, 0.05),
    "gray": (0.52, 0.52, 0.52),
    "pink": (1.00, 0.74, 0.82),
    "cyan": (0.62, 0.94, 0.96),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = ("small", "medium", "large")
COUNTS = {"two": 2, "three": 3}
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
KINDS = ("one", "count", "relation")

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for. `colours` and `shapes` have one entry, or two for a relation."""

    kind: Literal["one", "count", "relation"]
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    background: str
    size: str | None = None
    count: int = 1
    relation: str | None = None

    @property
    def prompt(self) -> str:
        """The scene in words."""
        if self.kind == "one":
            subject = f"a {self.size} {self.colours[0]} {self.shapes[0]}"
        elif self.kind == "count":
            word = next(word for word, n in COUNTS.items() if n == self.count)
            subject = f"{word} {self.colours[0]} {_plural(self.shapes[0])}"
        else:
            first, second = (f"{_article(c)} {c} {s}" for c, s in zip(self.colours, self.shapes, strict=True))
            subject = f"{first} {self.relation} {second}"
        return f"{subject} on a {self.background} background"

    @property
    def split(self) -> Split:
        """The only split this combination of colours and shapes may appear in."""
        offsets = {
            (SHAPES.index(shape) - list(COLOURS).index(colour)) % len(SHAPES)
            for colour, shape in zip(self.colours, self.shapes, strict=True)
        }
        return "test" if 0 in offsets else "validation" if 1 in offsets else "train"


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene of the grammar, in a fixed order."""
    ones = [Scene("one", (c,), (s,), b, size=z) for c, s, z, b in product(COLOURS, SHAPES, SIZES, BACKGROUNDS)]
    counts = [
        Scene("count", (c,), (s,), b, count=n) for c, s, n, b in product(COLOURS, SHAPES, COUNTS.values(), BACKGROUNDS)
    ]
    relations = [
        Scene("relation", (c1, c2), (s1, s2), b, count=2, relation=r)
        for c1, s1, c2, s2, r, b in product(COLOURS, SHAPES, COLOURS, SHAPES, RELATIONS, BACKGROUNDS)
        if c1 != c2
    ]
    return (*ones, *counts, *relations)


def vocabulary() -> list[str]:
    """Every word of the grammar, sorted; the tokenizer of the embedded family knows these and no others."""
    words = " ".join([*COLOURS, *BACKGROUNDS, *SIZES, *COUNTS, *RELATIONS, *SHAPES, *map(_plural, SHAPES)])
    return sorted({*words.split(), "a", "an", "on", "background"})


@cache
def parse(prompt: str) -> Scene:
    """Reads a prompt back into its scene.

    Raises:
        ValueError: the prompt is not in the grammar.
    """
    match = _PATTERN.fullmatch(prompt.strip().lower())
    if match is None:
        raise ValueError(f"not a prompt of the embedded world: {prompt!r}")
    part = match.groupdict()
    if part["size"]:
        return Scene("one", (part["colour"],), (part["shape"],), part["background"], size=part["size"])
    if part["count"]:
        shape = next(s for s in SHAPES if _plural(s) == part["shapes"])
        return Scene("count", (part["many"],), (shape,), part["background"], count=COUNTS[part["count"]])
    return Scene(
        "relation",
        (part["colour1"], part["colour2"]),
        (part["shape1"], part["shape2"]),
        part["background"],
        count=2,
        relation=part["relation"],
    )


def is_of_the_world(prompt: str) -> bool:
    """Whether a prompt is in the grammar, so that the oracle can score images of it."""
    return _PATTERN.fullmatch(prompt.strip().lower()) is not None


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _any(words: Iterable[str]) -> str:
    return "|".join(words)


_PATTERN = re.compile(
    rf"(?:a (?P<size>{_any(SIZES)}) (?P<colour>{_any(COLOURS)}) (?P<shape>{_any(SHAPES)})"
    rf"|(?P<count>{_any(COUNTS)}) (?P<many>{_any(COLOURS)}) (?P<shapes>{_any(map(_plural, SHAPES))})"
    rf"|an? (?P<colour1>{_any(COLOURS)}) (?P<shape1>{_any(SHAPES)}) (?P<relation>{_any(RELATIONS)})"
    rf" an? (?P<colour2>{_any(COLOURS)}) (?P<shape2>{_any(SHAPES)}))"
    rf" on a (?P<background>{_any(BACKGROUNDS)}) background"
)
