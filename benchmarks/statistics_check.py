"""Are the report's intervals, tests and detectable effects what they say? Simulated experiments with known truth.

Prints, per design: how often the 95 % intervals hold the truth, how often an effect is claimed that is not there, and
how often one is found that is as large as the printed minimum detectable effect.

    python -m benchmarks.statistics_check [--experiments 2000]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import pandas as pd

from attune.evaluation.statistics import bootstrap_mean_ci, compare_paired, holm, minimum_detectable_effect
from attune.evaluation.summary import ALPHA, evidence
from attune.spm.accuracy import accuracy

PROMPTS = (60, 240)
TESTS = 12  # three runs by four scorers, as the default report has them
RESAMPLES = 2000
SHAPES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy tails (t, 3 degrees)": lambda rng, n: rng.standard_t(3, size=n),
    "skewed (exponential)": lambda rng, n: rng.exponential(size=n) - 1,
    "half of them 0": lambda rng, n: rng.normal(size=n) * (rng.random(n) < 0.5),
}
"""Differences (n,) of mean 0."""


def coverage(experiments: int) -> Iterator[dict]:
    """Of the interval of a mean difference, and of one of a win rate of 0.6."""
    for shape, draw in SHAPES.items():
        for n in PROMPTS:
            rng, held = np.random.default_rng(0), []
            for seed in range(experiments):
                low, high = bootstrap_mean_ci(draw(rng, n), seed=seed, resamples=RESAMPLES)
                held.append(low <= 0 <= high)
            yield {"of": f"mean difference, {shape}", "prompts": n, "measured": np.mean(held), "nominal": 0.95}
    for n in PROMPTS:
        rng, held = np.random.default_rng(0), []
        for seed in range(experiments):
            low, high = bootstrap_mean_ci(rng.random(n) < 0.6, seed=seed, resamples=RESAMPLES)
            held.append(low <= 0.6 <= high)
        yield {"of": "win rate 0.6", "prompts": n, "measured": np.mean(held), "nominal": 0.95}


def accuracy_coverage(experiments: int) -> dict:
    """Of the preference model's accuracy: six pairs of four images a prompt, which share them."""
    n, pairs = 60, [(a, b) for a in range(4) for b in range(a)]
    prompts = np.repeat(np.arange(n), len(pairs)).tolist()

    def once(rng: np.random.Generator, seed: int) -> tuple[float, tuple[float, float]]:
        quality = rng.normal(size=(n, 4))
        seen = quality + rng.normal(size=(n, 4))
        truth = np.array([[row[a] - row[b] for a, b in pairs] for row in quality]).ravel()
        gaps = np.array([[row[a] - row[b] for a, b in pairs] for row in seen]).ravel()
        return accuracy(gaps, truth, prompts, seed)

    rng = np.random.default_rng(0)
    found = [once(rng, seed) for seed in range(experiments)]
    real = np.mean([mean for mean, _ in found])
    held = np.mean([low <= real <= high for _, (low, high) in found])
    return {"of": "accuracy of the preference model, 6 pairs a prompt", "prompts": n, "measured": held, "nominal": 0.95}


def false_claims(experiments: int) -> Iterator[dict]:
    """How often `better` or `worse` is said of at least one of the tests though nothing differs."""
    for shape in ("normal", "heavy tails (t, 3 degrees)", "half of them 0"):
        for n in PROMPTS:
            rng, single, family = np.random.default_rng(1), [], []
            for seed in range(experiments):
                found = [compare(SHAPES[shape](rng, n), seed) for _ in range(TESTS)]
                claims = [
                    evidence(p, c.difference_ci95, c.win_rate) for p, c in zip(corrected(found), found, strict=True)
                ]
                family.append(any(claim in ("better", "worse") for claim in claims))
                single.append(found[0].p_value < ALPHA)
            yield {"of": f"one test, {shape}", "prompts": n, "measured": np.mean(single), "nominal": 0.05}
            yield {"of": f"any claim of {TESTS}, {shape}", "prompts": n, "measured": np.mean(family), "nominal": 0.05}


def power(experiments: int) -> Iterator[dict]:
    """How often `better` is said of one run that is better by the MDE, while the other tests have nothing to find."""
    for n in PROMPTS:
        rng, said = np.random.default_rng(2), []
        effect = minimum_detectable_effect(1.0, n, alpha=ALPHA / TESTS)
        for seed in range(experiments):
            found = [compare(rng.normal(size=n) + (effect if i == 0 else 0), seed) for i in range(TESTS)]
            said.append(evidence(corrected(found)[0], found[0].difference_ci95, found[0].win_rate) == "better")
        yield {"of": f"better by the MDE of {TESTS} tests", "prompts": n, "measured": np.mean(said), "nominal": 0.8}


def compare(differences: np.ndarray, seed: int):
    return compare_paired(differences, np.zeros_like(differences), seed=seed, resamples=200)


def corrected(found: list) -> np.ndarray:
    return holm([comparison.p_value for comparison in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=2000)
    count = parser.parse_args().experiments
    for title, rows in {
        "95 % intervals that hold the truth": [*coverage(count), accuracy_coverage(count)],
        "claims of what is not there": false_claims(count),
        "power at the minimum detectable effect": power(count),
    }.items():
        print(f"\n{title}, {count} experiments each")
        print(pd.DataFrame(rows).to_string(index=False, float_format=lambda x: f"{x:.3f}"), flush=True)


if __name__ == "__main__":
    main()
