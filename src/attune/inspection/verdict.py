"""The verdict: what stops a training on these data, what to look at first, and what to do about it, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from attune.data.rows import SourceError
from attune.data.splits import check_splits
from attune.inspection.choices import Agreement, Share
from attune.inspection.facts import DEEP_CUT, Facts
from attune.inspection.learning import PREFERENCE_MODEL, Learning

MANY_EPOCHS = 20  # of one row; the papers present a pair 1 to 5 times
FEW_CHOICES = 200
FEW_PROMPTS = 20  # an interval of so few says little
MANY_CIRCLES = 0.2  # of the triples; choices by a coin make a quarter of them circles
MANY_TIES = 0.5
NOTICED = 0.01  # smaller shares of pairs are not worth a line of their own

Level = Literal["stops", "look", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that was found, and its remedy."""

    level: Level
    text: str
    remedy: str


@dataclass(frozen=True)
class Verdict:
    """All findings, the gravest first."""

    findings: list[Finding]

    @property
    def level(self) -> Level:
        return self.findings[0].level if self.findings else "note"

    @property
    def sentence(self) -> str:
        n = {level: sum(f.level == level for f in self.findings) for level in ("stops", "look")}
        if n["stops"]:
            return f"These data cannot be trained on yet: {_things(n['stops'])} would stop prepare or a training."
        if n["look"]:
            return f"These data can be trained on. Look at {_things(n['look'])} first."
        return "These data can be trained on. Nothing stands out."


def verdict(facts: Facts, wanted: Mapping[str, int], trainings: Sequence[Learning]) -> Verdict:
    """Everything worth a sentence.

    Args:
        wanted: `prompts/<split>`, `pairs/<split>`, `choices/train` -> the fewest that prepare must find.
        trainings: what each run would learn from.
    """
    checks = (_bad_rows(facts), _too_few(facts, wanted), _choices(facts), _scorers(facts), _teaching(facts, trainings))
    found = [finding for check in (*checks, _images(facts), _prompts(facts), _notes(facts)) for finding in check]
    order: tuple[Level, ...] = ("stops", "look", "note")
    return Verdict(sorted(found, key=lambda finding: order.index(finding.level)))


def _bad_rows(facts: Facts) -> Iterator[Finding]:
    bad = [each for each in facts.rejected if each.is_bad]
    rows = sum(each.rows for each in bad)
    if not bad:
        return
    most = f"{bad[0].reason}, {count(bad[0].rows, 'row')}: {bad[0].remedy}"
    text = f"{count(rows, 'row')} of {facts.found.rows:,} ({percent(rows, facts.found.rows)}) cannot be used."
    if facts.found.too_bad is None:
        yield Finding("look", text, f"The most frequent reason is {most}.")
    else:
        text = f"{text} prepare stops: that is more than data.max_bad_share."
        yield Finding("stops", text, f"The most frequent reason is {most}. Or raise data.max_bad_share.")


def _too_few(facts: Facts, wanted: Mapping[str, int]) -> Iterator[Finding]:
    counts = facts.found.counts
    if not counts["prompts"] and facts.found.is_whole:
        yield Finding("stops", "There is no row that can be used.", "See the quarantine for the reasons.")
        return
    for name, n in wanted.items() if facts.found.is_whole else ():
        try:
            check_splits(counts, {name: n})
        except SourceError as error:
            text, _, remedy = str(error).removeprefix("data: ").rpartition(": ")
            if ":" in remedy or not text:
                text, remedy = str(error).removeprefix("data: "), ""
            yield Finding("stops", f"{text[:1].upper()}{text[1:]}.", f"{remedy[:1].upper()}{remedy[1:]}.")


def _choices(facts: Facts) -> Iterator[Finding]:
    n, decided = int(facts.found.counts["pairs"]), sum(facts.choices.values())
    if facts.contradictions.share > NOTICED:
        text = f"{count(facts.contradictions.pairs, 'pair')} ({percent(facts.contradictions.share)} of the choices) "
        text += "contradict: the same images and prompt, and opposite choices."
        yield Finding("look", text, "If people disagree, keep them; if not, the two labels or folders are mixed up.")
    if facts.identical:
        text = f"{count(facts.identical, 'pair', 'show')} the same image twice."
        yield Finding("look", text, "They teach nothing; remove them.")
    position = facts.position
    if position and not position.is_chance and position.value not in (0, 1) and position.prompts >= FEW_PROMPTS:
        side = 0 if position.value > 0.5 else 1
        text = f"Image {side} is chosen more often than a coin would: image 0 in {interval(position)} of the choices."
        yield Finding("look", text, "People who always see it on one side may prefer that side; labels tell less then.")
    if n and (n - decided) / n > MANY_TIES:
        text = f"{percent(n - decided, n)} of the pairs are ties, {n - decided:,} of {n:,}."
        yield Finding("look", text, "Methods on a chosen and a rejected image leave them out.")
    share = facts.circles.circles / max(1, facts.circles.triples)
    if facts.circles.triples >= FEW_PROMPTS and share >= MANY_CIRCLES:
        text = (
            f"{facts.circles.circles:,} of {facts.circles.triples:,} triples go in a circle (a over b over c over a)."
        )
        yield Finding("look", text, "A coin makes a quarter of them circles, so these choices are close to chance.")


def _scorers(facts: Facts) -> Iterator[Finding]:
    for agreement in facts.agreements:
        share = agreement.accuracy
        if share.prompts >= FEW_PROMPTS and share.value < 0.5 and not share.is_chance:
            remedy = "Look at the pairs below: are chosen and rejected mixed up, or label_0 and label_1?"
            yield Finding("look", f"{agreement.scorer} prefers the other image: {said(agreement)}.", remedy)
        elif share.prompts >= FEW_PROMPTS and share.is_chance:
            remedy = "Either the choices are close to chance, or the scorer cannot judge such images."
            yield Finding("look", f"{agreement.scorer} agrees with the choices {said(agreement)}.", remedy)


def _teaching(facts: Facts, trainings: Sequence[Learning]) -> Iterator[Finding]:
    if not facts.found.is_whole:
        return
    few = [each for each in trainings if each.kind in ("choices", "pairs") and 0 < each.rows < FEW_CHOICES]
    if few:
        names, n = ", ".join(each.run for each in few), min(each.rows for each in few)
        text = f"{names} would learn from {count(n, 'training pair')} alone."
        yield Finding("look", text, "So few are soon known by heart; bring more, or expect the style of these.")
    for each in trainings:
        if each.rows and each.epochs > MANY_EPOCHS:
            text = f"{each.run} would see each of its {count(each.rows, each.kind.removesuffix('s'))} "
            text += f"{each.epochs:,.0f} times."
            key = "preference" if each.run == PREFERENCE_MODEL else f"methods.{each.run}"
            yield Finding("look", text, f"Lower {key}.batches, or bring more data.")


def _images(facts: Facts) -> Iterator[Finding]:
    images = facts.images
    if images is None:
        return
    if images.enlarged:
        text = f"{count(images.enlarged, 'image')} of {images.images:,} ({percent(images.enlarged, images.images)}) "
        text += f"will be enlarged: the model's side is {images.resolution} pixels."
        yield Finding("look", text, "A model learns their blur; bring larger images, or set data.min_side.")
    if images.deeply_cropped:
        text = (
            f"{count(images.deeply_cropped, 'image')} ({percent(images.deeply_cropped, images.images)}) will lose more "
        )
        text += f"than {percent(DEEP_CUT)} of their area to the centre crop, at most {percent(images.largest_cut)}."
        yield Finding("look", text, "Crop them yourself where what the prompt says lies outside of the centre.")


def _prompts(facts: Facts) -> Iterator[Finding]:
    if facts.lengths.cut:
        n, of = facts.lengths.cut, len(facts.lengths.counts)
        text = f"{count(n, 'prompt')} of {of:,} will be cut: the text encoder reads {facts.lengths.limit} tokens."
        yield Finding("look", text, "Say what matters first.")
    if facts.leaks:
        text = f"{count(facts.leaks, 'prompt', 'stand')} in several splits; the last of train, validation, test counts."
        yield Finding("look", text, "Write each prompt in one split if the other rows are to be used.")


def _notes(facts: Facts) -> Iterator[Finding]:
    if not facts.found.is_whole:
        text = f"Only the first {facts.found.rows:,} rows were read."
        yield Finding(
            "note", text, "Whether there are enough of each split cannot be said; read all without --max-rows."
        )
    if facts.position and facts.position.value in (0, 1):
        text = f"The source names the {'chosen' if facts.position.value else 'rejected'} image first, in every pair."
        yield Finding("note", text, "That is how it stores them and says nothing about the people who chose.")
    for each in facts.agreements:
        if each.accuracy.prompts < FEW_PROMPTS:
            text = f"{each.scorer} was asked about {count(each.accuracy.prompts, 'prompt')} with a choice."
            yield Finding("note", text, "So few say little about how far it agrees.")


def said(agreement: Agreement) -> str:
    """How far a scorer agrees, in words."""
    share = agreement.accuracy
    if share.is_chance:
        return f"no better than chance: {interval(share)}"
    return f"it is right in {interval(share)}"


def interval(share: Share) -> str:
    """A share with its 95 % interval."""
    return f"{percent(share.value)} (95 % interval {percent(share.low)} to {percent(share.high)})"


def percent(part: float, of: float = 1) -> str:
    """A share in per cent: whole, but for small ones."""
    value = 100 * part / of if of else 0.0
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.1f} %"


def count(n: float, what: str, does: str = "") -> str:
    """A number of things, and what they do."""
    thing, verb = (what, f" {does}s") if n == 1 else (f"{what}s", f" {does}")
    return f"{n:,.0f} {thing}{verb if does else ''}"


def _things(n: int) -> str:
    return "one thing" if n == 1 else f"{n} things"
