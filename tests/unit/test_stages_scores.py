"""evaluate and report by their own `main`: scores are those of the files, and the summary is what follows from them."""

import json
import math
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

import stages
from attune.build import load_scorer
from attune.config.plan import EvaluatePlan, Plugin, read
from attune.evaluation.images import decode_rgb
from attune.evaluation.protocol import read_scores
from attune.evaluation.scoring import score_images
from attune.evaluation.summary import Summary
from attune.shards import Shards

RUNS = {
    "base": {"after": "data"},
    "sft": {"method": "sft", "after": "data"},
    "spo": {"method": "spo", "after": "preference"},
}
SETTINGS = {"generate__prompts": 5, "methods__sft__lr": 3e-3}  # a rate at which scores move
SCORERS = ["oracle", "pickscore", "hpsv2", "aesthetic"]
GENERATED, REPORTS = Path("data/short/generated"), Path("reports/short")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project after every evaluate; no test changes it."""
    folder = stages.write(tmp_path_factory.mktemp("made"), RUNS, **SETTINGS)
    with stages.inside(folder):
        stages.write_plans()
        stages.call("prepare")
        stages.call("train_preference")
        for run in RUNS:
            for stage in ("align", "generate", "evaluate"):
                stages.call(stage, run=run)
    return folder


def table_of(run):
    return read_scores(REPORTS / f"scores/{run}.parquet")[0]


def pixels(folder, files):
    images = np.stack([np.asarray(Image.open(folder / file)) for file in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


# ---------------------------------------------------------------- evaluate


@pytest.mark.parametrize("run", RUNS)
def test_scores_are_those_of_the_files(here, run):
    frame, protocol = read_scores(REPORTS / f"scores/{run}.parquet")
    index = pd.read_parquet(GENERATED / run / "index.parquet")
    pd.testing.assert_frame_equal(frame[["prompt", "ordinal", "file"]], index, check_dtype=False)
    plan = read(EvaluatePlan, "evaluate", run)
    assert list(plan.scorers) == SCORERS
    for name, block in plan.scorers.items():
        scorer = load_scorer(block)
        for i in (0, 4, 9):  # each image alone; the stage scores all at once
            found = scorer(pixels(GENERATED / run, [frame.file[i]]), [frame.prompt[i]])
            assert frame[name][i] == pytest.approx(found.item(), rel=1e-4, abs=1e-5)
    made = json.loads((GENERATED / run / "protocol.json").read_text())
    assert protocol.to_dict() == made | {"scorers": protocol.to_dict()["scorers"]}
    assert protocol.scorer_names == tuple(sorted(SCORERS))


def test_parts_of_the_oracle_are_columns_and_features_are_a_clips(here):
    frame = table_of("sft")
    plan = read(EvaluatePlan, "evaluate", "sft")
    parts = load_scorer(plan.scorers["oracle"]).parts(pixels(GENERATED / "sft", frame.file), frame.prompt.tolist())
    assert {name: frame[f"oracle.{name}"].tolist() for name in parts} == {n: v.tolist() for n, v in parts.items()}
    features = np.load(REPORTS / "features/sft.npy")
    own = load_scorer(plan.scorers["aesthetic"]).features(pixels(GENERATED / "sft", frame.file[3:4])).numpy()
    assert features.shape[0] == len(frame) == 10
    np.testing.assert_allclose(features[3:4], own, atol=1e-5)


def test_features_are_those_of_the_first_scorer_that_has_any(here, tmp_path):
    """Of two CLIPs; the oracle, before them, has none."""
    oracle = Plugin(kind="rewards", name="oracle", settings={})
    block = {"model": "ViT-tiny/4@32", "hidden_act": "gelu"}
    clips = [
        Plugin(kind="rewards", name="clipscore", settings=block | {"path": f"models/embedded/{folder}"})
        for folder in ("pickscore", "aesthetic")
    ]
    folder, images = GENERATED / "sft", pixels(GENERATED / "sft", table_of("sft").file)
    own = [load_scorer(clip).features(images).numpy() for clip in clips]
    assert np.abs(own[0] - own[1]).max() > 0.1
    for order in (0, 1), (1, 0):
        named = {"o": oracle} | {f"clip {i}": clips[i] for i in order}
        loaders = {name: partial(load_scorer, clip) for name, clip in named.items()}
        shards = Shards(tmp_path / "-".join(named))
        _, found, _ = score_images(folder, loaders, {name: name for name in named}, shards)
        np.testing.assert_allclose(found, own[order[0]], atol=1e-5)


def test_an_image_is_decoded_once_for_all_scorers(here, tmp_path, monkeypatch):
    plan, decoded = read(EvaluatePlan, "evaluate", "sft"), []
    monkeypatch.setattr("attune.evaluation.images.decode_rgb", lambda data: (decoded.append(data), decode_rgb(data))[1])
    loaders = {name: partial(load_scorer, scorer) for name, scorer in plan.scorers.items()}
    frame, _, _ = score_images(GENERATED / "sft", loaders, {name: name for name in loaders}, Shards(tmp_path))
    assert len(loaders) > 1
    assert len(decoded) == len(frame)
    pd.testing.assert_frame_equal(frame[list(loaders)], table_of("sft")[list(loaders)])


@pytest.mark.parametrize("interval", [[2.0, 3.0], [-3.0, -2.0]])
def test_evaluate_ends_where_a_mean_leaves_its_range(mine, interval):
    before = (REPORTS / "scores/sft.parquet").read_bytes()
    stages.write(mine, RUNS, **SETTINGS, scorers__hpsv2__expected_range=interval)
    stages.write_plans()
    mean = table_of("sft").hpsv2.mean()
    with pytest.raises(SystemExit, match=rf"scorer hpsv2: mean {mean:.3f} lies outside {interval[0]:g} to"):
        stages.call("evaluate", run="sft")
    assert (REPORTS / "scores/sft.parquet").read_bytes() == before


def test_a_range_that_holds_the_mean_changes_nothing(mine):
    before = table_of("sft")
    mean = float(before.hpsv2.mean())
    stages.write(mine, RUNS, **SETTINGS, scorers__hpsv2__expected_range=[mean - 1e-6, mean + 1e-6])
    stages.write_plans()
    stages.call("evaluate", run="sft")
    pd.testing.assert_frame_equal(table_of("sft"), before)


# ---------------------------------------------------------------- report


@pytest.fixture(scope="module")
def summary(made):
    with stages.inside(made):
        stages.call("report")
        return Summary.from_json((REPORTS / "summary.json").read_text())


def per_prompt(run, column):
    """Mean over the two images of each prompt, prompts in order."""
    return table_of(run).groupby("prompt")[column].mean().sort_index().to_numpy()


def columns():
    return [column for column in table_of("base").columns if column not in ("prompt", "ordinal", "file")]


def test_locations_are_means_and_medians_over_prompts(here, summary):
    assert list(summary.methods) == list(RUNS)
    assert summary.scorers == tuple(SCORERS)
    for run, method in summary.methods.items():
        assert set(method.scores) == set(columns())
        for column, location in method.scores.items():
            values = per_prompt(run, column)
            assert location.mean == pytest.approx(values.mean())
            assert location.median == pytest.approx(np.median(values))


def check(entry, policy, base, tests):
    """`tests`: how many there are in the family that Holm's correction is over."""
    difference = policy - base
    wins = (difference > 0) + 0.5 * (difference == 0)
    assert entry.difference == pytest.approx(difference.mean(), abs=1e-12)
    assert entry.win_rate == pytest.approx(wins.mean())
    p = 1.0 if not difference.any() else stats.wilcoxon(difference, zero_method="zsplit").pvalue
    assert entry.p_value == pytest.approx(p)
    low, high = entry.difference_ci95
    assert difference.min() - 1e-12 <= low <= difference.mean() <= high <= difference.max() + 1e-12
    n, power = len(difference), 0.8
    errors = stats.t.ppf(1 - 0.05 / tests / 2, n - 1) + stats.t.ppf(power, n - 1)
    assert entry.minimum_detectable_effect == pytest.approx(errors * difference.std(ddof=1) * (math.pi / 3 / n) ** 0.5)


def test_comparisons_are_paired_by_prompt(here, summary):
    assert summary.methods["base"].vs_base == {}
    for run in ("sft", "spo"):
        for column in columns():
            check(
                summary.methods[run].vs_base[column],
                per_prompt(run, column),
                per_prompt("base", column),
                2 * len(SCORERS),
            )
    (pair,) = summary.pairs
    assert (pair.method, pair.other) == ("sft", "spo")
    for column in columns():
        check(pair.scores[column], per_prompt("sft", column), per_prompt("spo", column), len(SCORERS))


def by_holm(p_values):
    """Written out: the i-th smallest of m is multiplied by m - i, and none is below the one before it."""
    order, found, highest = sorted(range(len(p_values)), key=p_values.__getitem__), {}, 0.0
    for i, place in enumerate(order):
        highest = max(highest, min(1.0, p_values[place] * (len(p_values) - i)))
        found[place] = highest
    return [found[i] for i in range(len(p_values))]


def test_scorers_of_all_runs_are_one_family_and_parts_of_scorers_are_none(here, summary):
    entries = [summary.methods[run].vs_base for run in ("sft", "spo")]
    claims = [each[scorer] for each in entries for scorer in SCORERS]
    assert [claim.p_holm for claim in claims] == pytest.approx(by_holm([claim.p_value for claim in claims]))
    (pair,) = summary.pairs
    claims = [pair.scores[scorer] for scorer in SCORERS]
    assert [claim.p_holm for claim in claims] == pytest.approx(by_holm([claim.p_value for claim in claims]))
    parts = [column for column in columns() if "." in column]
    assert len(parts) > 3
    assert {each[part].p_holm for each in (*entries, pair.scores) for part in parts} == {None}


def test_the_gap_is_of_trained_against_held_out_scorers(here, summary):
    """SPO goes by the preference model, which starts from pickscore's CLIP; spreads are the base's."""
    gains = {
        scorer: (per_prompt("spo", scorer) - per_prompt("base", scorer)).mean() / per_prompt("base", scorer).std(ddof=1)
        for scorer in SCORERS
    }
    spo = summary.methods["spo"]
    assert (spo.trained_on, spo.selected_by) == (("pickscore",), ())
    held_out = np.mean([gain for scorer, gain in gains.items() if scorer != "pickscore"])
    assert (spo.gap.trained, spo.gap.heldout) == pytest.approx((gains["pickscore"], held_out))
    assert spo.gap.gap == pytest.approx(gains["pickscore"] - held_out)
    assert summary.methods["sft"].gap is None
    assert summary.methods["sft"].trained_on == ()


def test_extremes_are_the_prompts_whose_headline_score_changed_most(here, summary):
    prompts = sorted(set(table_of("base").prompt))
    difference = per_prompt("sft", "oracle") - per_prompt("base", "oracle")
    order = np.argsort(difference)
    lost = [(prompts[i], difference[i]) for i in order[:3] if difference[i] < 0]
    gained = [(prompts[i], difference[i]) for i in order[::-1][:3] if difference[i] > 0]
    found = summary.methods["sft"].extremes
    for rows, wanted in ((found.lost, lost), (found.gained, gained)):
        assert [row.prompt for row in rows] == [prompt for prompt, _ in wanted]
        assert [row.difference for row in rows] == pytest.approx([d for _, d in wanted])


def test_diversity_and_drift_are_of_the_features(here, summary):
    """1 - cosine over all pairs of images; and over the two images of each prompt."""
    assert not summary.methods["base"].signs
    for run, method in summary.tuned.items():
        found = method.signs
        for name, attribute in ((run, "value"), ("base", "base")):
            features = np.load(REPORTS / f"features/{name}.npy").astype(float)
            unit = features / np.linalg.norm(features, axis=1, keepdims=True)
            distances = {(i, j): 1 - unit[i] @ unit[j] for i, j in combinations(range(10), 2)}
            everywhere = np.mean(list(distances.values()))
            assert getattr(found["pairwise_distance"], attribute) == pytest.approx(everywhere)
            within = [distances[2 * i, 2 * i + 1] for i in range(5)]
            assert getattr(found["pairwise_distance_per_prompt"], attribute) == pytest.approx(np.mean(within))
    base, tuned = (
        (rows := np.load(REPORTS / f"features/{run}.npy").astype(float)) / np.linalg.norm(rows, axis=1, keepdims=True)
        for run in ("base", "sft")
    )

    def kernel(x, y):
        return np.mean([[np.exp(-((a - b) ** 2).sum() / 200) for b in y] for a in x])

    cmmd = 1000 * (kernel(tuned, tuned) + kernel(base, base) - 2 * kernel(tuned, base))
    assert summary.methods["sft"].signs["cmmd"].value == pytest.approx(cmmd, abs=1e-9)


def test_saturation_is_counted_in_the_images(here, summary):
    for run in (run for run in RUNS if run != "base"):
        shares = []
        for file in table_of(run).file:
            levels = np.asarray(Image.open(GENERATED / run / file))
            shares.append(((levels <= 1) | (levels >= 254)).any(axis=2).mean())
        assert summary.methods[run].signs["saturation"].value == pytest.approx(np.mean(shares))


def test_the_report_says_what_the_summary_says(here, summary):
    text = (REPORTS / "report.md").read_text()
    entry = summary.methods["sft"].vs_base["hpsv2"]
    assert f"{entry.difference:+.4f} ({entry.difference_ci95[0]:+.4f} to {entry.difference_ci95[1]:+.4f})" in text
    mean = summary.methods["sft"].scores["pickscore"].mean
    assert any(f"{mean:.{digits}f}" in text for digits in (2, 3, 4))
    page = (REPORTS / "report.html").read_text()
    assert f"{100 * entry.win_rate:.1f} %" in page
    assert page.count("data:image/webp;base64,") >= 12


def test_runs_under_different_protocols_are_not_compared(mine):
    stages.write(mine, RUNS, **SETTINGS, generate__sampling__steps=3)
    stages.write_plans()
    stages.call("generate", run="sft")
    stages.call("evaluate", run="sft")
    with pytest.raises(ValueError, match=r"base and sft were scored under different protocols \(steps: 2 != 3\)"):
        stages.call("report")


def test_another_seed_of_the_bootstrap_changes_intervals_alone(mine, monkeypatch):
    """The report takes the profile's seed: means and tests stay, and some resample differs.

    The intervals of a whole report of five prompts go from the least to the greatest resampled mean, which any seed
    finds; so they are those of plain percentiles here.
    """
    monkeypatch.setattr("attune.evaluation.statistics._expanded_tail", lambda n: 0.025)
    stages.call("report")
    summary = Summary.from_json((REPORTS / "summary.json").read_text())
    stages.write(mine, RUNS, **SETTINGS, seed=7)
    stages.write_plans()
    stages.call("report")
    again = Summary.from_json((REPORTS / "summary.json").read_text())
    before, after = (s.methods["sft"].vs_base for s in (summary, again))
    assert {k: e.difference for k, e in before.items()} == {k: e.difference for k, e in after.items()}
    assert {k: e.p_value for k, e in before.items()} == {k: e.p_value for k, e in after.items()}
    assert {k: e.difference_ci95 for k, e in before.items()} != {k: e.difference_ci95 for k, e in after.items()}
