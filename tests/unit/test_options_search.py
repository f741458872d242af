"""Options of a search: what is proposed, what is pruned and when, and what makes another study."""

import math
from dataclasses import replace

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from attune.config.plan import Plugin
from attune.config.schema import ConfigError, SearchRange, check
from attune.config.search import Config
from attune.config.settings import Sampling
from attune.search import results, study, sweep
from attune.search.trial import Trial, report_or_prune, validation_interval
from searching import SEARCH, sweep_plan

SPACE = {"lr": FloatDistribution(1e-5, 1e-1, log=True), "rank": IntDistribution(2, 9)}
SPACE["targets"] = CategoricalDistribution(["attention", "all"])


def spec_of(folder, **changes):
    given = {"name": "s", "storage": str(folder / "s.journal"), "space": SPACE, "n_trials": 8}
    return study.StudySpec(**(given | changes))


def drawn(spec, score=lambda params: 0.0):
    """The parameters of all trials of a study, each told its score before the next is asked for."""
    opened, found = study.open_study(spec), []
    while (trial := study.claim_trial(spec, opened, {})) is not None:
        found.append(trial.params)
        opened.tell(trial, score(trial.params))
    return found


# ---------------------------------------------------------------- what is proposed


def test_every_trial_draws_values_of_its_own_inside_the_space(tmp_path):
    found = drawn(spec_of(tmp_path))
    assert len(found) == 8
    assert len({params["lr"] for params in found}) == 8
    for params in found:
        assert 1e-5 <= params["lr"] <= 1e-1
        assert params["rank"] in range(2, 10)
        assert params["targets"] in ("attention", "all")


def test_a_logarithmic_range_is_drawn_evenly_in_the_logarithm(tmp_path):
    """Four decades: half of the draws lie below 1e-3; evenly in the number itself one in a hundred would."""
    for log, low in ((True, (0.3, 0.7)), (False, (0.0, 0.1))):
        kinds = {"lr": FloatDistribution(1e-5, 1e-1, log=log)}
        spec = spec_of(tmp_path, space=kinds, name=f"log {log}", sampler="random")
        opened, samples = study.open_study(spec), []
        for number in range(60):
            opened.sampler = study.sampler(spec, number)
            samples.append(opened.ask(kinds).params["lr"])
        assert low[0] <= sum(lr < 1e-3 for lr in samples) / 60 <= low[1]


def test_the_seed_and_the_number_decide_what_is_drawn(tmp_path):
    first = drawn(spec_of(tmp_path, name="a"))
    assert drawn(spec_of(tmp_path, name="b")) == first
    assert drawn(spec_of(tmp_path, name="c", seed=1)) != first


def test_tpe_learns_from_the_scores(tmp_path):
    """After the random trials it stays near the best so far, 1e-3: closer than they were on average."""
    spec = spec_of(tmp_path, n_trials=24, space={"lr": SPACE["lr"]})
    distances = [
        abs(math.log10(params["lr"]) + 3) for params in drawn(spec, lambda params: -abs(math.log10(params["lr"]) + 3))
    ]
    random = distances[: study.RANDOM_TRIALS]
    assert sum(distances[-12:]) / 12 < sum(random) / len(random)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("tpe", optuna.samplers.TPESampler, {"_n_startup_trials": 6, "_constant_liar": True}),
        ("gp", optuna.samplers.GPSampler, {"_n_startup_trials": 6}),
        ("nsgaii", optuna.samplers.NSGAIISampler, {"_population_size": 4}),
    ],
)
def test_the_sampler_is_the_one_that_is_named(tmp_path, name, kind, options):
    found = study.sampler(spec_of(tmp_path, sampler=name), 0)
    assert type(found) is kind
    assert {key: getattr(found, key) for key in options} == options


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"low": 1, "high": 1}, "low must be less than high"),
        ({"low": 2, "high": 1}, "low must be less than high"),
        ({"low": 0, "high": 1, "log": True}, "log is for a range above 0"),
        ({"choices": [1, 2], "log": True}, "log is for a range above 0"),
        ({"low": 1}, "either low and high, or choices"),
        ({"low": 1, "high": 2, "choices": [1]}, "either low and high, or choices"),
        ({}, "either low and high, or choices"),
    ],
    ids=str,
)
def test_a_range_that_is_none_is_refused(block, says):
    with pytest.raises(ConfigError, match=says):
        check(SearchRange, block, "search.dpo.space.beta")


# ---------------------------------------------------------------- what is pruned


def pruned_at(spec, curves):
    """The step at which each trial, with these scores by step, is stopped; None if it is not."""
    opened, found = study.open_study(spec), []
    for curve in curves:
        trial = study.claim_trial(spec, opened, {})
        try:
            for step, value in curve.items():
                report_or_prune(trial, {step: value})
        except optuna.TrialPruned:
            found.append(step)
            opened.tell(trial, state=TrialState.PRUNED)
        else:
            found.append(None)
            opened.tell(trial, value)
    return found


def test_median_waits_for_four_trials_and_stops_what_is_below_their_median(tmp_path):
    """A trial's best score so far counts: 9.5 is below the median of the second reports, 25."""
    curves = [{1: 4.0, 2: 40.0}, {1: 3.0, 2: 30.0}, {1: 2.0, 2: 20.0}, {1: 1.0, 2: 10.0}]
    curves += [{1: 0.0, 2: 99.0}, {1: 9.0, 2: 9.5}, {1: 9.0, 2: 99.0}]
    spec = spec_of(tmp_path, pruner="median")
    assert pruned_at(spec, curves) == [None, None, None, None, 1, 2, None]


def test_without_a_pruner_the_worst_goes_on(tmp_path):
    curves = [{1: float(-i), 2: float(-i)} for i in range(8)]
    assert pruned_at(spec_of(tmp_path, pruner="none"), curves) == [None] * 8


def test_hyperband_has_the_batches_of_the_first_and_of_the_last_report(tmp_path):
    found = study.pruner(spec_of(tmp_path, pruner="hyperband", resource=(5, 60)))
    assert (found._min_resource, found._max_resource) == (5, 60)


def test_wilcoxon_stops_what_is_worse_on_every_prompt(tmp_path):
    better, worse = ({i: base + i / 100 for i in range(1, 13)} for base in (1.0, 0.5))
    found = pruned_at(spec_of(tmp_path, pruner="wilcoxon"), [better, worse, better])
    assert found[0] is None
    assert found[1] >= 6
    assert found[2] is None


@pytest.mark.parametrize(("every", "batches", "interval"), [(None, 60, 15), (None, 61, 16), (None, 3, 1), (7, 60, 7)])
def test_every_is_how_often_a_trial_is_scored(tmp_path, every, batches, interval):
    search = Config.model_validate(SEARCH | {"every": every})
    assert validation_interval(search, batches) == interval
    plan = sweep_plan(tmp_path, {"every": every, "fixed": {"batches": batches}})
    validation = Trial(plan, tmp_path).config({"beta": 700.0}).validation
    assert (validation.every, validation.at_start_and_end) == (interval, False)
    assert validation.sampling == plan.sampling


@pytest.mark.parametrize("pruner", ["none", "wilcoxon"])
def test_pruners_that_do_not_stop_a_training_have_it_not_scored(tmp_path, pruner):
    assert Trial(sweep_plan(tmp_path, {"pruner": pruner}), tmp_path).config({"beta": 700.0}).validation is None


# ---------------------------------------------------------------- identity, budget, order

SAMPLING = {"steps": 10, "eta": 0.0, "guidance_scale": 5.0, "batch_size": 8}


@pytest.mark.parametrize("changes", [{"steps": 11}, {"eta": 0.5}, {"guidance_scale": 4.0}], ids=str)
def test_how_images_are_sampled_is_part_of_a_studys_identity(tmp_path, changes):
    plan = sweep_plan(tmp_path)
    other = replace(plan, sampling=Sampling(**(SAMPLING | changes)))
    assert sweep.study_spec(plan, tmp_path).name != sweep.study_spec(other, tmp_path).name


def test_an_objectives_settings_are_part_of_a_studys_identity_and_its_expected_range_is_not(tmp_path):
    plan = sweep_plan(tmp_path)
    (name,) = plan.objectives

    def named(**settings):
        objectives = {name: Plugin(kind="rewards", name="oracle", settings=settings)}
        return sweep.study_spec(replace(plan, objectives=objectives), tmp_path).name

    assert named() == named(expected_range=[0, 1])
    assert named() != named(preprocess="square")


def test_a_specs_budget_seed_and_kinds_are_the_blocks(tmp_path):
    spec = sweep.study_spec(sweep_plan(tmp_path, {"sampler": "gp", "trials": 7}, seed=3), tmp_path)
    assert (spec.n_trials, spec.sampler, spec.pruner, spec.seed) == (7, "gp", "median", 3)
    assert spec.objectives == ("hpsv2",)
    assert spec.space["beta"] == FloatDistribution(100.0, 5000.0, log=True)
    assert spec.resource == (15, 60)
    grid = {"sampler": "grid", "space": {"batch_size": {"choices": [1, 2]}, "beta": {"choices": [100, 500]}}}
    points = [{"batch_size": b, "beta": beta} for b in (1, 2) for beta in (100, 500)]
    whole = sweep.study_spec(sweep_plan(tmp_path, grid | {"trials": None}), tmp_path)
    assert (whole.n_trials, list(whole.grid_points)) == (4, points)
    assert sweep.study_spec(sweep_plan(tmp_path, grid | {"trials": 3}), tmp_path).n_trials == 3
    assert sweep.study_spec(sweep_plan(tmp_path, grid | {"trials": 9}), tmp_path).n_trials == 4


def test_the_workers_are_as_many_as_asked_and_share_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert sweep.worker_gpus(3) == ["3", "5", "3"]
    assert sweep.worker_gpus(None) == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert (sweep.worker_gpus(2), sweep.worker_gpus(None)) == ([None, None], [None])


def ended(spec, values):
    opened = study.open_study(spec)
    for value in values:
        trial = study.claim_trial(spec, opened, {})
        opened.tell(trial, list(value))
    return [trial.number for trial in results.ranked(opened, spec)]


def test_two_objectives_of_very_different_spans_count_alike(tmp_path):
    """Scaled over the front: (1, 0), (0.6, 0.7) and (0, 1). Unscaled, the first objective alone would decide."""
    spec = spec_of(tmp_path, objectives=("big", "small"), sampler="nsgaii")
    assert ended(spec, [(1000.0, 0.0), (600.0, 0.07), (0.0, 0.1), (500.0, 0.01)])[0] == 1


def test_one_objective_ranks_by_its_score(tmp_path):
    assert ended(spec_of(tmp_path), [(0.1,), (0.3,), (0.2,)]) == [1, 2, 0]
