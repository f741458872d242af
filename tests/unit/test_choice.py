"""The best of several runs: who may be it, and what choosing it is worth on prompts that had no part in the choice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attune.config.settings import Model
from attune.evaluation import statistics as st
from attune.evaluation.champion import Candidate, best_run, compare_with
from attune.evaluation.protocol import autoencoder_identity, write_scores
from attune.evaluation.report.render import to_markdown
from attune.evaluation.report.verdict import differing_versions
from attune.evaluation.summarise import summarise
from attune.evaluation.summary import Summary, evidence
from attune.files import digest
from attune.spm.accuracy import accuracy
from scores import protocol_for, table


def test_every_prompt_gets_the_candidate_that_is_best_on_the_other_half():
    """Even rows: a has 3, b 2; odd rows: a has 0, b 1. So odd rows get a, even ones b."""
    a, b = np.array([3.0, 0.0, 3.0, 0.0]), np.array([2.0, 1.0, 2.0, 1.0])
    table = np.stack([a, b])
    assert st.cross_fitted_choice(table, by=table).tolist() == [2.0, 0.0, 2.0, 0.0]
    assert st.cross_fitted_choice(10 * table, by=-table).tolist() == [30.0, 10.0, 30.0, 10.0]


def test_the_best_of_many_equal_runs_gains_nothing():
    """Ten runs that are all the base plus noise: the highest mean is 1.5 standard errors up, the choice is worth 0."""
    rng = np.random.default_rng(0)
    seen, judged = [], []
    for _ in range(400):
        differences = rng.normal(size=(10, 100))
        seen.append(differences.mean(axis=1).max())
        judged.append(st.cross_fitted_choice(differences, by=differences).mean())
    error = 0.1 / np.sqrt(400)
    assert np.mean(seen) == pytest.approx(0.154, abs=4 * error)
    assert np.mean(judged) == pytest.approx(0, abs=4 * error)


def test_the_summary_has_the_choice_and_the_report_says_it():
    prompts = [f"prompt {i:02d}" for i in range(40)]
    tables = {"base": table(prompts), "dpo": table(prompts, 0.2, seed=1), "spo": table(prompts, 0.3, seed=2)}
    summary = summarise(tables, protocol_for(prompts))
    assert (summary.best.method, summary.best.of) == ("spo", 2)
    assert summary.best.difference == pytest.approx(summary.methods["spo"].vs_base["oracle"].difference)
    assert Summary.from_json(summary.to_json()) == summary
    text = to_markdown(summary)
    assert text.splitlines()[2].startswith("spo, the best of 2 runs, beats base: oracle rises from ")
    assert rf"judged by the other, the difference is {summary.best.difference:+.3f} \[" in text
    assert summarise({name: tables[name] for name in ("base", "spo")}, protocol_for(prompts)).best is None


def test_the_minimum_detectable_effect_is_that_of_the_corrected_level():
    """Two runs by two scorers are four tests: 2.6189, t of 39 degrees at 0.05 / 4, instead of 2.3313 for two."""
    prompts = [f"prompt {i:02d}" for i in range(40)]
    tables = {"base": table(prompts), "dpo": table(prompts, 0.2, seed=1), "spo": table(prompts, 0.3, seed=2)}
    one = summarise({name: tables[name] for name in ("base", "spo")}, protocol_for(prompts))  # two tests
    two = summarise(tables, protocol_for(prompts))
    effects = [s.methods["spo"].vs_base["oracle"].minimum_detectable_effect for s in (one, two)]
    assert effects[1] / effects[0] == pytest.approx((2.6189 + 0.8509) / (2.3313 + 0.8509), rel=1e-4)


def test_a_run_that_the_report_does_not_call_better_is_not_the_best():
    """Its interval lies above 0, but a few prompts carry the mean: the win rate is below a half."""
    prompts = [f"prompt {i:02d}" for i in range(40)]
    summary = summarise({"base": table(prompts), "dpo": table(prompts, 0.2, seed=1)}, protocol_for(prompts))
    entry = summary.methods["dpo"].vs_base["oracle"]
    assert best_run(summary, ["dpo"]) == "dpo"
    for change in ({"win_rate": 0.45}, {"p_holm": 0.9}):
        entries = summary.methods["dpo"].vs_base | {"oracle": replace(entry, **change)}
        doubtful = replace(summary.methods["dpo"], vs_base=entries)
        assert best_run(replace(summary, methods=summary.methods | {"dpo": doubtful}), ["dpo"]) is None


@pytest.mark.parametrize(
    ("p", "interval", "win_rate", "said"),
    [
        (0.04, (0.1, 0.2), 0.6, "better"),
        (0.05, (0.1, 0.2), 0.6, "no evidence"),
        (0.04, (0.0, 0.2), 0.6, "mixed"),
        (0.04, (0.1, 0.2), 0.5, "mixed"),
        (0.04, (-0.2, -0.1), 0.4, "worse"),
        (0.04, (-0.2, 0.0), 0.4, "mixed"),
        (0.04, (-0.2, -0.1), 0.5, "mixed"),
    ],
)
def test_what_a_comparison_allows_to_say(p, interval, win_rate, said):
    assert evidence(p, interval, win_rate) == said


def test_the_champion_meets_what_was_chosen_by_other_prompts(tmp_path):
    """By its own prompts spo is 0.1 above the champion. Half of that is luck: on odd prompts dpo is the better."""
    prompts = [f"prompt {i:02d}" for i in range(40)]
    protocol = protocol_for(prompts)
    even = np.repeat(np.arange(40) % 2 == 0, 2)
    champion = table(prompts)
    spo = champion.assign(oracle=champion.oracle + np.where(even, 0.3, -0.1))
    dpo = champion.assign(oracle=champion.oracle + np.where(even, 0.0, 0.1))
    files = {name: tmp_path / f"{name}.parquet" for name in ("spo", "dpo", "champion")}
    for name, frame in (("spo", spo), ("dpo", dpo), ("champion", champion)):
        write_scores(files[name], frame, protocol)
    candidate = Candidate("spo", "oracle", 0.1, protocol, tmp_path, files["spo"], (files["spo"], files["dpo"]))
    found = compare_with(candidate, files["champion"], seed=0)  # even rows: dpo, 0; odd rows: spo, -0.1
    assert found.difference == pytest.approx(-0.05)
    alone = replace(candidate, chosen_from=(files["spo"],))
    assert compare_with(alone, files["champion"], seed=0).difference == pytest.approx(0.1)


def test_the_autoencoder_is_part_of_the_protocol(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/w").write_text("1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/w").write_text("2")
    model = Model(backbone="sd", path=str(tmp_path))
    own = autoencoder_identity(model)
    assert own == f"{digest(tmp_path / 'vae')[:12]} float32"
    (tmp_path / "unet").write_text("another denoiser")
    assert autoencoder_identity(model) == own
    half = model.model_copy(update={"vae_dtype": "bfloat16"})
    assert autoencoder_identity(half) == own.replace("float32", "bfloat16")
    other = model.model_copy(update={"vae": str(tmp_path / "other")})
    assert autoencoder_identity(other) == f"{digest(tmp_path / 'other')[:12]} float32"
    on_hub = Model(backbone="sd", path="owner/base@" + "a" * 40, vae_dtype="float16")
    assert autoencoder_identity(on_hub) == f"{'a' * 12} float16"


def test_differing_versions_are_said():
    same = {"base": {"evaluate.pillow": "12.0"}, "spo": {"evaluate.pillow": "12.0"}}
    assert differing_versions(same) == ""
    told = differing_versions(same | {"spo": {"evaluate.pillow": "13.0"}})
    assert told == (
        "Not all methods were made with the same evaluate.pillow (base: 12.0, spo: 13.0): "
        "the last digits of their scores may differ."
    )


def test_accuracy_of_the_preference_model_is_of_prompts():
    """Six pairs of one prompt, all right, and one of each of two others: wrong, and of equal scores, which is wrong."""
    gaps, truth = np.array([1.0] * 6 + [-1.0, 0.0]), np.ones(8)
    mean, interval = accuracy(gaps, truth, ["a"] * 6 + ["b", "c"], seed=0)
    assert mean == pytest.approx(1 / 3)
    assert interval == (0.0, 1.0)  # resamples of three prompts; of eight pairs it would be narrower
