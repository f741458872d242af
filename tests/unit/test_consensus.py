"""Training pairs whose choice scorers do not share are left out, and counted by scorer."""

from pathlib import Path

import pytest

import params
from attune.config.resolve import load
from attune.config.sources import Consensus, SourceConfig
from attune.data.ingest.rules import dissenters, is_kept
from attune.data.quarantine import REDUNDANT
from attune.data.rows import Pair
from attune.inspection.rejected import REMEDIES
from attune.planning.opinions import trained_on
from raw_data import encoded, pixels

ALL, MOST = (Consensus(scorers=["a", "b", "c"], keep=keep) for keep in ("all", "majority"))


@pytest.mark.parametrize(
    ("label_0", "gaps", "against"),
    [
        (1.0, {"a": 1, "b": 0.1, "c": 2}, []),
        (0.0, {"a": -1, "b": -0.1, "c": -2}, []),
        (0.0, {"a": -1, "b": 0.1, "c": -2}, ["b"]),
        (1.0, {"a": 0, "b": 1, "c": -1}, ["a", "c"]),  # equal scores prefer neither
        (0.5, {"a": 0, "b": 1, "c": -1}, ["a", "b", "c"]),
    ],
)
def test_who_does_not_agree(label_0, gaps, against):
    scores = {name: (5.0 + gap, 5.0) for name, gap in gaps.items()}
    assert dissenters(label_0, scores, ALL) == against
    assert is_kept(against, ALL) == (not against)
    assert is_kept(against, MOST) == (len(against) < 2)


def test_half_is_no_majority():
    two = Consensus(scorers=["a", "b"], keep="majority")
    assert is_kept([], two)
    assert not is_kept(["a"], two)


def pairs():
    """Of five training pairs the first image is the brighter of 0, 2 and 4 and the wider of 0, 1 and 4."""
    wide, narrow = (12, 8), (8, 8)
    sizes = [(wide, narrow), (wide, narrow), (narrow, wide), (narrow, wide), (wide, narrow)]
    for row, (first, second) in enumerate(sizes):
        sides = [pixels(2 * row, *first) // 4, pixels(2 * row + 1, *second) // 4]
        sides[0 if row % 2 == 0 else 1] += 128
        label_0 = 1.0 if row < 4 else 0.5
        yield Pair("a cat", *map(encoded, sides), label_0, 1 - label_0, "train", "f", row)
        yield Pair("a dog", *map(encoded, sides), label_0, 1 - label_0, "validation", "f", 10 + row)


SCORERS = {
    "brightness": lambda images, prompts: images.mean((1, 2, 3)),
    "width": lambda images, prompts: images.new_full((len(images),), float(images.shape[3])),
}


def test_disputed_training_pairs_are_quarantined_and_counted_by_scorer(write):
    counts, found = write(pairs(), SCORERS, consensus=Consensus(scorers=["brightness", "width"]))
    assert {row: (cell["reason"], cell["detail"]) for row, cell in found.items()} == {
        "1": ("no_consensus", "not of brightness"),
        "2": ("no_consensus", "not of width"),
        "3": ("no_consensus", "not of brightness, width"),
        "4": ("no_consensus", "not of brightness, width"),  # a tie chooses neither
    }
    assert (counts["pairs/train"], counts["pairs/validation"], counts["prompts/train"]) == (1, 5, 1)
    against = {name: n for name, n in counts.items() if name.startswith("consensus")}
    assert against == {"consensus/against/brightness": 3, "consensus/against/width": 3}
    assert counts["quarantined/no_consensus"] == 4


def test_one_scorer_alone_keeps_what_it_prefers(write):
    counts, found = write(pairs(), SCORERS, consensus=Consensus(scorers=["brightness"], keep="majority"))
    assert counts["pairs/train"] == 2
    assert set(found) == {"1", "3", "4"}


def test_without_a_consensus_nothing_is_left_out(write):
    counts, found = write(pairs(), SCORERS)
    assert (counts["pairs/train"], found) == (5, {})
    assert not [name for name in counts if name.startswith("consensus")]


def test_data_are_not_bad_for_it_and_it_says_what_to_do():
    assert "no_consensus" in REDUNDANT
    assert set(REDUNDANT) <= set(REMEDIES)


@pytest.mark.parametrize(
    ("scorers", "says"),
    [(["hpsv2"], "'hpsv2' must be in score_with"), (["pickscore", "pickscore"], "names a scorer twice")],
)
def test_a_consensus_needs_scores(scorers, says):
    with pytest.raises(ValueError, match=says):
        SourceConfig(score_with=["pickscore"], consensus={"scorers": scorers})


def test_a_run_is_trained_on_the_scorers_that_chose_its_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])  # where the paths of params.yaml start
    given, values = params.shipped()
    more = {f"runs__{name}": {"method": name, "after": "data"} for name in ("kto", "alignprop")}
    agreed = {"data__score_with": ["pickscore", "hpsv2"], "data__consensus": {"scorers": ["hpsv2"]}}

    def seen(changes):
        settings = load(params.write(tmp_path, params.changed(given, **more), params.changed(values, **changes)))
        return {name: set(trained_on(name, settings)) for name in settings.runs}

    before, after = seen({}), seen(agreed)
    gained = {name: found - before[name] for name, found in after.items()}
    assert {name for name, found in gained.items() if found == {"hpsv2"}} == {"sft", "dpo", "spo", "kto"}
    assert not gained["base"] | gained["alignprop"]
