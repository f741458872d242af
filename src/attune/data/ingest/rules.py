"""What is asked of rows before an image is opened, and whether there are enough of them: rules of docs/data.md."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from attune.config.sources import Consensus
from attune.data.quarantine import Quarantine, RejectedRow
from attune.data.rows import BadRow, LabelledImage, Pair, Quota, Row, SourceError
from attune.data.splits import SPLITS, check_splits, count_rows

INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # categories of Unicode: control and format characters, spaces


@dataclass(frozen=True)
class Rules:
    """What a run decides about its rows."""

    quota: Quota = field(default_factory=Quota)
    min_side: int = 1  # pixels
    max_bad_share: float = 0.2
    wanted: Mapping[str, int] = field(default_factory=dict)  # counts by name -> the fewest there must be
    consensus: Consensus | None = None  # of training pairs


def check_rows(rows: Iterable[Row], quarantine: Quarantine, rules: Rules) -> None:
    """What can be said of rows without opening an image, before a model is loaded; nothing is kept of them.

    Raises:
        TooManyBadRows: more than `rules.max_bad_share`, whatever their images are.
        SourceError: fewer prompts or pairs than `rules.wanted`, even if all images are good.
    """
    seen, good = 0, list[Row]()
    for row in rows:
        seen += 1
        try:
            if isinstance(row, BadRow):
                raise RejectedRow(row.reason, row.detail)
            clean_prompt(row.prompt)
            if isinstance(row, Pair):
                label(row)
            if isinstance(row, LabelledImage):
                verdict(row)
            good.append(row)
        except RejectedRow as reason:
            quarantine.add(str(reason), row.file, row.row, row.prompt, reason.detail)
    quarantine.check(seen, rules.max_bad_share)
    counts = count_rows(good, Quota(rules.quota.limits)) | {"quarantined": quarantine.reasons.total()}
    check_enough(counts | {f"quarantined/{reason}": n for reason, n in quarantine.reasons.items()}, rules.wanted)


def check_enough(counts: Mapping[str, float], wanted: Mapping[str, int]) -> None:
    """Raises SourceError for fewer prompts, pairs or images than wanted; it says where the rows are instead.

    Args:
        counts: of all rows, so that a name that is not there counts 0.
    """
    if not counts["prompts/train"] + counts["prompts/validation"] + counts["prompts/test"]:
        raise SourceError(f"the source has no usable row; {_whereabouts(counts)}")
    try:
        check_splits(dict.fromkeys(wanted, 0) | dict(counts), wanted)
    except SourceError as error:
        raise SourceError(f"{error}; {_whereabouts(counts)}") from None


def _whereabouts(counts: Mapping[str, float]) -> str:
    """What became of the rows: pairs of each split with ties, or images with verdicts; and bad rows by reason."""
    kind = "images" if "images/train" in counts else "pairs"
    found = [f"{counts[f'{kind}/{split}']} {split} {kind}" for split in SPLITS]
    if kind == "images":
        found[0] += f", {counts['liked/train']} of them liked and {counts['disliked/train']} disliked"
    else:
        found[0] += f", {counts['pairs/train'] - counts['choices/train']} of them ties"
    reasons = [f"{n} {name.partition('/')[2]}" for name, n in counts.items() if name.startswith("quarantined/")]
    return f"there are {', '.join(found)}, and in the quarantine {', '.join(reasons) or 'no row'}"


def dissenters(label_0: float, scores: Mapping[str, tuple[float, float]], consensus: Consensus) -> list[str]:
    """The scorers of a consensus that do not prefer the chosen image; all of them for a tie, which chooses none.

    Args:
        scores: scorer -> scores of both images.
    """
    gaps = {name: scores[name][0] - scores[name][1] for name in consensus.scorers}
    return [name for name, gap in gaps.items() if not gap * (label_0 - 0.5) > 0]


def is_kept(dissenting: Sequence[str], consensus: Consensus) -> bool:
    """Whether enough scorers agree with the choice of a pair."""
    return not dissenting if consensus.keep == "all" else 2 * len(dissenting) < len(consensus.scorers)


def label(pair: Pair) -> float:
    """label_0 of a pair.

    Raises:
        RejectedRow: it has none, or none that makes sense.
    """
    label_0, label_1 = pair.label_0, pair.label_1
    if label_0 is None or label_1 is None or math.isnan(label_0 + label_1):
        missing = "label_1" if label_0 is not None and math.isfinite(label_0) else "label_0"
        raise RejectedRow("no_label", f"{missing}: expected 1, 0 or 0.5 for a tie")
    if abs(label_0 + label_1 - 1) > 1e-6:
        raise RejectedRow("label_sum", f"label_0 {label_0:g} and label_1 {label_1:g}: expected a sum of 1")
    if label_0 not in (0, 0.5, 1):
        raise RejectedRow("label_value", f"label_0 {label_0:g}: expected 1, 0 or 0.5 for a tie")
    return float(label_0)


def verdict(image: LabelledImage) -> bool:
    """Whether an image is liked. Raises RejectedRow, `no_label`, where nobody has said."""
    if image.liked is None:
        raise RejectedRow("no_label", "liked: expected true or false")
    return image.liked


def clean_prompt(prompt: str | None) -> str:
    """The prompt without the space around it.

    Raises:
        RejectedRow: there is none, none of its characters can be seen, or it is no text.
    """
    if prompt is not None and not isinstance(prompt, str):
        raise RejectedRow("malformed_row", f"prompt: expected text, found a {type(prompt).__name__}")
    try:
        (prompt or "").encode()
    except UnicodeEncodeError as error:
        raise RejectedRow("malformed_row", f"prompt: expected text in UTF-8; {error.reason}") from None
    if prompt is None or all(unicodedata.category(letter) in INVISIBLE for letter in prompt):
        raise RejectedRow("empty_prompt", "prompt: expected text")
    return prompt.strip()
