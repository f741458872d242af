"""The summary: every number of the report as typed values, and as reports/summary.json.

The fields of these classes are the keys of the JSON file, in its order. Three things differ: undefined numbers are
nan here and null there, `n_prompts` is written although the protocol has it, and what was not measured is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from attune.evaluation.hacking import Hacking, Sign, Suspicion
from attune.evaluation.people import PeopleComparison
from attune.evaluation.protocol import Protocol

ALPHA = 0.05

Evidence = Literal["better", "worse", "mixed", "no evidence"]


def evidence(p: float, difference_ci95: tuple[float, float], win_rate: float) -> Evidence:
    """What a comparison allows to say.

    Better or worse needs p < 0.05, an interval of the mean difference that excludes 0, and a win rate on the same
    side. Significant without the rest is mixed: a few prompts carry the mean, or many small wins the ranks.
    """
    low, high = difference_ci95
    if p >= ALPHA:
        return "no evidence"
    if low > 0 and win_rate > 0.5:
        return "better"
    return "worse" if high < 0 and win_rate < 0.5 else "mixed"


@dataclass(frozen=True)
class Location:
    """Where the scores of a method lie, over prompts, in the scorer's units."""

    mean: float
    median: float
    sd: float  # standard deviation over prompts; nan where there is none


@dataclass(frozen=True)
class ComparisonEntry:
    """A method against another by one scorer, paired by prompt; differences in the scorer's units."""

    win_rate: float  # share of prompts won, ties count half
    ci95: tuple[float, float]  # of the win rate
    p_value: float  # two-sided Wilcoxon signed-rank, uncorrected
    difference: float  # mean paired difference, positive where the method is better
    difference_ci95: tuple[float, float]
    minimum_detectable_effect: float  # nan for one prompt
    p_holm: float | None = None  # corrected over the family of tests; None for a part of a scorer, which is not tested

    @property
    def p_corrected(self) -> float:
        """`p_holm`; nan of a part of a scorer, which no level of significance is above."""
        return math.nan if self.p_holm is None else self.p_holm

    @property
    def evidence(self) -> Evidence:
        """What the comparison allows to say, by the corrected p-value; of a part of a scorer nothing is claimed."""
        return "no evidence" if self.p_holm is None else evidence(self.p_holm, self.difference_ci95, self.win_rate)


@dataclass(frozen=True)
class Gap:
    """Reward-hacking gap: mean gain on the scorers a method was trained on minus mean gain on the held-out ones.

    In units of the base's spread over prompts (`statistics.standardised_differences`). Near 0 when the method gains by
    all scorers alike; large when it gains only by those it was trained on. nan where the base's scores have no spread.
    """

    trained: float
    heldout: float
    gap: float
    ci95: tuple[float, float]  # of the gap, bootstrap over prompts

    @property
    def is_open(self) -> bool:
        """Whether the interval of the gap lies above 0."""
        return self.ci95[0] > 0


@dataclass(frozen=True)
class Extreme:
    """One prompt and by how much its mean score by the first scorer changed."""

    prompt: str
    difference: float


@dataclass(frozen=True)
class Extremes:
    """The prompts that changed most, the largest change first."""

    gained: tuple[Extreme, ...]
    lost: tuple[Extreme, ...]


@dataclass(frozen=True)
class MethodSummary:
    """One method. The base has an empty `vs_base`, no `gap`, no `extremes`, no `signs` and no `hacking`."""

    scores: Mapping[str, Location]  # scorer, or scorer.part
    vs_base: Mapping[str, ComparisonEntry]
    trained_on: tuple[str, ...] = ()  # may name scorers that did not evaluate
    selected_by: tuple[str, ...] = ()  # scorers that early stopping or a search chose by; likewise
    gap: Gap | None = None  # None without scorers on both sides
    extremes: Extremes | None = None
    signs: Mapping[str, Sign] = field(default_factory=dict)
    hacking: Hacking | None = None

    @property
    def suspicion(self) -> Suspicion:
        """The verdict on reward hacking; of a run that was not judged, none."""
        return self.hacking.word if self.hacking else "none"

    def is_held_out(self, scorer: str) -> bool:
        """Whether a scorer is independent evidence: neither trained on nor selected by."""
        return scorer not in self.trained_on and scorer not in self.selected_by


@dataclass(frozen=True)
class PairOfMethods:
    """Two methods compared with each other."""

    method: str
    other: str
    scores: Mapping[str, ComparisonEntry]


@dataclass(frozen=True)
class Best:
    """The method with the highest mean by the headline scorer, and what choosing the best of all gives.

    The method's own difference to the base is of the prompts by which it was chosen. The one here is of prompts that
    had no part in the choice (`statistics.cross_fitted_choice`).
    """

    method: str
    of: int  # methods it was chosen from
    difference: float
    difference_ci95: tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """All methods under one protocol, the base first."""

    protocol: Protocol
    base: str
    scorers: tuple[str, ...]  # in the order of the tables; the first is the headline
    methods: Mapping[str, MethodSummary]
    pairs: tuple[PairOfMethods, ...]
    best: Best | None = None  # None of fewer than two methods
    made_with: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # method -> versions and device
    people: tuple[PeopleComparison, ...] = ()  # runs that people compared

    @property
    def headline(self) -> str:
        """The scorer that ranks runs and whose extremes are shown."""
        return self.scorers[0]

    @property
    def tuned(self) -> dict[str, MethodSummary]:
        """All methods but the base."""
        return {name: method for name, method in self.methods.items() if name != self.base}

    def people_vs_base(self, method: str) -> PeopleComparison | None:
        """What people chose between a method and the base, if anybody was asked."""
        found = (each for each in self.people if (each.run, each.other) == (method, self.base) and each.n_answers)
        return next(found, None)

    def to_json(self) -> str:
        """The text of summary.json; `from_json` is its inverse."""
        values: dict[str, Any] = {
            "protocol": self.protocol.to_dict(),
            "n_prompts": self.protocol.n_prompts,
            "base": self.base,
            "scorers": self.scorers,
            "best": self.best and asdict(self.best),
            "made_with": self.made_with,
            "methods": {name: _method_to_dict(method) for name, method in self.methods.items()},
            "pairs": [
                {"method": pair.method, "other": pair.other, "scores": _entries_to_dict(pair.scores)}
                for pair in self.pairs
            ],
        }
        if self.people:
            values["people"] = [asdict(comparison) for comparison in self.people]
        return json.dumps(_nan_to_null(values), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Summary:
        """Raises: KeyError or TypeError naming a key that is missing or unknown."""
        values = json.loads(text)
        return cls(
            protocol=Protocol.from_dict(values["protocol"]),
            base=values["base"],
            scorers=tuple(values["scorers"]),
            best=values["best"]
            and Best(**values["best"] | {"difference_ci95": tuple(values["best"]["difference_ci95"])}),
            made_with=values["made_with"],
            methods={name: _method_from_dict(method) for name, method in values["methods"].items()},
            pairs=tuple(
                PairOfMethods(pair["method"], pair["other"], _entries_from_dict(pair["scores"]))
                for pair in values["pairs"]
            ),
            people=tuple(PeopleComparison.from_dict(comparison) for comparison in values.get("people", ())),
        )


def _method_to_dict(method: MethodSummary) -> dict[str, Any]:
    values: dict[str, Any] = {
        "scores": {scorer: asdict(location) for scorer, location in method.scores.items()},
        "vs_base": _entries_to_dict(method.vs_base),
    }
    if method.extremes is not None:
        values["trained_on"] = method.trained_on
        values |= {"selected_by": method.selected_by} if method.selected_by else {}
        values["gap"] = method.gap and asdict(method.gap)
        values["extremes"] = asdict(method.extremes)
        values["hacking"] = method.hacking and asdict(method.hacking)
        values["signs"] = {name: asdict(sign) for name, sign in method.signs.items()}
    return values


def _method_from_dict(values: dict[str, Any]) -> MethodSummary:
    gap, extremes, hacking = values.get("gap"), values.get("extremes"), values.get("hacking")
    return MethodSummary(
        **values
        | {
            "scores": {scorer: Location(**_numbers(location)) for scorer, location in values["scores"].items()},
            "vs_base": _entries_from_dict(values["vs_base"]),
            "trained_on": tuple(values.get("trained_on", ())),
            "selected_by": tuple(values.get("selected_by", ())),
            "gap": gap and Gap(**_numbers(gap)),
            "extremes": extremes
            and Extremes(**{side: tuple(Extreme(**row) for row in rows) for side, rows in extremes.items()}),
            "hacking": hacking and Hacking(**hacking | {"losses": tuple(hacking["losses"])}),
            "signs": {name: Sign(**_numbers(sign)) for name, sign in values.get("signs", {}).items()},
        }
    )


def _entries_to_dict(entries: Mapping[str, ComparisonEntry]) -> dict[str, Any]:
    values = {scorer: asdict(entry) for scorer, entry in entries.items()}
    for entry in values.values():
        if entry["p_holm"] is None:
            del entry["p_holm"]
    return values


def _entries_from_dict(values: Mapping[str, Any]) -> dict[str, ComparisonEntry]:
    return {scorer: ComparisonEntry(**_numbers(entry)) for scorer, entry in values.items()}


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Undefined numbers, which JSON writes as null, as nan; intervals as tuples."""
    return {
        name: tuple(map(_number, value)) if isinstance(value, list) else _number(value)
        for name, value in values.items()
    }


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def _nan_to_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _nan_to_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_null(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None  # float(): of numpy's float64, which is a float too
    return value
