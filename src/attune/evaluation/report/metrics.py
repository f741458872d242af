"""The figures that `dvc metrics` and `dvc exp show` print: a few of each run, of as few letters as 120 columns need.

DVC puts all figures of a file into one row. So the keys are hardly more than the run's name, an interval is one text,
and a run's own mean is not there: it is the base's plus the gain.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

from attune.evaluation.summary import MethodSummary, Summary

LEAST_DIGITS, MOST_DIGITS = 3, 6
MARKS = {"suspect": "?", "hacked": ""}
"""What `hacked` puts behind a run's name, by the word for it; other runs are not named."""


def metrics(summary: Summary) -> dict[str, float | str]:
    """The base's mean by the headline scorer, every other run's gain over it with its 95 % interval, and who is hacked.

    Returns:
        {"base": 0.609, "dpo": 0.145, "dpo 95%": "0.117..0.175", ..., "hacked": "none"}, in the scorer's units. Hacked
        "sft, spo?" says that sft is and spo is a suspect; where the runs were not judged, there is no `hacked`.
    """
    entries = {name: method.vs_base[summary.headline] for name, method in summary.tuned.items()}
    digits = decimals(high - low for low, high in (entry.difference_ci95 for entry in entries.values()))
    values: dict[str, float | str] = {
        summary.base: round(summary.methods[summary.base].scores[summary.headline].mean, digits)
    }
    for name, entry in entries.items():
        low, high = entry.difference_ci95
        values[name] = round(entry.difference, digits)
        values[f"{name} 95%"] = f"{low:.{digits}f}..{high:.{digits}f}"
    words = {name: hacking_word(method) for name, method in summary.tuned.items()}
    if any(words.values()):
        values["hacked"] = ", ".join(f"{name}{MARKS[word]}" for name, word in words.items() if word in MARKS) or "none"
    return values


def hacking_word(method: MethodSummary) -> str | None:
    """none, suspect or hacked; None of a run that was not judged."""
    return method.hacking.word if method.hacking else None


def decimals(widths: Iterable[float]) -> int:
    """Decimals that give the narrowest interval two digits; intervals of no width say nothing."""
    found = [width for width in widths if math.isfinite(width) and width > 0]
    wanted = 1 - math.floor(math.log10(min(found))) if found else LEAST_DIGITS
    return min(MOST_DIGITS, max(LEAST_DIGITS, wanted))


def to_json(summary: Summary) -> str:
    """The text of metrics.json."""
    return json.dumps(metrics(summary), indent=1) + "\n"
