"""What people chose: answers of the labelling page about two runs' images, read from files and compared.

`make label` writes reports/<profile>/people/<a>-vs-<b>.csv, a row per answer. As in the other comparisons the prompt is
the unit: the answers about one prompt are averaged first.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from attune.evaluation.agreement import Agreement, agreement, wilson_interval
from attune.evaluation.images import image_bytes
from attune.evaluation.protocol import score_columns
from attune.evaluation.statistics import bootstrap_mean_ci, holm, prompt_means

VALUES = {"a": 0.0, "tie": 0.5, "bad": 0.5, "b": 1.0}
"""Answer -> what it counts for the second run; `bad` means that neither image is acceptable."""
Key = tuple[str, int, tuple[str, str], bool]  # prompt, ordinal, digests, whether it is shown again
COLUMNS = ("prompt", "ordinal", "digest_a", "digest_b", "annotator", "repeat", "answer", "answered_at")


@dataclass(frozen=True)
class Answer:
    """One person's answer about two images of a prompt."""

    prompt: str
    ordinal: int
    digests: tuple[str, str]  # of the files of both images (`files.digest`)
    annotator: str
    repeat: bool  # the pair was shown before; this answer only serves the agreement with oneself
    answer: str  # a key of VALUES
    answered_at: str  # ISO 8601, UTC

    @property
    def pair(self) -> tuple[str, int, tuple[str, str]]:
        """What was shown."""
        return self.prompt, self.ordinal, self.digests

    @property
    def key(self) -> Key:
        """What was asked."""
        return *self.pair, self.repeat


@dataclass(frozen=True)
class ScorerAgreement:
    """How often a scorer prefers the run that people prefer, over prompts of which both prefer one."""

    share: float
    ci95: tuple[float, float]  # Wilson's
    n_prompts: int


@dataclass(frozen=True)
class PeopleComparison:
    """A run against another by people; numbers without answers are nan."""

    run: str
    other: str
    win_rate: float  # of `run`, over prompts; ties and pairs of which neither is acceptable count half
    ci95: tuple[float, float]  # bootstrap over prompts
    p_value: float  # two-sided exact sign test over prompts, uncorrected
    p_holm: float  # corrected over all comparisons by people in the report
    n_prompts: int
    n_pairs: int
    n_answers: int  # repeats are no answers here
    n_annotators: int
    ties: int
    both_bad: int
    changed: int  # answers, repeats too, about images that are no longer the run's; not used
    with_oneself: Agreement | None  # None: no pair was shown twice
    between: Agreement | None  # None: no pair has answers of two people
    scorers: Mapping[str, ScorerAgreement] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PeopleComparison:
        """The inverse of `dataclasses.asdict` after JSON, where nan is null."""
        names = ("win_rate", "p_value", "p_holm")
        numbers = {name: math.nan if values[name] is None else values[name] for name in names}
        interval = tuple(math.nan if end is None else end for end in values["ci95"])
        found = {name: Agreement.from_dict(values[name]) for name in ("with_oneself", "between")}
        scorers = {
            name: ScorerAgreement(**{**each, "ci95": tuple(each["ci95"])}) for name, each in values["scorers"].items()
        }
        return cls(**{**values, **numbers, **found, "ci95": interval, "scorers": scorers})


def compare(answers: Sequence[Answer], run: str, other: str, *, changed: int = 0, seed: int = 0) -> PeopleComparison:
    """Compares `run`, the second images of the pairs, with `other`, the first ones; p_holm is of this test alone.

    Args:
        answers: of any number of people, repeats too.
        changed: answers that were left out, to be told.
        seed: of the bootstrap.
    """
    first = [answer for answer in answers if not answer.repeat]
    values = np.array([VALUES[answer.answer] for answer in first])
    means = prompt_means(values, [answer.prompt for answer in first])[0] if first else np.empty(0)
    p_value = sign_test_p(means - 0.5) if first else math.nan
    return PeopleComparison(
        run=run,
        other=other,
        win_rate=float(means.mean()) if first else math.nan,
        ci95=bootstrap_mean_ci(means, seed=seed) if first else (math.nan, math.nan),
        p_value=p_value,
        p_holm=p_value,
        n_prompts=len(means),
        n_pairs=len({answer.pair for answer in first}),
        n_answers=len(first),
        n_annotators=len({answer.annotator for answer in first}),
        ties=sum(answer.answer == "tie" for answer in first),
        both_bad=sum(answer.answer == "bad" for answer in first),
        changed=changed,
        with_oneself=_agreement_with_oneself(answers),
        between=_agreement_between(first),
    )


def sign_test_p(differences: np.ndarray) -> float:
    """Two-sided p-value of the exact sign test of differences (n,); zeros are left out, and without others it is 1."""
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _agreement_with_oneself(answers: Iterable[Answer]) -> Agreement | None:
    """Of the first answers about pairs with the later ones of the same person."""
    items: defaultdict[Any, dict[str, str]] = defaultdict(dict)
    for answer in answers:
        items[answer.annotator, answer.pair]["later" if answer.repeat else "first"] = answer.answer
    return agreement(list(items.values()))


def _agreement_between(answers: Iterable[Answer]) -> Agreement | None:
    items: defaultdict[Any, dict[str, str]] = defaultdict(dict)
    for answer in answers:
        items[answer.pair][answer.annotator] = answer.answer
    return agreement(list(items.values()))


def read_people(
    folder: Path, tables: Mapping[str, pd.DataFrame], generated: Path, seed: int
) -> tuple[PeopleComparison, ...]:
    """Every two runs that people compared, with p-values corrected over all of them.

    Args:
        folder: with <a>-vs-<b>.csv.
        tables: run -> a row per image with prompt, ordinal and file.
        generated: folder of the runs' folders of images.
        seed: of the bootstrap.

    Raises:
        ValueError: a file is not what the labelling page writes; it names file and row.
    """
    found = []
    for other, run in permutations(tables, 2):
        file = folder / f"{other}-vs-{run}.csv"
        if file.exists():
            answers = read_answers(file)
            images = [_images(tables[name], generated / name) for name in (other, run)]
            current = [answer for answer in answers if _is_current(answer, images)]
            compared = compare(current, run, other, changed=len(answers) - len(current), seed=seed)
            found.append(replace(compared, scorers=agreement_of_scorers(current, tables[run], tables[other])))
    return with_holm(found)


def agreement_of_scorers(
    answers: Sequence[Answer], run: pd.DataFrame, other: pd.DataFrame
) -> dict[str, ScorerAgreement]:
    """Scorer -> how often it prefers the run that people prefer, of the prompts that were asked about."""
    first = [answer for answer in answers if not answer.repeat]
    if not first:
        return {}
    values = np.array([VALUES[answer.answer] for answer in first])
    means, names = prompt_means(values, [_plain(answer.prompt) for answer in first])
    found = {}
    for scorer in (column for column in score_columns(run) if "." not in column):
        scores = [
            dict(zip(map(_plain, ps), v, strict=True))
            for v, ps in (prompt_means(t[scorer].to_numpy(float), t["prompt"]) for t in (run, other))
        ]
        signs = np.array([np.sign(scores[0][name] - scores[1][name]) for name in names])
        decided = (signs != 0) & (means != 0.5)
        if n := int(decided.sum()):
            share = float((signs == np.sign(means - 0.5))[decided].mean())
            found[scorer] = ScorerAgreement(share, wilson_interval(share, n), n)
    return found


def with_holm(comparisons: Sequence[PeopleComparison]) -> tuple[PeopleComparison, ...]:
    """The comparisons with p-values corrected over those that have answers."""
    tested = [each.p_value for each in comparisons if each.n_answers]
    corrected = iter(holm(tested))
    return tuple(replace(each, p_holm=float(next(corrected))) if each.n_answers else each for each in comparisons)


def _images(table: pd.DataFrame, folder: Path) -> dict[tuple[str, int], Path]:
    rows = zip(table["prompt"], table["ordinal"], table["file"], strict=True)
    return {(_plain(prompt), int(ordinal)): folder / file for prompt, ordinal, file in rows}


def _is_current(answer: Answer, images: Sequence[Mapping[tuple[str, int], Path]]) -> bool:
    """Whether both images of an answer are what the runs have now for its prompt."""
    files = [side.get((_plain(answer.prompt), answer.ordinal)) for side in images]
    return all(file is not None and _digest(file) == wanted for file, wanted in zip(files, answer.digests, strict=True))


def _digest(file: Path) -> str | None:
    """What `files.digest` says of an image's file, which may be in a pack; None if it is not there."""
    try:
        return hashlib.sha256(image_bytes(file)).hexdigest()[:16]
    except OSError:
        return None


def _plain(prompt: str) -> str:
    """A prompt without what a CSV has more or less: the apostrophe before a formula, and NULs."""
    return prompt.replace("\0", "").removeprefix("'")


def read_answers(file: Path) -> list[Answer]:
    """The answers of a CSV that the labelling page wrote.

    Raises:
        ValueError: a column is missing, or a row has no answer that there is.
    """
    with file.open(encoding="utf-8", newline="") as opened:
        rows = csv.DictReader(opened)
        missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{file}: column {missing[0]!r} is missing; `make label` with --export writes it anew")
        return [_answer(row, f"{file}, row {number}") for number, row in enumerate(rows, start=1)]


def _answer(row: Mapping[str, str], where: str) -> Answer:
    if row["answer"] not in VALUES or row["repeat"] not in ("0", "1") or not (row["ordinal"] or "").isdecimal():
        expected = f"answer in {', '.join(VALUES)}; repeat 0 or 1; ordinal a number"
        raise ValueError(f"{where}: expected {expected}; `make label` with --export writes the file anew")
    return Answer(
        prompt=row["prompt"],
        ordinal=int(row["ordinal"]),
        digests=(row["digest_a"], row["digest_b"]),
        annotator=row["annotator"],
        repeat=row["repeat"] == "1",
        answer=row["answer"],
        answered_at=row["answered_at"],
    )
