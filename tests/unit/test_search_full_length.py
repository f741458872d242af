"""The full-length rerun of a search: who is in it, what is trained again, who wins."""

from __future__ import annotations

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial
from ruamel.yaml import YAML

from attune.search import full_length, study, workers
from attune.search.study import StudySpec

INCUMBENT = {"x": 20.0, "kind": None}  # x beyond the range, kind none of the choices


@pytest.fixture
def ended(tmp_path) -> tuple[optuna.Study, StudySpec]:
    """A search of three trials with scores 1, 3 and 2; 3 and 2 are those of x = 4.0 and 6.0."""
    kinds = {"x": FloatDistribution(1, 10, log=True), "kind": CategoricalDistribution(["a", "b"])}
    spec = StudySpec("s", str(tmp_path / "journal"), kinds, 3, ("taste",))
    made = study.open_study(spec)
    for x, value in ((2.0, 1.0), (4.0, 3.0), (6.0, 2.0)):
        made.add_trial(create_trial(params={"x": x, "kind": "a"}, distributions=kinds, value=value))
    made.set_user_attr(full_length.INCUMBENT, INCUMBENT)
    return made, spec


def trained_at_full_length(spec: StudySpec, scores: dict[float, list[float]]) -> optuna.Study:
    """Works on a full-length rerun; scores per prompt by x."""
    made = study.open_study(spec)
    while (asked := study.claim_trial(spec, made, workers.ownership())) is not None:
        asked.set_user_attr("scores", {"taste": scores[asked.params["x"]]})
        made.tell(asked, float(np.mean(scores[asked.params["x"]])))
    return made


def test_finalists_are_the_best_and_what_there_was(ended):
    """Once each, in a study of its own; settings outside of the searched space come through as they are."""
    made, spec = ended
    last = full_length.rerun_spec(spec, made, 2, {})
    assert last.grid_points == (INCUMBENT, {"x": 4.0, "kind": "a"}, {"x": 6.0, "kind": "a"})
    full = trained_at_full_length(last, {20.0: [1.0], 4.0: [0.0], 6.0: [2.0]})
    assert [t.params for t in full.get_trials()] == list(last.grid_points)
    assert len(made.get_trials()) == 3


def test_a_later_finalist_is_added_and_no_other_trained_again(ended):
    made, spec = ended
    scores = {20.0: [1.0], 4.0: [0.0], 5.0: [2.0]}
    trained_at_full_length(full_length.rerun_spec(spec, made, 1, {}), scores)
    made.add_trial(create_trial(params={"x": 5.0, "kind": "b"}, distributions=spec.space, value=9.0))
    full = trained_at_full_length(full_length.rerun_spec(spec, made, 1, {}), scores)
    assert [t.params["x"] for t in full.get_trials()] == [20.0, 4.0, 5.0]


def test_what_was_null_is_no_finalist_where_numbers_are_searched(ended):
    made, spec = ended
    made.set_user_attr(full_length.INCUMBENT, {"x": None, "kind": "a"})
    assert full_length.rerun_spec(spec, made, 1, {}).grid_points == ({"x": 4.0, "kind": "a"},)


def test_finalists_are_trained_anew_if_the_training_is_another(ended):
    """By a setting that is not searched; one that is, as after `make sweep-apply`, changes nothing."""
    made, spec = ended
    names = [
        full_length.rerun_spec(spec, made, 1, {"batches": n, "x": x}).name for n, x in ((5, 1.0), (5, 2.0), (6, 2.0))
    ]
    assert names[0] == names[1] != names[2]


def test_equal_trials_are_one_finalist(ended):
    made, spec = ended
    for _ in range(3):
        made.add_trial(create_trial(params={"x": 3.0, "kind": "b"}, distributions=spec.space, value=9.0))
    assert full_length.rerun_spec(spec, made, 2, {}).grid_points == (
        INCUMBENT,
        {"x": 3.0, "kind": "b"},
        {"x": 4.0, "kind": "a"},
    )


def test_choices_of_many_digits_are_the_same_in_every_session(tmp_path):
    kinds = {"x": CategoricalDistribution([0.12345, 0.56789])}
    spec = StudySpec("s", str(tmp_path / "journal"), kinds, 3, ("taste",))
    made = study.open_study(spec)
    made.set_user_attr(full_length.INCUMBENT, {"x": 0.2})
    for n, choice in enumerate(kinds["x"].choices):
        made.add_trial(create_trial(params={"x": choice}, distributions=kinds, value=float(n)))
        full = trained_at_full_length(
            full_length.rerun_spec(spec, made, 1, {}), {0.2: [0.0], 0.123: [1.0], 0.568: [2.0]}
        )
    assert [t.params["x"] for t in full.get_trials()] == [0.2, 0.123, 0.568]


def test_the_last_round_of_a_search_that_was_deleted_is_forgotten(tmp_path):
    """Its study stays in a database; the new search's finalists are not taken for done."""
    kinds = {"x": FloatDistribution(1, 10)}
    spec = StudySpec("s", f"sqlite:///{tmp_path / 'db'}", kinds, 3, ("taste",))
    for x in (2.0, 7.0):
        made = study.open_study(spec)
        made.set_user_attr(full_length.INCUMBENT, {"x": 4.0})
        made.add_trial(create_trial(params={"x": x}, distributions=kinds, value=x))
        full = trained_at_full_length(full_length.rerun_spec(spec, made, 1, {}), {4.0: [0.0], x: [1.0]})
        optuna.delete_study(study_name="s", storage=spec.storage)
    assert [t.params["x"] for t in full.get_trials()] == [4.0, 7.0]


def test_the_winner_of_the_last_round_is_the_best(ended, tmp_path):
    """4.0 was best in short; in full 6.0 is, by (1, 1, 4, 2) over (1, 0, 2, 1): 1 on average, of 4 from 0 to 2."""
    made, spec = ended
    last = full_length.rerun_spec(spec, made, 2, {})
    full = trained_at_full_length(last, {20.0: [1.0, 0.0, 2.0, 1.0], 4.0: [0.0] * 4, 6.0: [1.0, 1.0, 4.0, 2.0]})
    best = full_length.write(full, last, INCUMBENT, {"profile": "tiny", "run": "dpo"}, tmp_path)
    written = YAML(typ="safe").load(tmp_path / "best_params.yaml")
    assert best.params == written["params"] == {"x": 6.0, "kind": "a"}
    assert written["before"] == INCUMBENT
    assert written["difference"] == 1.0
    assert written["ci95"] == [0.0, 2.0]  # the interval of four prompts has all means there can be
    table = pd.read_csv(tmp_path / "finals.csv")
    assert table.before.tolist() == [True, False, False]
    assert table.difference.fillna(9).tolist() == [9.0, -1.0, 1.0]
    assert (tmp_path / "finals.png").exists()
