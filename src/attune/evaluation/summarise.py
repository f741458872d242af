"""From score tables to the summary: every number of the report is computed here, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TypeVar

import numpy as np
import pandas as pd

from attune.evaluation.hacking import Sign, judge
from attune.evaluation.protocol import Protocol, check_scores, score_columns
from attune.evaluation.statistics import (
    bootstrap_mean_ci,
    compare_paired,
    cross_fitted_choice,
    holm,
    prompt_means,
    spread,
    standardised_differences,
)
from attune.evaluation.summary import (
    ALPHA,
    Best,
    ComparisonEntry,
    Extreme,
    Extremes,
    Gap,
    Location,
    MethodSummary,
    PairOfMethods,
    Summary,
)

K = TypeVar("K")
Scores = dict[str, np.ndarray]  # scorer or scorer.part -> (n,) one value per prompt, prompts sorted
_EXTREMES = 3


def summarise(
    tables: Mapping[str, pd.DataFrame],
    protocol: Protocol,
    *,
    base: str = "base",
    trained_on: Mapping[str, Sequence[str]] | None = None,
    selected_by: Mapping[str, Sequence[str]] | None = None,
    signs: Mapping[str, Mapping[str, Sign]] | None = None,
    seed: int = 0,
) -> Summary:
    """Compares every method with the base, and the methods with each other.

    p_holm corrects over all scorers of all methods against the base at once: the marks of one table are one
    family. The pairs of methods are a second family. A column `scorer.part` explains its scorer and is
    compared, but as no claim rests on it, it has no p_holm.

    Args:
        tables: method -> score table (see `protocol.check_scores`); all made under `protocol`.
        protocol: what `protocol.read_comparable` returned with the tables.
        base: the method to compare with.
        trained_on: method -> scorers it optimised. Scorers without scores here are kept, to be shown as text.
        selected_by: method -> scorers that it was chosen by; likewise. A scorer of neither list is held out.
        signs: method -> signs of reward hacking.
        seed: of the bootstrap.

    Raises:
        ValueError: the base is missing, a table breaks the protocol, tables hold different images or scorers,
            or trained_on or selected_by names a method without scores.
    """
    trained_on, selected_by, signs = trained_on or {}, selected_by or {}, signs or {}
    _check_known("trained_on", trained_on, tables)
    _check_known("selected_by", selected_by, tables)
    scorers = _check_tables(tables, protocol, base)
    scores = {name: _per_prompt(frame) for name, frame in tables.items()}
    prompts = sorted(set(tables[base]["prompt"]))
    tuned = [name for name in tables if name != base]
    vs_base = _compare_family({name: (scores[name], scores[base]) for name in tuned}, scorers, seed)
    pairs = _compare_family({(a, b): (scores[a], scores[b]) for a, b in combinations(tuned, 2)}, scorers, seed)
    methods = {base: MethodSummary(_locations(scores[base]), {})}
    for name in tuned:
        trained, selected = tuple(trained_on.get(name, ())), tuple(selected_by.get(name, ()))
        held_out = [scorer for scorer in scorers if scorer not in (*trained, *selected)]
        evaluated = [scorer for scorer in scorers if scorer in trained]
        gap, claims = (
            _gap(scores[name], scores[base], evaluated, held_out, seed),
            {s: vs_base[name][s] for s in scorers},
        )
        methods[name] = MethodSummary(
            scores=_locations(scores[name]),
            vs_base=vs_base[name],
            trained_on=trained,
            selected_by=selected,
            gap=gap,
            extremes=_extremes(scores[name][scorers[0]] - scores[base][scorers[0]], prompts),
            signs=signs.get(name, {}),
            hacking=judge(claims, evaluated, held_out, gap, signs.get(name, {})),
        )
    compared = tuple(PairOfMethods(a, b, entries) for (a, b), entries in pairs.items())
    best = _best({name: scores[name][scorers[0]] - scores[base][scorers[0]] for name in tuned}, seed)
    return Summary(protocol, base, tuple(scorers), methods, compared, best)


def _best(differences: Mapping[str, np.ndarray], seed: int) -> Best | None:
    """The method with the highest mean difference to the base, and what choosing it so gives; None of fewer than two.

    Args:
        differences: method -> (n,) by the headline scorer.
    """
    if len(differences) < 2 or len(next(iter(differences.values()))) < 2:
        return None
    table = np.stack(list(differences.values()))
    choice = cross_fitted_choice(table, by=table)
    return Best(
        method=max(differences, key=lambda name: differences[name].mean()),
        of=len(differences),
        difference=float(choice.mean()),
        difference_ci95=bootstrap_mean_ci(choice, seed=seed),
    )


def _check_known(argument: str, names: Mapping[str, Sequence[str]], tables: Mapping[str, pd.DataFrame]) -> None:
    if unknown := sorted(set(names) - set(tables)):
        raise ValueError(f"{argument} names methods without scores: {', '.join(unknown)}")


def _check_tables(tables: Mapping[str, pd.DataFrame], protocol: Protocol, base: str) -> list[str]:
    """The scorers of the protocol in the tables' order, once the tables are known to be comparable."""
    if base not in tables:
        raise ValueError(f"no scores of the base {base!r}, only of: {', '.join(tables)}")
    for frame in tables.values():
        check_scores(frame, protocol)
    images = _images(tables[base])
    for name, frame in tables.items():
        if set(score_columns(frame)) != set(score_columns(tables[base])):
            raise ValueError(f"{base} and {name} have different score columns")
        if _images(frame) != images:
            raise ValueError(f"{base} and {name} hold different prompts or ordinals: they cannot be paired")
    return [column for column in score_columns(tables[base]) if column in protocol.scorer_names]


def _images(frame: pd.DataFrame) -> set[tuple[str, int]]:
    return set(zip(frame["prompt"], frame["ordinal"], strict=True))


def _per_prompt(frame: pd.DataFrame) -> Scores:
    return {s: prompt_means(frame[s].to_numpy(dtype=float), frame["prompt"])[0] for s in score_columns(frame)}


def _locations(scores: Scores) -> dict[str, Location]:
    return {s: Location(float(v.mean()), float(np.median(v)), spread(v)) for s, v in scores.items()}


def _compare_family(
    matches: Mapping[K, tuple[Scores, Scores]], scorers: Sequence[str], seed: int
) -> dict[K, dict[str, ComparisonEntry]]:
    """Each policy against its base, scorer by scorer; p_holm corrects over the scorers of all matches at once.

    The minimum detectable effect is what a test finds that has to pass Holm's strictest level.
    """
    alpha = ALPHA / max(1, len(matches) * len(scorers))
    compared = {key: _compare_scores(policy, base, seed, alpha) for key, (policy, base) in matches.items()}
    claims = [(entries, scorer) for entries in compared.values() for scorer in scorers]
    corrected = holm([entries[scorer].p_value for entries, scorer in claims])
    for (entries, scorer), p in zip(claims, corrected, strict=True):
        entries[scorer] = replace(entries[scorer], p_holm=float(p))
    return compared


def _compare_scores(policy: Scores, base: Scores, seed: int, alpha: float) -> dict[str, ComparisonEntry]:
    entries = {}
    for scorer in base:
        found = compare_paired(policy[scorer], base[scorer], seed=seed, alpha=alpha)
        entries[scorer] = ComparisonEntry(
            win_rate=found.win_rate,
            ci95=found.win_rate_ci95,
            p_value=found.p_value,
            difference=found.difference,
            difference_ci95=found.difference_ci95,
            minimum_detectable_effect=found.minimum_detectable_effect,
        )
    return entries


def _gap(policy: Scores, base: Scores, trained: Sequence[str], held_out: Sequence[str], seed: int) -> Gap | None:
    """Mean standardised gains on trained and on held-out scorers and their difference; None if a side is empty."""
    if not trained or not held_out:
        return None
    on, off = (
        np.mean([standardised_differences(policy[scorer], base[scorer]) for scorer in side], axis=0)
        for side in (trained, held_out)
    )
    gap = on - off
    interval = bootstrap_mean_ci(gap, seed=seed) if np.isfinite(gap).all() else (float("nan"), float("nan"))
    return Gap(float(on.mean()), float(off.mean()), float(gap.mean()), interval)


def _extremes(differences: np.ndarray, prompts: Sequence[str]) -> Extremes:
    """Prompts that gained and lost most, largest change first; prompts that did not change are left out."""
    order = np.argsort(differences, kind="stable")
    rows = [Extreme(prompts[i], float(differences[i])) for i in order]
    lost = [row for row in rows[:_EXTREMES] if row.difference < 0]
    gained = [row for row in rows[::-1][:_EXTREMES] if row.difference > 0]
    return Extremes(tuple(gained), tuple(lost))
