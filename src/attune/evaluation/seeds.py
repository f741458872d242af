"""One profile run with several seeds: does a gain survive another seed, and how much of its spread is due to prompts?

`make seeds` leaves reports/<profile>/seeds/seed<k>.json, a summary per seed with what its run was made with. A seed is
an experiment of its own: it draws the order of training data and all noise, and in the embedded world the prompts too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from attune.evaluation.protocol import Protocol
from attune.evaluation.summary import ComparisonEntry, Summary

LEVEL = 0.975  # quantile of a two-sided interval of 95 %
OF_A_SEED = ("seed", "prompt_set_sha")
"""Fields of the protocol that may differ between seeds: the noise, and the prompts where a source draws them."""


@dataclass(frozen=True)
class SeedSpread:
    """A run's mean paired difference to the base by one scorer over seeds, in the scorer's units."""

    per_seed: tuple[float, ...]
    per_seed_ci95: tuple[tuple[float, float], ...]  # over the prompts of that seed
    mean: float  # every seed counts alike
    ci95: tuple[float, float]  # over seeds, t with n - 1 degrees of freedom; nan of fewer than 2 seeds
    sd_prompts: float  # standard error within a seed, root of the mean square over seeds
    sd_seeds: float  # standard deviation between seeds without the part that prompts explain; nan of fewer than 2 seeds
    seeds_better: int  # seeds in which the difference is above 0


@dataclass(frozen=True)
class AcrossSeeds:
    """All runs but the base over seeds."""

    seeds: tuple[int, ...]
    runs: Mapping[str, Mapping[str, SeedSpread]]  # run -> scorer, or scorer.part
    same_prompts: bool  # every seed was judged by the same test prompts
    stale: tuple[str, ...] = ()  # a line for each file of a seed that was left out, with the reason and the remedy


@dataclass(frozen=True)
class SeedRun:
    """What seed<k>.json holds."""

    seed: int
    settings: str  # identifies all settings but the seed (`planning.seeds.settings_sha`)
    work: str  # identifies settings, seed and code up to the scores (`planning.seeds.work_sha`)
    seconds: float | None  # that the run took, where it was run in one go
    summary: Summary

    def to_json(self) -> str:
        values = {name: getattr(self, name) for name in ("seed", "settings", "work", "seconds")}
        return json.dumps(values | {"summary": json.loads(self.summary.to_json())}, indent=1) + "\n"

    @classmethod
    def read(cls, file: Path) -> SeedRun:
        """Raises: ValueError naming the file and what is wrong with it."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(**values | {"summary": Summary.from_json(json.dumps(values["summary"]))})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} cannot be read as a seed's summary ({type(error).__name__}: {error})") from None


def across_seeds(summaries: Mapping[int, Summary], stale: Sequence[str] = ()) -> AcrossSeeds:
    """Mean difference to the base over seeds, and the two parts of its variance.

    The random-effects model of a meta-analysis, a seed for a study: d_k = mu + u_k + e_k, with Var(u_k) = tau^2 between
    seeds and Var(e_k) = s_k^2 by the choice of prompts, known from seed k. Of n seeds

        mean     = sum d_k / n
        S^2      = sum (d_k - mean)^2 / (n - 1), whose expectation is tau^2 + sum s_k^2 / n
        ci95     = mean -+ t(0.975, n - 1) S / sqrt(n)
        sd_seeds = sqrt(max(0, S^2 - sum s_k^2 / n)), sd_prompts = sqrt(sum s_k^2 / n)

    Source: the method of moments of Hedges 1983, "A random effects model for effect sizes", which is DerSimonian and
    Laird 1986 with equal weights; seeds have equally many prompts. s_k is half the width of the difference's interval
    over t(0.975, prompts - 1), for which the bootstrap's expanded percentiles are made.

    Where all seeds were judged by the same prompts, e_k is common to them and S^2 does not contain it. Then nothing is
    taken out, sd_seeds = S, and ci95 is of the mean over those prompts.

    Args:
        summaries: seed -> summary, under one protocol but for OF_A_SEED.
        stale: what was left out, to be told.

    Raises:
        ValueError: there are none, or they have other runs, scorers or protocols.
    """
    if not summaries:
        raise ValueError("no seeds to compare")
    given = list(summaries.values())
    for other in given[1:]:
        if found := difference(given[0], other):
            raise ValueError(f"seeds cannot be compared: {found}")
    same_prompts = len(given) > 1 and len({each.protocol.prompt_set_sha for each in given}) == 1
    prompts = given[0].protocol.n_prompts
    runs = {
        run: {
            scorer: _spread([each.methods[run].vs_base[scorer] for each in given], prompts, same_prompts)
            for scorer in method.vs_base
        }
        for run, method in given[0].tuned.items()
    }
    return AcrossSeeds(tuple(summaries), runs, same_prompts, tuple(stale))


def _spread(entries: Sequence[ComparisonEntry], prompts: int, same_prompts: bool) -> SeedSpread:
    values = np.array([entry.difference for entry in entries])
    widths = np.array([high - low for low, high in (entry.difference_ci95 for entry in entries)])
    n, mean = len(values), float(values.mean())
    errors = widths / 2 / stats.t.ppf(LEVEL, prompts - 1) if prompts > 1 else np.full(n, math.nan)
    within = float((errors**2).mean())
    between = float(values.var(ddof=1)) if n > 1 else math.nan
    half = float(stats.t.ppf(LEVEL, n - 1) * math.sqrt(between / n)) if n > 1 else math.nan
    left = max(0.0, between if same_prompts else between - within) if n > 1 else math.nan
    return SeedSpread(
        per_seed=tuple(map(float, values)),
        per_seed_ci95=tuple(entry.difference_ci95 for entry in entries),
        mean=mean,
        ci95=(mean - half, mean + half),
        sd_prompts=math.sqrt(within),
        sd_seeds=math.sqrt(left),
        seeds_better=int((values > 0).sum()),
    )


def difference(summary: Summary, other: Summary) -> str | None:
    """Why summaries of two seeds are not of one experiment, in a few words; None if they are."""
    mine, theirs = _protocol(summary.protocol), _protocol(other.protocol)
    if differing := [name for name in mine if mine[name] != theirs[name]]:
        return f"another protocol ({', '.join(differing)})"
    if (summary.base, set(summary.methods)) != (other.base, set(other.methods)):
        return f"other runs ({', '.join(other.methods)})"
    compared = ({name: set(method.vs_base) for name, method in each.methods.items()} for each in (summary, other))
    return None if next(compared) == next(compared) else "other scores"


def _protocol(protocol: Protocol) -> dict[str, Any]:
    return {name: value for name, value in asdict(protocol).items() if name not in OF_A_SEED}


def read_seeds(folder: Path, summary: Summary, settings: str | None) -> AcrossSeeds | None:
    """The summary at hand over those of other seeds; None if there are no other seeds.

    A seed counts if its run had the same settings and protocol; the others are told in `stale`, and so is a file that
    cannot be read. Other code does not make a seed stale here: `make seeds` says so and runs it again.

    Args:
        folder: with seed<k>.json.
        summary: of the runs as they are now; it stands for its own seed.
        settings: what identifies their settings (`ReportPlan.settings`).
    """
    own, found, stale = summary.protocol.seed, {}, []
    for file in seed_files(folder):
        try:
            run = SeedRun.read(file)
        except ValueError as error:
            stale.append(f"{error}; `make seeds` makes it anew")
            continue
        if run.seed == own:
            continue
        reason = difference(summary, run.summary) or (None if run.settings == settings else "other settings")
        if reason is None:
            found[run.seed] = run.summary
        else:
            stale.append(f"{file} is of {reason}; `make seeds` makes it anew")
    if not found and not stale:
        return None
    return across_seeds(dict(sorted({own: summary, **found}.items())), stale)


def seed_files(folder: Path) -> list[Path]:
    """The files of seeds, by number."""
    files: Iterable[Path] = folder.glob("seed*.json")
    return sorted((file for file in files if file.stem[4:].isdecimal()), key=lambda file: int(file.stem[4:]))
