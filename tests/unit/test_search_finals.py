"""The last round of a search: who is in it, what is trained again, who wins."""

from __future__ import annotations

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial
from ruamel.yaml import YAML

from attune.search import finals, study, workers
from attune.search.study import Plan

BEFORE = {"x": 20.0, "kind": None}  # x beyond the range, kind none of the choices


@pytest.fixture
def ended(tmp_path) -> tuple[optuna.Study, Plan]:
    """A search of three trials with scores 1, 3 and 2; 3 and 2 are those of x = 4.0 and 6.0."""
    kinds = {"x": FloatDistribution(1, 10, log=True), "kind": CategoricalDistribution(["a", "b"])}
    plan = Plan("s", str(tmp_path / "journal"), kinds, 3, ("taste",))
    made = study.create(plan)
    for x, value in ((2.0, 1.0), (4.0, 3.0), (6.0, 2.0)):
        made.add_trial(create_trial(params={"x": x, "kind": "a"}, distributions=kinds, value=value))
    made.set_user_attr(finals.BEFORE, BEFORE)
    return made, plan


def trained_in_full(plan: Plan, scores: dict[float, list[float]]) -> optuna.Study:
    """Works on a last round; scores per prompt by x."""
    made = study.create(plan)
    while (asked := study.ask(plan, made, workers.claim())) is not None:
        asked.set_user_attr("scores", {"taste": scores[asked.params["x"]]})
        made.tell(asked, float(np.mean(scores[asked.params["x"]])))
    return made


def test_finalists_are_the_best_and_what_there_was(ended):
    """Once each, in a study of its own; settings outside of the searched space come through as they are."""
    made, plan = ended
    last = finals.planned(plan, made, 2, {})
    assert last.cells == (BEFORE, {"x": 4.0, "kind": "a"}, {"x": 6.0, "kind": "a"})
    full = trained_in_full(last, {20.0: [1.0], 4.0: [0.0], 6.0: [2.0]})
    assert [t.params for t in full.get_trials()] == list(last.cells)
    assert len(made.get_trials()) == 3


def test_a_later_finalist_is_added_and_no_other_trained_again(ended):
    made, plan = ended
    scores = {20.0: [1.0], 4.0: [0.0], 5.0: [2.0]}
    trained_in_full(finals.planned(plan, made, 1, {}), scores)
    made.add_trial(create_trial(params={"x": 5.0, "kind": "b"}, distributions=plan.space, value=9.0))
    full = trained_in_full(finals.planned(plan, made, 1, {}), scores)
    assert [t.params["x"] for t in full.get_trials()] == [20.0, 4.0, 5.0]


def test_what_was_null_is_no_finalist_where_numbers_are_searched(ended):
    made, plan = ended
    made.set_user_attr(finals.BEFORE, {"x": None, "kind": "a"})
    assert finals.planned(plan, made, 1, {}).cells == ({"x": 4.0, "kind": "a"},)


def test_finalists_are_trained_anew_if_the_training_is_another(ended):
    """By a setting that is not searched; one that is, as after `make sweep-apply`, changes nothing."""
    made, plan = ended
    names = [finals.planned(plan, made, 1, {"batches": n, "x": x}).study for n, x in ((5, 1.0), (5, 2.0), (6, 2.0))]
    assert names[0] == names[1] != names[2]


def test_equal_trials_are_one_finalist(ended):
    made, plan = ended
    for _ in range(3):
        made.add_trial(create_trial(params={"x": 3.0, "kind": "b"}, distributions=plan.space, value=9.0))
    assert finals.planned(plan, made, 2, {}).cells == (BEFORE, {"x": 3.0, "kind": "b"}, {"x": 4.0, "kind": "a"})


def test_choices_of_many_digits_are_the_same_in_every_session(tmp_path):
    kinds = {"x": CategoricalDistribution([0.12345, 0.56789])}
    plan = Plan("s", str(tmp_path / "journal"), kinds, 3, ("taste",))
    made = study.create(plan)
    made.set_user_attr(finals.BEFORE, {"x": 0.2})
    for n, choice in enumerate(kinds["x"].choices):
        made.add_trial(create_trial(params={"x": choice}, distributions=kinds, value=float(n)))
        full = trained_in_full(finals.planned(plan, made, 1, {}), {0.2: [0.0], 0.123: [1.0], 0.568: [2.0]})
    assert [t.params["x"] for t in full.get_trials()] == [0.2, 0.123, 0.568]


def test_the_last_round_of_a_search_that_was_deleted_is_forgotten(tmp_path):
    """Its study stays in a database; the new search's finalists are not taken for done."""
    kinds = {"x": FloatDistribution(1, 10)}
    plan = Plan("s", f"sqlite:///{tmp_path / 'db'}", kinds, 3, ("taste",))
    for x in (2.0, 7.0):
        made = study.create(plan)
        made.set_user_attr(finals.BEFORE, {"x": 4.0})
        made.add_trial(create_trial(params={"x": x}, distributions=kinds, value=x))
        full = trained_in_full(finals.planned(plan, made, 1, {}), {4.0: [0.0], x: [1.0]})
        optuna.delete_study(study_name="s", storage=plan.storage)
    assert [t.params["x"] for t in full.get_trials()] == [4.0, 7.0]


def test_the_winner_of_the_last_round_is_the_best(ended, tmp_path):
    """4.0 was best in short; in full 6.0 is, by (1, 1, 4, 2) over (1, 0, 2, 1): 1 on average, between 0.25 and 1.75."""
    made, plan = ended
    last = finals.planned(plan, made, 2, {})
    full = trained_in_full(last, {20.0: [1.0, 0.0, 2.0, 1.0], 4.0: [0.0] * 4, 6.0: [1.0, 1.0, 4.0, 2.0]})
    best = finals.write(full, last, BEFORE, {"profile": "tiny", "run": "dpo"}, tmp_path)
    written = YAML(typ="safe").load(tmp_path / "best_params.yaml")
    assert best.params == written["params"] == {"x": 6.0, "kind": "a"}
    assert written["before"] == BEFORE
    assert written["difference"] == 1.0
    assert written["ci95"] == pytest.approx([0.25, 1.75], abs=0.01)
    table = pd.read_csv(tmp_path / "finals.csv")
    assert table.before.tolist() == [True, False, False]
    assert table.difference.fillna(9).tolist() == [9.0, -1.0, 1.0]
    assert (tmp_path / "finals.png").exists()
