"""Registers the best run of a report, as the champion if it beats the one there is, else as its challenger."""

from __future__ import annotations

import tempfile
from pathlib import Path

from attune.evaluation.champion import Candidate, compare_with
from attune.evaluation.statistics import Comparison
from attune.evaluation.summary import evidence
from attune.tracking import registry


def promote(
    name: str,
    candidate: Candidate,
    base_model: tuple[str, str | None],
    store: tuple[str, Path],
    *,
    seed: int,
    anew: bool = False,
) -> str:
    """Gives the candidate the alias `champion` if it beats the version that has it, else `challenger`.

    An adapter that has one of the aliases already, under the same protocol, is not registered twice.

    Args:
        name: of the registered model.
        candidate: what `evaluation.champion.find_candidate` found.
        base_model: path or hub id of what the adapter was trained on, and its commit.
        store: uri and root of the tracking store.
        seed: of the bootstrap.
        anew: whether the candidate takes the alias without a comparison, so that a champion of another protocol
            can be replaced.

    Returns:
        What happened, in a sentence.

    Raises:
        ValueError: the champion was scored under another protocol.
        registry.RegistryError: the registry is away or refuses.
    """
    base, revision = base_model
    tags = candidate.tags | {"base": base} | ({"base.revision": revision} if revision else {})
    for alias in (registry.CHAMPION, registry.CHALLENGER):
        known = registry.get_by_alias(name, alias, *store)
        if known and all(known.tags[key] == tags[key] for key in ("adapter", "protocol")):
            return f"{candidate.run} is {alias} already, version {known.number} of {name}"
    champion = registry.get_by_alias(name, registry.CHAMPION, *store)
    found = None if champion is None or anew else _compare(candidate, champion, store, seed)
    version = registry.register(name, candidate.adapter, base, candidate.scores, tags, store)
    wins = found is None or _is_better(found)
    registry.set_alias(name, registry.CHAMPION if wins else registry.CHALLENGER, version.number, *store)
    return _describe(f"{candidate.run}, version {version.number} of {name},", champion, found, candidate.scorer)


def _compare(candidate: Candidate, champion: registry.Version, store: tuple[str, Path], seed: int) -> Comparison:
    """Raises: ValueError naming both protocols, where they differ."""
    ours, theirs = candidate.protocol.sha, champion.tags["protocol"]
    if ours != theirs:
        raise ValueError(
            f"the champion (version {champion.number}, {champion.tags['run']}) was scored under protocol {theirs}, "
            f"the best run here under {ours}: they cannot be compared. Score both alike, or use --anew"
        )
    with tempfile.TemporaryDirectory() as folder:
        return compare_with(candidate, registry.download_scores(champion, Path(folder), *store), seed=seed)


def _is_better(found: Comparison) -> bool:
    """By the same standard as the report; there is one test here, so nothing is corrected."""
    return evidence(found.p_value, found.difference_ci95, found.win_rate) == "better"


def _describe(who: str, champion: registry.Version | None, found: Comparison | None, scorer: str) -> str:
    """What happened, with the numbers it rests on."""
    if champion is None or found is None:
        replaced = ": there was none" if champion is None else f" in the place of {champion.number}"
        return f"{who} is the champion{replaced}"
    low, high = found.difference_ci95
    numbers = f"{scorer} {found.difference:+.4f}, 95 % [{low:+.4f}, {high:+.4f}], n = {found.n_prompts} prompts"
    beaten = f"version {champion.number} ({champion.tags['run']})"
    if _is_better(found):
        return f"{who} is the champion: it beats {beaten}, {numbers}"
    return f"{who} is registered as challenger: it does not beat {beaten} beyond doubt, {numbers}"
