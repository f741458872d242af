"""From score tables to the summary: every number of the report, computed once, as plain JSON.

A summary is {protocol, n_prompts, base, scorers, methods: {name: method}, pairs: [{method, other, scores}]}, where

    method   {scores: {scorer: {mean, median}}, vs_base: {scorer: entry}, trained_on,
             gap: {trained, heldout, gap} or None, extremes: {gained, lost}}, and what else was measured of it;
             the base has an empty vs_base and nothing after it
    scores   of a pair: {scorer: entry}, the method against the other
    entry    {win_rate, ci95, p_value, difference, difference_ci95, minimum_detectable_effect, p_holm};
             ci95 is the win rate's interval

Undefined numbers are None, so that it is valid JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from attune.evaluation.diversity import gap
from attune.evaluation.protocol import Protocol, check_scores, score_columns
from attune.evaluation.statistics import compare, holm, prompt_means, standardised_gain

K = TypeVar("K")
Scores = dict[str, np.ndarray]  # scorer or scorer.part -> (n,) one value per prompt, prompts sorted
_EXTREMES = 3
ALPHA = 0.05


def summarise(
    tables: Mapping[str, pd.DataFrame],
    protocol: Protocol,
    *,
    base: str = "base",
    trained_on: Mapping[str, Sequence[str]] | None = None,
    extras: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares every method with the base, and the methods with each other.

    p_holm corrects over all scorers of all methods against the base at once: the marks of one table are one
    family. The pairs of methods are a second family. A column `scorer.part` explains its scorer and is
    compared, but as no claim rests on it, it has no p_holm.

    Args:
        tables: method -> score table (see `protocol.check_scores`); all made under `protocol`.
        protocol: what `protocol.read_comparable` returned with the tables.
        base: the method to compare with.
        trained_on: method -> scorers it optimised; all others are held out for it.
        extras: method -> {"diversity": {...}, "indices": {...}, "drift": {...}} of named floats.
        seed: of the bootstrap.

    Returns:
        The summary, in the shape that this module begins with.

    Raises:
        ValueError: the base is missing, a table breaks the protocol, tables hold different images or scorers,
            or trained_on names no scorer or method.
    """
    trained_on, extras = trained_on or {}, extras or {}
    scorers = _check(tables, protocol, base, trained_on)
    scores = {name: _per_prompt(frame) for name, frame in tables.items()}
    prompts = sorted(set(tables[base]["prompt"]))
    tuned = [name for name in tables if name != base]
    vs_base = _family({name: (scores[name], scores[base]) for name in tuned}, scorers, seed)
    pairs = _family({(a, b): (scores[a], scores[b]) for a, b in combinations(tuned, 2)}, scorers, seed)
    methods = {name: {"scores": _centres(scores[name]), "vs_base": vs_base.get(name, {})} for name in (base, *tuned)}
    for name in tuned:
        methods[name] |= _beside(scores[name], scores[base], scorers, list(trained_on.get(name, ())), prompts)
    head = {"protocol": protocol.to_dict(), "n_prompts": protocol.n_prompts, "base": base, "scorers": scorers}
    body = {
        "methods": {name: entry | extras.get(name, {}) for name, entry in methods.items()},
        "pairs": [{"method": a, "other": b, "scores": entries} for (a, b), entries in pairs.items()],
    }
    return _json_safe(head | body)


def verdict(entry: Mapping[str, Any]) -> str:
    """What the evidence of one comparison allows to say: "better", "worse", "mixed" or "no evidence".

    Better or worse needs p_holm < 0.05, an interval of the mean difference that excludes 0, and a win rate on
    the same side. Significant without the rest is mixed: a few prompts carry the mean, or many small wins the
    ranks.
    """
    (low, high), win_rate = entry["difference_ci95"], entry["win_rate"]
    if entry["p_holm"] >= ALPHA:
        return "no evidence"
    if low > 0 and win_rate > 0.5:
        return "better"
    return "worse" if high < 0 and win_rate < 0.5 else "mixed"


def _check(
    tables: Mapping[str, pd.DataFrame], protocol: Protocol, base: str, trained_on: Mapping[str, Sequence[str]]
) -> list[str]:
    """The scorers of the protocol in the tables' order, once everything is known to be comparable."""
    if base not in tables:
        raise ValueError(f"no scores of the base {base!r}, only of: {', '.join(tables)}")
    if unknown := sorted(set(trained_on) - set(tables)):
        raise ValueError(f"trained_on names methods without scores: {', '.join(unknown)}")
    for frame in tables.values():
        check_scores(frame, protocol)
    scorers = [column for column in score_columns(tables[base]) if column in protocol.scorer_names]
    if unknown := sorted({s for names in trained_on.values() for s in names} - set(scorers)):
        raise ValueError(f"trained_on names scorers that are not in the protocol: {', '.join(unknown)}")
    images = _images(tables[base])
    for name, frame in tables.items():
        if set(score_columns(frame)) != set(score_columns(tables[base])):
            raise ValueError(f"{base} and {name} have different score columns")
        if _images(frame) != images:
            raise ValueError(f"{base} and {name} hold different prompts or ordinals: they cannot be paired")
    return scorers


def _images(frame: pd.DataFrame) -> set[tuple[str, int]]:
    return set(zip(frame["prompt"], frame["ordinal"], strict=True))


def _per_prompt(frame: pd.DataFrame) -> Scores:
    return {s: prompt_means(frame[s].to_numpy(dtype=float), frame["prompt"])[0] for s in score_columns(frame)}


def _centres(scores: Scores) -> dict[str, dict[str, float]]:
    return {s: {"mean": float(values.mean()), "median": float(np.median(values))} for s, values in scores.items()}


def _family(matches: Mapping[K, tuple[Scores, Scores]], scorers: Sequence[str], seed: int) -> dict[K, dict[str, Any]]:
    """Each policy against its base, scorer by scorer; p_holm corrects over the scorers of all matches at once."""
    compared = {key: _against(policy, base, seed) for key, (policy, base) in matches.items()}
    claims = [entries[scorer] for entries in compared.values() for scorer in scorers]
    for claim, p in zip(claims, holm([claim["p_value"] for claim in claims]), strict=True):
        claim["p_holm"] = float(p)
    return compared


def _against(policy: Scores, base: Scores, seed: int) -> dict[str, Any]:
    entries = {}
    for scorer in base:
        c = compare(policy[scorer], base[scorer], seed=seed)
        entries[scorer] = {
            "win_rate": c.win_rate,
            "ci95": list(c.win_rate_ci95),
            "p_value": c.p_value,
            "difference": c.difference,
            "difference_ci95": list(c.difference_ci95),
            "minimum_detectable_effect": c.minimum_detectable_effect,
        }
    return entries


def _beside(
    policy: Scores, base: Scores, scorers: Sequence[str], trained_on: list[str], prompts: Sequence[str]
) -> dict[str, Any]:
    """What stands beside a method's comparison: what it was trained on, whether that transfers, where it changed."""
    change = policy[scorers[0]] - base[scorers[0]]
    return {
        "trained_on": trained_on,
        "gap": _gap(policy, base, scorers, trained_on),
        "extremes": _extremes(change, prompts),
    }


def _gap(policy: Scores, base: Scores, scorers: Sequence[str], trained: Sequence[str]) -> dict[str, float] | None:
    """Standardised gains on trained and on held-out scorers and their difference; None if a side is empty."""
    gains = {scorer: standardised_gain(policy[scorer], base[scorer]) for scorer in scorers}
    on, off = ([g for s, g in gains.items() if (s in trained) is side] for side in (True, False))
    if not on or not off:
        return None
    return {"trained": float(np.mean(on)), "heldout": float(np.mean(off)), "gap": gap(on, off)}


def _extremes(differences: np.ndarray, prompts: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Prompts that gained and lost most, largest change first; no change is no extreme."""
    order = np.argsort(differences, kind="stable")
    rows = [{"prompt": prompts[i], "difference": float(differences[i])} for i in order]
    lost = [row for row in rows[:_EXTREMES] if row["difference"] < 0]
    gained = [row for row in rows[::-1][:_EXTREMES] if row["difference"] > 0]
    return {"gained": gained, "lost": lost}


def _json_safe(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
