"""Paired statistics and the signs of reward hacking, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from attune.evaluation import diversity as dv
from attune.evaluation import statistics as st


def test_six_prompts_by_hand():
    """Base 1..6, differences +1 +2 +3 +4 +5 -6.

    Mean 9 / 6 = 1.5; five of six won. Signed ranks: W- = 6, W+ = 15; of 64 sign patterns those with W <= 6
    number 1 + 1 + 1 + 2 + 2 + 3 + 4 = 14, so p = 28 / 64 = 0.4375. Squared deviations from 1.5 sum to
    0.25 + 0.25 + 2.25 + 6.25 + 12.25 + 56.25 = 77.5, so sd^2 = 15.5 and, with t quantiles of 5 degrees of
    freedom, MDE = (2.5706 + 0.9195) sqrt(15.5 / 6 pi / 3).
    """
    base = np.arange(1.0, 7.0)
    result = st.compare_paired(base + np.array([1, 2, 3, 4, 5, -6]), base)
    assert result.n_prompts == 6
    assert result.difference == pytest.approx(1.5)
    assert result.win_rate == pytest.approx(5 / 6)
    assert result.p_value == pytest.approx(0.4375)
    assert result.minimum_detectable_effect == pytest.approx(3.4901 * np.sqrt(15.5 / 6 * np.pi / 3), rel=1e-4)
    assert result.difference_ci95[0] < 0 < result.difference_ci95[1]
    assert result.win_rate_ci95[0] < 5 / 6 <= result.win_rate_ci95[1] <= 1


def test_all_six_won():
    """Only one of 64 sign patterns is as extreme on either side: p = 2 / 64."""
    assert st.compare_paired(np.arange(1.0, 7), np.zeros(6)).p_value == pytest.approx(0.03125)


def test_ties_count_half():
    """One win, one loss, two ties: (1 + 0 + 0.5 + 0.5) / 4."""
    assert st.compare_paired(np.array([1.0, 0, 3, 3]), np.array([0.0, 1, 3, 3])).win_rate == 0.5


def test_identical_scores_show_nothing():
    scores = np.random.default_rng(0).normal(size=40)
    result = st.compare_paired(scores, scores)
    assert (result.win_rate, result.p_value, result.difference) == (0.5, 1.0, 0.0)
    assert result.difference_ci95 == (0.0, 0.0)
    assert result.win_rate_ci95 == (0.5, 0.5)


def test_a_shift_beyond_noise_is_found_and_noise_is_not():
    rng = np.random.default_rng(1)
    base = rng.normal(size=200)
    noise = rng.normal(scale=0.3, size=200)
    shifted = st.compare_paired(base + noise - noise.mean() + 0.2, base)
    assert shifted.p_value < 1e-6
    assert shifted.difference_ci95[0] > 0
    assert shifted.win_rate_ci95[0] > 0.5
    assert st.compare_paired(base + noise - noise.mean(), base).p_value > 0.05


def test_swapping_sides_mirrors_everything():
    a, b = np.random.default_rng(2).normal(size=(2, 30))
    forth, back = st.compare_paired(a, b), st.compare_paired(b, a)
    assert back.difference == pytest.approx(-forth.difference)
    assert back.win_rate == pytest.approx(1 - forth.win_rate)
    assert back.p_value == pytest.approx(forth.p_value)
    np.testing.assert_allclose(back.difference_ci95, -np.array(forth.difference_ci95)[::-1])


def test_many_unchanged_prompts_are_evidence_of_no_change():
    """Six of 500 prompts better, the others equal: dropping zeros would give p = 0.03."""
    d = np.zeros(500)
    d[:6] = np.arange(1, 7)
    assert st.wilcoxon_p(d) > 0.5


def test_bootstrap_is_deterministic_for_a_seed_and_blocks_change_nothing(monkeypatch):
    values = np.random.default_rng(3).normal(size=50)
    first = st.bootstrap_mean_ci(values, seed=7)
    assert first == st.bootstrap_mean_ci(values, seed=7)
    assert first != st.bootstrap_mean_ci(values, seed=8)
    monkeypatch.setattr(st, "_MAX_INDICES", 50 * 1000)
    np.testing.assert_allclose(st.bootstrap_mean_ci(values, seed=7), first)


def test_bootstrap_interval_matches_the_normal_one():
    """For 400 values of sd s the interval of the mean is 1.96 s / 20 either side, up to resampling error."""
    values = np.random.default_rng(4).normal(3, 2, size=400)
    low, high = st.bootstrap_mean_ci(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.015)
    assert high == pytest.approx(values.mean() + half, abs=0.015)


@pytest.mark.parametrize("policy", [[], [1.0, np.nan], [1.0, 2.0, 3.0]])
def test_unusable_scores_are_refused(policy):
    base = np.ones(2 if len(policy) else 0)
    with pytest.raises(ValueError, match=r"finite|shapes"):
        st.compare_paired(np.array(policy), base)


def test_one_prompt_has_no_detectable_effect():
    assert np.isnan(st.compare_paired(np.array([2.0]), np.array([1.0])).minimum_detectable_effect)


def test_images_of_a_prompt_are_averaged_first():
    """a: (1 + 3) / 2 = 2; b: 5 alone. Prompts come back sorted; a trailing NUL is part of a prompt."""
    means, prompts = st.prompt_means([5.0, 1.0, 3.0], ["b", "a", "a"])
    assert (means.tolist(), prompts.tolist()) == ([2.0, 5.0], ["a", "b"])
    assert st.prompt_means(np.eye(2), ["a", "a\0"])[0].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_holm_worked_example():
    """p = .01 .04 .03 .005, m = 4: sorted .005*4 = .02, .01*3 = .03, .03*2 = .06, .04*1 -> raised to .06."""
    np.testing.assert_allclose(st.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.7, 0.6]).tolist() == [1.0, 1.0]
    assert st.holm([]).tolist() == []


def test_minimum_detectable_effect_by_hand():
    """t of 99 degrees: (1.98422 + 0.84523) 0.5 / sqrt(100) sqrt(pi / 3) = 0.1414725 * 1.023327 = 0.144773.

    Of 10^8 prompts, the normal quantiles: (1.95996 + 0.84162) 0.5 / 10^4 sqrt(pi / 3).
    """
    assert st.minimum_detectable_effect(0.5, 100) == pytest.approx(0.144773, abs=2e-6)
    assert st.minimum_detectable_effect(0.5, 10**8) == pytest.approx(1.43347e-4, rel=1e-5)


def test_standardised_differences_by_hand():
    """Base 1 2 3 has sd 1; a gain of 0.5 is 0.5 of it. A base without spread has no unit."""
    np.testing.assert_allclose(st.standardised_differences([1.5, 2.5, 4.0], [1, 2, 3]), [0.5, 0.5, 1.0])
    assert np.isnan(st.standardised_differences([2, 2], [1, 1])).all()


def test_vendi_counts_distinct_images():
    """n orthonormal vectors are n images, n copies are one, two pairs of copies are two."""
    assert dv.vendi(np.eye(5)) == pytest.approx(5)
    assert dv.vendi(np.ones((5, 3))) == pytest.approx(1)
    assert dv.vendi(np.array([[1, 0], [2, 0], [0, 1], [0, 3]])) == pytest.approx(2)


def test_pairwise_distance_by_hand():
    """e1, e1, e2: pairs at 0, 1, 1 -> 2 / 3; opposites are at 2."""
    assert dv.pairwise_distance(np.array([[1, 0], [5, 0], [0, 1]])) == pytest.approx(2 / 3)
    assert dv.pairwise_distance(np.array([[1.0, 0], [-1, 0]])) == pytest.approx(2)


def test_diversity_within_prompts():
    """Prompt a repeats itself (distance 0, one image), b does not (1, two); a single image has neither."""
    features = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    np.testing.assert_allclose(dv.per_prompt(dv.pairwise_distance, features, ["a", "a", "b", "b"]), [0, 1], atol=1e-9)
    np.testing.assert_allclose(dv.per_prompt(dv.vendi, features, ["a", "a", "b", "b"]), [1, 2])
    assert np.isnan(dv.per_prompt(dv.vendi, np.eye(2), ["a", "b"])).all()
    with pytest.raises(ValueError, match="zero"):
        dv.vendi(np.zeros((2, 2)))


def test_cmmd_by_hand_and_by_symmetry():
    """Single orthogonal vectors: 1000 (1 + 1 - 2 exp(-2 / 200)) = 19.9003."""
    assert dv.cmmd(np.array([[1.0, 0]]), np.array([[0, 2.0]])) == pytest.approx(2000 * (1 - np.exp(-0.01)))
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(20, 8)), rng.normal(1, 1, size=(30, 8))
    assert dv.cmmd(x, y) == pytest.approx(dv.cmmd(y, x))
    assert dv.cmmd(x, x[::-1]) == pytest.approx(0, abs=1e-9)
    assert dv.cmmd(x, y) > 1


def test_saturation_by_hand():
    """Of 4 pixels: one black, one with a single channel at 254/255, one at 253/255, one grey -> 0.5."""
    image = np.array([[[0, 0, 0], [0.5, 254 / 255, 0.5]], [[253 / 255] * 3, [0.5] * 3]], dtype=np.float32)
    assert dv.saturation(image[None]).tolist() == [0.5]


def test_high_frequency_limits():
    """A checkerboard lies at Nyquist, one period per image far below half of it, a flat image nowhere."""
    i, j = np.mgrid[:16, :16]
    checker = (i + j) % 2
    wave = 0.5 + 0.4 * np.cos(2 * np.pi * i / 16)
    images = np.repeat(np.stack([checker, wave, np.full((16, 16), 0.3)])[..., None], 3, axis=-1).astype(float)
    np.testing.assert_allclose(dv.high_frequency(images), [1, 0, 0], atol=1e-9)


@pytest.mark.parametrize("image", [np.full((1, 4, 4, 3), 1.5), np.full((1, 4, 4, 3), 9), np.zeros((4, 4, 3))])
def test_images_out_of_contract_are_refused(image):
    with pytest.raises(ValueError, match="images must"):
        dv.saturation(image)


def test_intervals_are_a_little_wider_than_plain_percentiles():
    """n = 60: sqrt(60 / 59) times the t quantile -2.00100 of 59 degrees is -2.01789, below which lies 0.0218."""
    assert st._expanded_tail(60) == pytest.approx(0.021802, abs=1e-6)
    assert st._expanded_tail(1) == 0.025
    assert st._expanded_tail(10**7) == pytest.approx(0.025, abs=1e-6)
    values = np.random.default_rng(0).normal(size=60)
    low, high = st.bootstrap_mean_ci(values)
    rows = np.random.default_rng(0).integers(60, size=(st.RESAMPLES, 60))
    means = values[rows].mean(axis=1)
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.1802, 97.8198])), abs=1e-5)


def test_rounding_is_no_difference():
    """0.1 + 0.2 is not 0.3 by one part in 10^16, which five prompts must not win by."""
    found = st.compare_paired(np.full(5, 0.1 + 0.2), np.full(5, 0.3))
    assert (found.difference, found.win_rate, found.p_value) == (0.0, 0.5, 1.0)
    apart = st.compare_paired(np.full(5, 0.3 + 1e-12), np.full(5, 0.3))
    assert apart.win_rate == 1.0


@pytest.mark.parametrize("n", [3, 6, 7, 12, 18, 31])
def test_equal_scores_have_no_spread_however_many(n):
    """The deviation of n times 0.1 is 1e-17 for some n."""
    assert np.isnan(st.standardised_differences(np.full(n, 0.4), np.full(n, 0.1))).all()
