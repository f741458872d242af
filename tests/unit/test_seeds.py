"""Gains over seeds: the interval, the two parts of the variance, and which files of other seeds count."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from attune.evaluation.seeds import SeedRun, across_seeds, read_seeds
from attune.evaluation.summarise import summarise
from attune.evaluation.summary import Summary
from scores import protocol_for, table

N = 40  # prompts of a simulated seed


@pytest.fixture(scope="module")
def one() -> Summary:
    """A run against the base, on N prompts."""
    prompts = [f"prompt {i}" for i in range(N)]
    return summarise({"base": table(prompts), "spo": table(prompts, 0.3, seed=1)}, protocol_for(prompts))


def of_seed(one: Summary, seed: int, difference: float, error: float, prompts: str = "") -> Summary:
    """The summary of another seed, whose run gains `difference` by the oracle with standard error `error`."""
    half = error * stats.t.ppf(0.975, N - 1)
    entry = replace(
        one.methods["spo"].vs_base["oracle"],
        difference=difference,
        difference_ci95=(difference - half, difference + half),
    )
    spo = replace(one.methods["spo"], vs_base={**one.methods["spo"].vs_base, "oracle": entry})
    protocol = replace(one.protocol, seed=seed, prompt_set_sha=prompts or f"{seed:012x}")
    return replace(one, protocol=protocol, methods={**one.methods, "spo": spo})


def simulated(one: Summary, seeds: int, tau: float, error: float, rng: np.random.Generator) -> dict[int, Summary]:
    """Seeds whose true gains have mean 0.1 and standard deviation tau, and are measured with a standard error."""
    gains = 0.1 + tau * rng.normal(size=seeds) + error * rng.normal(size=seeds)
    return {k: of_seed(one, k, float(gain), error) for k, gain in enumerate(gains)}


@pytest.mark.parametrize(("tau", "error"), [(0.05, 0.02), (0.0, 0.03)])
def test_the_interval_over_seeds_holds_the_truth_in_95_of_100_experiments(one, tau, error):
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        low, high = across_seeds(simulated(one, 4, tau, error, rng)).runs["spo"]["oracle"].ci95
        held += low < 0.1 < high
    assert 930 <= held <= 970


@pytest.mark.parametrize("tau", [0.02, 0.05])
def test_the_spread_between_seeds_is_found_beside_that_of_prompts(one, tau):
    """Many seeds, so that chance is small: seeds and prompts are told apart, whichever is larger."""
    spread = across_seeds(simulated(one, 2000, tau, 0.03, np.random.default_rng(1))).runs["spo"]["oracle"]
    assert spread.sd_seeds == pytest.approx(tau, rel=0.15)
    assert spread.sd_prompts == pytest.approx(0.03)
    assert spread.mean == pytest.approx(0.1, abs=0.005)


def test_prompts_alone_leave_nothing_to_seeds(one):
    spread = across_seeds(simulated(one, 2000, 0.0, 0.03, np.random.default_rng(2))).runs["spo"]["oracle"]
    assert spread.sd_seeds < 0.01


def test_three_seeds_by_hand(one):
    """1, 2 and 3 with standard error 0.5: S = 1, and t(0.975, 2) = 4.3027."""
    found = across_seeds({k: of_seed(one, k, k, 0.5) for k in (1, 2, 3)})
    spread = found.runs["spo"]["oracle"]
    assert found.seeds == (1, 2, 3)
    assert not found.same_prompts
    assert spread.per_seed == (1, 2, 3)
    assert spread.mean == 2
    assert spread.ci95 == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), rel=1e-4)
    assert (spread.sd_prompts, spread.sd_seeds) == pytest.approx((0.5, math.sqrt(0.75)))
    assert across_seeds({k: of_seed(one, k, k - 2, 0.5) for k in (1, 2, 3)}).runs["spo"]["oracle"].seeds_better == 1


def test_prompts_that_all_seeds_share_are_not_taken_out(one):
    """Their choice is the same error in every seed, so it is no part of what differs between seeds."""
    found = across_seeds({k: of_seed(one, k, k, 0.5, prompts="the same") for k in (1, 2, 3)})
    assert found.same_prompts
    assert found.runs["spo"]["oracle"].sd_seeds == 1


def test_one_seed_has_no_interval_over_seeds(one):
    spread = across_seeds({0: one}).runs["spo"]["oracle"]
    assert spread.mean == one.methods["spo"].vs_base["oracle"].difference
    assert all(map(math.isnan, (*spread.ci95, spread.sd_seeds)))
    assert spread.sd_prompts > 0


def test_seeds_that_differ_in_more_are_refused(one):
    other = replace(one, protocol=replace(one.protocol, seed=1, steps=50))
    with pytest.raises(ValueError, match=r"another protocol \(steps\)"):
        across_seeds({0: one, 1: other})
    with pytest.raises(ValueError, match="other runs"):
        across_seeds({0: one, 1: replace(one, methods={"base": one.methods["base"]})})
    with pytest.raises(ValueError, match="no seeds"):
        across_seeds({})


def keep(folder, seed: int, summary: Summary, settings: str = "s") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"seed{seed}.json").write_text(SeedRun(seed, settings, "w", 12.5, summary).to_json())


def test_a_seed_is_read_as_it_was_written(one, tmp_path):
    keep(tmp_path, 0, one)
    assert SeedRun.read(tmp_path / "seed0.json") == SeedRun(0, "s", "w", 12.5, one)


def test_other_seeds_join_the_summary_at_hand(one, tmp_path):
    assert read_seeds(tmp_path / "seeds", one, "s") is None
    keep(tmp_path, 0, of_seed(one, 0, 99, 1))  # the own seed as it was: what is at hand counts
    assert read_seeds(tmp_path, one, "s") is None
    for seed in (2, 10):
        keep(tmp_path, seed, of_seed(one, seed, 0.5, 0.1))
    found = read_seeds(tmp_path, one, "s")
    assert found.seeds == (0, 2, 10)
    own = one.methods["spo"].vs_base["oracle"].difference
    assert found.runs["spo"]["oracle"].per_seed == (own, 0.5, 0.5)
    assert found.stale == ()


def test_a_seed_of_other_settings_is_left_out_and_named(one, tmp_path):
    keep(tmp_path, 1, of_seed(one, 1, 0.5, 0.1))
    keep(tmp_path, 2, of_seed(one, 2, 0.5, 0.1), settings="older")
    keep(tmp_path, 3, replace(one, protocol=replace(one.protocol, seed=3, guidance_scale=9)))
    (tmp_path / "seed4.json").write_text("{")
    (tmp_path / "seed5.json").write_text(json.dumps({"seed": 5, "summary": {}}))
    found = read_seeds(tmp_path, one, "s")
    assert found.seeds == (0, 1)
    reasons = {2: "is of other settings", 3: "another protocol (guidance_scale)", 4: "cannot be read", 5: "cannot be"}
    assert len(found.stale) == len(reasons)
    for line, (seed, reason) in zip(found.stale, reasons.items(), strict=True):
        assert f"seed{seed}.json" in line
        assert reason in line
        assert "`make seeds`" in line
