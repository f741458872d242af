"""What people chose: agreement and win rates against numbers by hand, and where the report says them."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import labelled
import stages
from attune.config.plan import ReportPlan, read
from attune.evaluation.agreement import (
    ALPHA,
    KAPPA,
    agreement,
    cohens_kappa,
    krippendorffs_alpha,
    raw_agreement,
    wilson_interval,
)
from attune.evaluation.people import Answer, compare, read_answers, read_people, sign_test_p, with_holm
from attune.evaluation.report.page import to_html
from attune.evaluation.report.render import to_markdown
from attune.evaluation.summary import Summary
from attune.files import digest
from attune.labelling.export import write_people
from attune.labelling.pairs import Side, find_pairs


def answer(prompt, word, annotator="anna", repeat=False):
    return Answer(prompt, 0, ("0", "1"), annotator, repeat, word, "2026-11-27T05:00:00+00:00")


def test_cohens_kappa_by_hand():
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 0.7, p_e = 0.5, so 0.4."""
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohens_kappa(*zip(*pairs, strict=True)) == pytest.approx(0.4)
    assert math.isnan(cohens_kappa("aaa", "aaa"))


def test_krippendorffs_alpha_of_the_authors_example():
    """Krippendorff 2011, example D: four observers, twelve units, some without an answer; nominal alpha 0.743."""
    observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[row[i] for row in observers if row[i] != "."] for i in range(12)]
    assert krippendorffs_alpha([unit for unit in units if len(unit) > 1]) == pytest.approx(0.743, abs=5e-4)
    assert math.isnan(krippendorffs_alpha(["aa", "aaa"]))


def test_raw_agreement_and_its_interval():
    assert raw_agreement(["aa", "ab", "aab"]) == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Brown, Cai and DasGupta's formula
    low, high = wilson_interval(1.0, 10)
    assert (low, high) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_two_raters_get_kappa_and_three_alpha():
    two = agreement([{"anna": "a", "bob": "a"}, {"anna": "a", "bob": "b"}, {"anna": "a"}])
    assert (two.n_items, two.share, two.measure) == (2, 0.5, KAPPA)
    assert agreement([{"anna": "a", "bob": "a"}, {"anna": "a", "eve": "b"}]).measure == ALPHA
    assert agreement([{"anna": "a"}]) is None


def test_the_prompt_is_the_unit_and_ties_count_half():
    """Three prompts: b always; a and b by two people, so a half; a tie and neither, so a half."""
    answers = [answer("p", "b"), answer("p", "b", "bob"), answer("q", "a"), answer("q", "b", "bob")]
    answers += [answer("r", "tie"), answer("r", "bad", "bob"), answer("p", "a", repeat=True)]
    found = compare(answers, "dpo", "base")
    assert found.win_rate == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert (found.n_prompts, found.n_pairs, found.n_answers, found.n_annotators) == (3, 3, 6, 2)
    assert (found.ties, found.both_bad) == (1, 1)
    assert found.p_value == 1.0  # one prompt of three is decided
    assert found.with_oneself.share == 0.0
    assert found.between.share == pytest.approx(1 / 3)


def test_the_sign_test_is_exact():
    """8 of 10 decided: two-sided 2 (45 + 10 + 1) / 1024."""
    assert sign_test_p(np.array([0.5] * 8 + [-0.5] * 2 + [0.0] * 5)) == pytest.approx(112 / 1024)
    assert sign_test_p(np.zeros(3)) == 1.0


def test_several_comparisons_are_corrected_together():
    one = compare([answer(str(i), "b") for i in range(8)], "dpo", "base")
    empty = compare([], "spo", "base", changed=3)
    first, none, second = with_holm([one, empty, replace(one, run="sft")])
    assert first.p_holm == second.p_holm == pytest.approx(2 * one.p_value)
    assert none is empty


def test_a_summary_with_people_is_read_as_it_was_written(summary):
    assert "people" not in json.loads(summary.to_json())
    one = compare([answer("p", "b"), answer("p", "b", repeat=True)], "spo", "base")
    assert math.isnan(one.with_oneself.coefficient)
    told = replace(summary, people=(one,))
    again = Summary.from_json(told.to_json())
    assert again.to_json() == told.to_json()
    assert again.people[0].ci95 == one.ci95
    assert again.people[0].with_oneself.ci95 == one.with_oneself.ci95
    nothing = replace(summary, people=(compare([], "spo", "base", changed=2),))
    assert Summary.from_json(nothing.to_json()).to_json() == nothing.to_json()


def test_the_report_says_what_people_chose(summary):
    answers = [answer(str(i), "b", who) for i in range(12) for who in ("anna", "bob")]
    told = replace(summary, people=(compare(answers, "spo", "base", changed=4),))
    text = to_markdown(told)
    assert "| run | oracle | pickscore | people |" in text
    assert "| 100.0 % (100.0 to 100.0 %) |" in next(line for line in text.splitlines() if line.startswith("| spo | "))
    row = next(line for line in text.splitlines() if line.startswith("| spo against base | 100.0 %"))
    assert "100.0 to 100.0 % | &lt; 0.001 | 12 | 24 | 2 | 0 | 0 |" in row
    assert "100.0 % of 12 (76 to 100 %)" in row
    assert "spo against base: 4 answers are about images that have changed since" in text
    page = to_html(told)
    assert "People: spo against base" in page
    assert "24 answers of 2 people about 12 prompts: spo is preferred in 100.0 %" in page
    assert "4 answers are about images that have changed since" in page
    assert "people" not in to_markdown(summary)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project whose base and released run have images and scores."""
    runs = {"base": {"after": "data"}, "dpo": {"method": "dpo", "after": "data"}}
    folder = stages.write(tmp_path_factory.mktemp("people"), runs, methods__dpo__batches=1)
    with stages.inside(folder):
        stages.write_plans()
        stages.call("prepare")
        for run in runs:
            for name in ("align", "generate", "evaluate"):
                stages.call(name, run=run)
    return folder


def test_the_plan_lists_the_answers_and_the_report_reads_those_about_present_images(mine):
    stages.write_plans()
    assert not read(ReportPlan, "report").files
    sides = [Side(run, mine / f"data/short/generated/{run}", is_run=True) for run in ("base", "dpo")]
    pairs = find_pairs(sides).pairs
    file = mine / "reports/short/people/base-vs-dpo.csv"
    write_people(file, [Answer(*pair.key, "anna", False, "b", "2026") for pair in pairs])
    assert pairs[0].digests[0] == digest(pairs[0].files[0])
    stages.write_plans()
    assert read(ReportPlan, "report").files == {"reports/short/people/base-vs-dpo.csv": digest(file)}
    shutil.copy(pairs[0].files[0], pairs[1].files[1])  # an image that is another one since
    stages.call("report")
    found = Summary.from_json((mine / "reports/short/summary.json").read_text()).people[0]
    assert (found.run, found.n_answers, found.changed, found.win_rate) == ("dpo", len(pairs) - 1, 1, 1.0)
    assert "not used" in (mine / "reports/short/report.md").read_text()


def test_prompts_that_begin_like_formulas_are_found_again(tmp_path):
    prompts = ['=HYPERLINK("x")', "-a cat", 'two\nlines, "quoted"', "'quoted", "plain"]
    asked = labelled.session(tmp_path, prompts)
    write_people(tmp_path / "red-vs-blue.csv", [Answer(*pair.key, "=1+1", False, "a", "2026") for pair in asked.pairs])
    with (tmp_path / "red-vs-blue.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@"))]
    tables = {name: pd.read_parquet(tmp_path / name / "index.parquet") for name in ("red", "blue")}
    (found,) = read_people(tmp_path, tables, tmp_path, seed=0)
    assert (found.n_answers, found.changed, found.win_rate) == (5, 0, 0.0)


@pytest.mark.parametrize(
    ("old", "new", "said"), [("answer,", "answers,", "'answer' is missing"), (",a,", ",c,", "row 1")]
)
def test_a_file_that_the_page_did_not_write_is_told(tmp_path, old, new, said):
    write_people(tmp_path / "x.csv", [answer("p", "a")])
    (tmp_path / "x.csv").write_text((tmp_path / "x.csv").read_text().replace(old, new))
    with pytest.raises(ValueError, match=said):
        read_answers(tmp_path / "x.csv")
