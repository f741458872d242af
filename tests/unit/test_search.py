"""The space, the budget of a study, killed workers, pruners, and the files of results."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from attune.config import plugins
from attune.config.schema import ConfigError, SearchRange
from attune.search import figures, results, space, study, workers
from attune.search.study import StudySpec
from attune.search.trial import keep_if_best, report_or_prune, stack_scorers

DPO = plugins.config_class("methods", "dpo")
X = {"x": FloatDistribution(0, 10)}


# --- the space --------------------------------------------------------------------------------------------


def test_a_distribution_is_of_the_settings_own_type():
    """beta is a float though its bounds are written without a point, lora.rank is whole."""
    dimensions = {
        "beta": SearchRange(low=100, high=5000, log=True),
        "lora.rank": SearchRange(low=2, high=16),
        "schedule": SearchRange(choices=["constant", "linear"]),
    }
    assert space.distributions(dimensions, DPO) == {
        "beta": FloatDistribution(100.0, 5000.0, log=True),
        "lora.rank": IntDistribution(2, 16),
        "schedule": CategoricalDistribution(["constant", "linear"]),
    }


def test_grid_points_are_every_combination():
    grid = {"a": SearchRange(choices=[1, 2]), "b": SearchRange(choices=["x", "y"])}
    assert space.grid_points(grid) == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]


def test_a_trials_settings_have_the_fixed_and_the_drawn_values():
    block = {"lr": 1.0, "batches": 200, "lora": {"rank": 8, "targets": "all"}}
    made = space.with_values(block, {"batches": 60} | space.rounded_params({"lr": 0.00031415, "lora.rank": 4}))
    assert made == {"lr": 0.000314, "batches": 60, "lora": {"rank": 4, "targets": "all"}}
    assert block["lora"]["rank"] == 8


def test_current_settings_are_found_by_dotted_key():
    config = DPO.model_validate({"lora": {"rank": 4}, "lr": 0.00012345, "batches": 5, "batch_size": 2, "beta": 500})
    dimensions = {
        "lora.rank": SearchRange(low=2, high=8),
        "lr": SearchRange(low=1, high=2),
        "warmup": SearchRange(low=1, high=2),
    }
    assert space.current_settings(dimensions, config) == {"lora.rank": 4, "lr": 0.000123, "warmup": config.warmup}


# --- the study --------------------------------------------------------------------------------------------


def trial(state: TrialState = TrialState.COMPLETE, x: float = 1.0, value: float = 0.0, **attrs: Any):
    values = value if state == TrialState.COMPLETE else None
    return create_trial(state=state, params={"x": x}, distributions=X, value=values, user_attrs=attrs)


def test_a_killed_trial_makes_room_for_its_retry_and_for_nothing_else():
    """Wanted 3: one complete, one failed of itself, one lost (number 2). Until it is retried, that one counts."""
    made = optuna.create_study()
    for each in (trial(), trial(TrialState.FAIL, error="RuntimeError"), trial(TrialState.FAIL)):
        made.add_trial(each)
    spec = StudySpec("s", "", X, n_trials=3)
    assert not study.has_budget(spec, made.get_trials())
    made.enqueue_trial({"x": 1.0}, user_attrs={study.RETRY_OF: 2})
    assert study.has_budget(spec, made.get_trials())
    made.ask(X)
    assert not study.has_budget(spec, made.get_trials())


def test_pending_is_empty_once_all_trials_have_ended():
    """Wanted 3: one is done, then one runs, then one has failed and the last is done."""
    made, spec = optuna.create_study(), StudySpec("s", "", X, n_trials=3)
    made.add_trial(trial())
    assert study.pending(spec, made.get_trials()) == "1 of 3 trials are done; the same command goes on"
    made.add_trial(trial())
    running = made.ask(X)
    assert "2 of 3 trials are done, 1 at work" in study.pending(spec, made.get_trials())
    made.tell(running, state=TrialState.FAIL)
    assert study.pending(spec, made.get_trials()) == ""


def test_three_failures_end_the_session_they_are_of():
    """Three failed at time 100: that ends a session begun at 50, not one begun at 200."""
    spec, lost = StudySpec("s", "/there/s.journal", X, n_trials=9), {"error": "RuntimeError: no", "heartbeat": 100.0}
    trials = [trial(TrialState.FAIL, **lost) for _ in range(3)]
    with pytest.raises(study.SearchError, match=r"first 3 .*RuntimeError: no.* delete /there/s\.journal"):
        study.check_failures(spec, trials, 50.0)
    study.check_failures(spec, trials, 200.0)


def test_a_lost_trial_of_part_of_a_grid_is_done_again(tmp_path):
    """Two of five cells are wanted and the first is lost: the second, then the first again, and no other."""
    points = tuple({"x": float(x)} for x in range(5))
    space = {"x": CategoricalDistribution([0.0, 1.0, 2.0, 3.0, 4.0])}
    spec = StudySpec("s", str(tmp_path / "journal"), space, n_trials=2, grid_points=points, sampler="grid")
    made = study.open_study(spec)
    study.claim_trial(spec, made, {})  # without a sign of life
    assert workers.reap(spec, made) == [0]
    found = []
    while (asked := study.claim_trial(spec, made, workers.ownership())) is not None:
        found.append(asked.params["x"])
    assert found == [1.0, 0.0]


def test_a_result_of_a_reaped_trial_is_dropped_and_its_worker_goes_on(caplog):
    """Another process sets it to FAIL while it runs; the next report to the study raises UpdateFinishedTrialError."""
    made = optuna.create_study()

    def objective(asked: optuna.Trial) -> list[float]:
        made.tell(asked.number, state=TrialState.FAIL)
        report_or_prune(asked, {1: 0.5})
        return [1.0]

    workers.run_trial(made, made.ask(X), objective)
    assert "trial 0: another host took it for killed" in caplog.text
    assert [t.state for t in made.get_trials()] == [TrialState.FAIL]
    assert "error" not in made.get_trials()[0].user_attrs


def test_a_short_outage_is_waited_for_and_a_long_one_is_not(monkeypatch):
    """Four pauses, so five attempts."""
    monkeypatch.setattr(study, "PAUSES", (0.0,) * 4)
    calls = []

    def away_until(attempt: int) -> str:
        calls.append(attempt)
        if len(calls) < attempt:
            raise optuna.exceptions.StorageInternalError
        return "back"

    assert study.retry_on_outage(away_until, 5) == "back"
    calls.clear()
    with pytest.raises(optuna.exceptions.StorageInternalError):
        study.retry_on_outage(away_until, 6)
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("changes", "dead"),
    [
        ({}, False),
        ({"born": 1.0}, True),  # the process id is another process's by now
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "heartbeat": time.time() - 2 * workers.GRACE_SECONDS}, True),
    ],
)
def test_a_trial_is_dead_if_its_process_is(changes, dead):
    known = workers.ownership()
    known |= {key: changes.pop(key) for key in ("heartbeat",) if key in changes}
    known["owner"] |= changes
    assert workers.is_dead(trial(TrialState.RUNNING, **known)) is dead


def test_a_trial_without_owner_is_dead():
    assert workers.is_dead(trial(TrialState.RUNNING))


def test_parallel_tpe_draws_keep_apart():
    """Sixteen trials are complete, then eight start at once: their mean distance to the nearest is above 1.5.

    Without constant_liar the mean distance was 0.89 (range 10 x 10), with it 2.35, over 20 seeds.
    """
    spec = StudySpec("s", "", {key: FloatDistribution(0, 10) for key in "xy"}, n_trials=99)
    made = optuna.create_study(direction="maximize")

    def draw() -> optuna.Trial:
        made.sampler = study.sampler(spec, len(made.get_trials()))
        return made.ask(spec.space)

    for _ in range(16):
        asked = draw()
        made.tell(asked, -((asked.params["x"] - 3) ** 2) - (asked.params["y"] - 7) ** 2)
    points = np.array([list(draw().params.values()) for _ in range(8)])
    distances = np.linalg.norm(points[:, None] - points, axis=-1) + 99 * np.eye(8)
    assert distances.min(axis=1).mean() > 1.5


# --- pruning ----------------------------------------------------------------------------------------------


def scored(made: optuna.Study, rows: list[list[float]]) -> list[str]:
    """Reports each row's values at steps 1, 2, ... as a trial; how many steps each got."""
    steps = []
    for row in rows:
        asked = made.ask()
        try:
            for step, value in enumerate(row, 1):
                report_or_prune(asked, {step: value})
            made.tell(asked, float(np.mean(row)))
        except optuna.TrialPruned:
            made.tell(asked, state=TrialState.PRUNED)
        steps.append(len(made.get_trials()[asked.number].intermediate_values))
    return steps


def test_median_ends_what_is_below_half_of_the_others():
    """Four full trials with 1, 2, 3, 4 at each of three steps: 2 is below their median 2.5, 3 is above."""
    made = optuna.create_study(direction="maximize", pruner=study.pruner(StudySpec("s", "", X, 9, pruner="median")))
    assert scored(made, [[1.0] * 3, [2.0] * 3, [3.0] * 3, [4.0] * 3, [2.0] * 3, [3.0] * 3]) == [3, 3, 3, 3, 1, 3]


def test_hyperband_ends_some_of_many():
    spec = StudySpec("s", "", X, 9, pruner="hyperband", resource=(1, 9))
    made = optuna.create_study(direction="maximize", pruner=study.pruner(spec))
    steps = scored(made, [[float(-i)] * 9 for i in range(20)])
    assert steps[0] == 9
    assert min(steps) < 9


def test_wilcoxon_compares_prompt_by_prompt():
    """Prompts differ by far more than trials do: 0.1 less on every one of them is clear after a few, 0.1 more never."""
    prompts = list(np.random.default_rng(0).normal(size=40))
    made = optuna.create_study(direction="maximize", pruner=study.pruner(StudySpec("s", "", X, 9, pruner="wilcoxon")))
    steps = scored(made, [prompts, [p - 0.1 for p in prompts], [p + 0.1 for p in prompts]])
    assert steps[0] == steps[2] == 40
    assert steps[1] < 12


# --- results ----------------------------------------------------------------------------------------------


@pytest.fixture
def searched() -> tuple[optuna.Study, StudySpec]:
    """Sixteen trials of tiny's dpo; number 2 is pruned, number 3 has failed."""
    spec = StudySpec("tiny-dpo-0", "", {"beta": FloatDistribution(1, 100, log=True), "lr": FloatDistribution(0, 1)}, 9)
    sampler = optuna.samplers.RandomSampler(seed=0)
    made = optuna.create_study(direction="maximize", study_name=spec.name, sampler=sampler)
    rng = np.random.default_rng(0)
    for i in range(16):
        asked = made.ask({"beta": spec.space["beta"], "lr": spec.space["lr"]})
        for key, value in {"owner": {"host": "here"}, "seconds": 1.5, "prompts": 6}.items():
            asked.set_user_attr(key, value)
        if i == 2:
            asked.report(-5.0, 3)
            made.tell(asked, state=TrialState.PRUNED)
        elif i == 3:
            asked.set_user_attr("error", "RuntimeError: out of memory")
            made.tell(asked, state=TrialState.FAIL)
        else:
            made.tell(asked, -((np.log10(asked.params["beta"]) - 1) ** 2) + 0.01 * rng.normal())
    return made, spec


def test_the_table_has_a_row_per_trial(searched):
    table = results.table(searched[0].get_trials(), searched[1])
    assert set(table.host) == {"here"}
    assert list(table) == ["number", "state", "beta", "lr", "score", "seconds", "prompts", "host", "retry_of", "error"]
    assert table.state.tolist()[1:5] == ["complete", "pruned", "fail", "complete"]
    assert table.score[2] == -5.0
    assert np.isnan(table.score[3])


def test_important_is_what_makes_for_the_better_trials():
    """Scores differ by beta, but for one in five, far below, that are so by lr: they do not count.

    Over six seeds beta's share was 0.92 to 0.95. Optuna's own default is about low values: 0.01 to 0.05.
    """
    spec = StudySpec("s", "", {"beta": FloatDistribution(1, 100, log=True), "lr": FloatDistribution(0, 1)}, 80)
    made = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    rng = np.random.default_rng(0)
    for _ in range(80):
        asked = made.ask(spec.space)
        beta, lr = asked.params["beta"], asked.params["lr"]
        made.tell(asked, (-((np.log10(beta) - 1) ** 2) if lr > 0.2 else -10 - lr) + 0.01 * rng.normal())
    (shares,) = figures.importances(made, spec)
    assert shares["beta"] > 0.8


def test_the_pictures_are_drawn(searched, tmp_path):
    """Importances from forty complete trials on: fourteen tell nothing of them."""
    made, spec = searched
    names = {file.name for file in figures.draw(made, spec, tmp_path)}
    assert names == {"history.png", "slice.png"} == {file.name for file in tmp_path.iterdir()}
    for i in range(26):
        params = {"beta": 1.0 + i, "lr": 0.5}
        assert "importance.png" not in names
        made.add_trial(create_trial(params=params, distributions=dict(spec.space), value=float(i)))
        names = {file.name for file in figures.draw(made, spec, tmp_path)} if i in (24, 25) else names
    assert "importance.png" in names


def test_of_two_objectives_the_best_is_in_the_middle_of_the_front(tmp_path):
    """(1, 0), (0, 1) and (0.8, 0.7) are the front; their sums over its range are 1, 1 and 1.5."""
    made = optuna.create_study(directions=["maximize"] * 2)
    for values in ([1.0, 0.0], [0.0, 1.0], [0.8, 0.7], [0.5, 0.5]):
        made.add_trial(create_trial(params={"x": 1.0}, distributions=X, values=values))
    spec = StudySpec("s", "", X, 4, objectives=("a", "b"))
    numbers = [trial.number for trial in results.ranked(made, spec)]
    assert numbers[0] == 2
    assert set(numbers) == {0, 1, 2}
    assert "pareto.png" in {file.name for file in figures.draw(made, spec, tmp_path)}


def test_apply_writes_the_searched_values(searched, tmp_path):
    results.write(*searched, {"profile": "tiny", "run": "dpo"}, tmp_path)
    written = {}
    values = results.apply(tmp_path, "tiny", "dpo", written.update)
    assert set(values) == {"beta", "lr"}
    assert written == {f"methods.dpo.{key}": value for key, value in values.items()}


def test_apply_takes_only_what_was_found_for_this(searched, tmp_path):
    with pytest.raises(ConfigError, match=r"best_params\.yaml: is not there; run the search first"):
        results.apply(tmp_path, "tiny", "dpo", dict)
    results.write(*searched, {"profile": "tiny", "run": "dpo"}, tmp_path)
    with pytest.raises(ConfigError, match="profile is 'tiny', and 'sd15' is to be changed"):
        results.apply(tmp_path, "sd15", "dpo", dict)
    with pytest.raises(ConfigError, match="run is 'dpo', and 'spo' is to be changed"):
        results.apply(tmp_path, "tiny", "spo", dict)


def test_apply_waits_for_the_full_length_rerun(searched, tmp_path):
    results.write(*searched, {"profile": "tiny", "run": "dpo"}, tmp_path, provisional="the best of short trials")
    with pytest.raises(ConfigError, match=r"best_params\.yaml: the best of short trials; run the search again"):
        results.apply(tmp_path, "tiny", "dpo", dict)


def test_only_the_best_model_is_kept(tmp_path):
    for number, score in enumerate([0.2, 0.5, 0.3]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "weights").write_text(str(number))
        keep_if_best(tmp_path / str(number), tmp_path / "best", {"score": score})
    assert (tmp_path / "best" / "weights").read_text() == "1"
    assert not (tmp_path / "1").exists()


def test_two_scorers_get_the_same_images():
    import torch

    both = stack_scorers([lambda pixels, prompts: pixels.sum(dim=1), lambda pixels, prompts: torch.arange(2.0)])
    assert both(torch.ones(2, 3), ["a", "b"]).tolist() == [[3.0, 0.0], [3.0, 1.0]]
