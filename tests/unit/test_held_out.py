"""Splits of data of one's own: the prompts that runs ask for are held out first, whatever their hashes."""

import json
from dataclasses import replace

import pytest
from PIL import Image

import params as files
from attune.config.plan import plan_file
from attune.config.resolve import load
from attune.data.rows import BadRow, Pair, Prompt
from attune.data.splits import HeldOut, hashed_split, with_splits
from attune.planning.local_files import Digests
from attune.planning.make import make
from attune.planning.problems import problems
from raw_data import asked, image, pixels, rows_from

PROMPTS = [f"prompt {i}" for i in range(40)]
WORLD = {"validation_share": 0.05, "test_share": 0.05}


def put(prompts, listed=(), **held_out):
    rows = [prompt if isinstance(prompt, Prompt) else Prompt(prompt, "", "f", 0) for prompt in prompts]
    found = with_splits(listed, lambda: iter(rows), HeldOut(**(WORLD | held_out)))
    return [(row.prompt, row.split) for row in found]


def split_of(prompts, **held_out):
    return dict(put(prompts, **held_out))


def count(found, split):
    return sum(each == split for each in found.values())


def test_nothing_is_wanted_and_shares_decide_as_they_always_did():
    assert split_of(PROMPTS) == {prompt: hashed_split(prompt, 0.05, 0.05) for prompt in PROMPTS}


@pytest.mark.parametrize(("test", "validation"), [(12, 0), (12, 6), (0, 5), (1, 1), (39, 1), (60, 3)])
def test_as_many_prompts_as_wanted_are_held_out(test, validation):
    """Never fewer than the shares hold, as far as there are prompts at all."""
    found = split_of(PROMPTS, test_prompts=test, validation_prompts=validation)
    plain = split_of(PROMPTS)
    n_test = min(40, max(test, count(plain, "test")))
    assert count(found, "test") == n_test
    assert count(found, "validation") == min(40 - n_test, max(validation, count(plain, "validation")))


def test_a_share_that_holds_enough_is_left_as_it_is():
    many = [f"p {i}" for i in range(2000)]
    expected = {prompt: hashed_split(prompt, 0.05, 0.05) for prompt in many}
    assert count(expected, "test") > 60
    assert split_of(many, test_prompts=60, validation_prompts=60) == expected


def test_the_order_of_prompts_their_spelling_and_repeats_do_not_matter():
    found = split_of(PROMPTS, test_prompts=12, validation_prompts=6)
    assert split_of(PROMPTS[::-1] * 3, test_prompts=12, validation_prompts=6) == found
    loud = split_of([prompt.upper() for prompt in PROMPTS] + PROMPTS, test_prompts=12, validation_prompts=6)
    assert {prompt: loud[prompt] for prompt in PROMPTS} == found
    assert {loud[prompt.upper()] == split for prompt, split in found.items()} == {True}


def test_more_wanted_prompts_keep_those_that_were_held_out():
    few, more = (split_of(PROMPTS, test_prompts=n) for n in (8, 14))
    assert {p for p in PROMPTS if few[p] == "test"} < {p for p in PROMPTS if more[p] == "test"}


def test_listed_prompts_and_rows_own_splits_count_first():
    listed = [Prompt(f"listed {i}", "test", "list.txt", i) for i in range(10)]
    found = split_of(PROMPTS, listed=listed, test_prompts=12)
    assert count({p: s for p, s in found.items() if p in PROMPTS}, "test") == 2
    same = split_of(PROMPTS, listed=[Prompt(prompt, "test") for prompt in PROMPTS[:12]], test_prompts=12)
    plain = split_of(PROMPTS)
    assert {p: same[p] for p in PROMPTS[12:]} == {p: plain[p] for p in PROMPTS[12:]}
    own = [Prompt(f"own {i}", "validation") for i in range(6)] + PROMPTS
    kept = split_of(own, validation_prompts=6)
    assert {p: kept[p] for p in PROMPTS} == plain


def test_a_listed_prompt_of_the_data_is_not_counted_twice():
    """The five that would be taken first are listed: seven more are taken."""
    first = [prompt for prompt, split in split_of(PROMPTS, test_prompts=5).items() if split == "test"]
    found = put(PROMPTS, [Prompt(prompt, "test") for prompt in first], test_prompts=12)
    assert len({prompt for prompt, split in found if split == "test"}) == 12


def test_a_wanted_prompt_has_a_row_of_its_own_before_its_pair():
    """So a test prompt whose images are bad, or whose pair is one too many, is a test prompt still."""
    rows = [Pair(prompt, None, None, 1.0, 0.0, "", "f", i) for i, prompt in enumerate(PROMPTS)] + [BadRow("no_label")]
    found = list(with_splits([], lambda: iter(rows), HeldOut(**WORLD, test_prompts=12)))
    named = [row.prompt for row in found if isinstance(row, Prompt)]
    assert sorted(named) == sorted({row.prompt for row in found if isinstance(row, Pair) and row.split == "test"})
    assert len(named) == 12
    plain = list(with_splits([], lambda: iter(rows), HeldOut(**WORLD)))
    assert not [row for row in plain if isinstance(row, Prompt)]
    many = [Pair(f"p {i}", None, None, 1.0, 0.0, "", "f", i) for i in range(2000)]
    limited = list(with_splits([], lambda: iter(many), HeldOut(**WORLD, test_prompts=60, pairs=10)))
    assert sum(isinstance(row, Prompt) and row.split == "test" for row in limited) == 60


def test_a_test_prompt_whose_image_is_bad_is_a_test_prompt_still(write):
    rows = [Pair(prompt, image(0), image(1), 1.0, 0.0, "", "f", i) for i, prompt in enumerate(PROMPTS)]
    held_out = HeldOut(**WORLD, test_prompts=12)
    tested = {row.row for row in with_splits([], lambda: iter(rows), held_out) if row.split == "test"}
    lost = [replace(row, image_1=b"no image") if row.row in tested else row for row in rows]
    counts, _ = write(with_splits([], lambda: iter(lost), held_out), wanted={"prompts/test": 12})
    assert (counts["prompts/test"], counts["pairs/test"], counts["quarantined/undecodable"]) == (12, 0, 12)


# --- sources, the plan -----------------------------------------------------------------------------------


def own_data(folder, source):
    """Forty prompts in the layout of a source; its block of settings."""
    folder.mkdir()
    for i in range(2):
        Image.fromarray(pixels(i)).save(folder / f"{i}.png")
    if source in ("folder", "thumbs"):
        for side in ("chosen", "rejected") if source == "folder" else ("liked", "disliked"):
            (folder / side).mkdir()
            for i in range(40):
                Image.fromarray(pixels(i + 100 * (side in ("chosen", "liked")))).save(folder / side / f"{i}.png")
        (folder / "captions.json").write_text(json.dumps({str(i): prompt for i, prompt in enumerate(PROMPTS)}))
        return {"source": source, "path": str(folder)}
    rows = {
        "table": lambda p: [{"prompt": p, "image_0": "0.png", "image_1": "1.png", "label_0": 1}],
        "ranked": lambda p: [{"prompt": p, "image": f"{i}.png", "rank": i} for i in range(2)],
        "prompts": lambda p: [{"prompt": p}],
    }[source]
    (folder / "t.jsonl").write_text("\n".join(json.dumps(row) for prompt in PROMPTS for row in rows(prompt)))
    return {"source": source, "path": str(folder / "t.jsonl")}


SOURCES = ["folder", "table", "thumbs", "ranked", "prompts"]


@pytest.mark.parametrize("source", SOURCES)
def test_sources_hold_out_what_is_wanted(tmp_path, source):
    block = own_data(tmp_path / "own", source) | {"test_prompts": 12, "validation_prompts": 6}
    name = block.pop("source")
    _, sizes, listed = asked(name, **block)
    assert {split: sizes[f"prompts/{split}"] for split in ("train", "validation", "test")} == {
        "train": 22,
        "validation": 6,
        "test": 12,
    }
    assert set(listed) == set(PROMPTS)
    found = {row.prompt: row.split for row in rows_from(name, **block) if not isinstance(row, BadRow)}
    assert found == split_of(PROMPTS, test_prompts=12, validation_prompts=6)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(files.ROOT)

    def made(source, runs, **changes):
        params, values = files.shipped("short")
        block = own_data(tmp_path / "own", source) if not (tmp_path / "own").exists() else made.block
        made.block = block
        values = files.changed(
            values, data=block, scorers__oracle=..., preference=..., search={}, methods={}, **changes
        )
        return load(files.write(tmp_path, params | {"runs": {"base": {"after": "data"}} | runs}, values))

    return made


SFT = {"sft": {"method": "sft", "after": "data"}}


@pytest.mark.parametrize("source", SOURCES[:4])
def test_the_plan_hands_the_wanted_numbers_to_prepare(settings, tmp_path, source):
    found = settings(source, SFT)
    assert problems(found, 0, None) == []
    plan = make(found, Digests(tmp_path / "d.json"))[plan_file("prepare")]
    assert plan.source.settings["test_prompts"] == found.generate.prompts == 12
    assert plan.source.settings["validation_prompts"] == 0
    more = make(settings(source, SFT, generate__prompts=20), Digests(tmp_path / "d.json"))[plan_file("prepare")]
    assert more != plan  # so DVC prepares the data again


def test_no_prompt_left_for_training_stops_the_plan(settings):
    lines = problems(settings("folder", SFT, generate__prompts=40), 0, None)
    (line,) = [line for line in lines if "0 train prompts" in line]
    assert "of all prompts, 0 are for validation and 40 are for test" in line
    assert "needed by the runs that train" in line
    assert "generate.prompts" in line
    lines = problems(settings("folder", SFT, generate__prompts=41), 0, None)
    assert [line for line in lines if "40 test prompts, but 41 are needed by generate.prompts" in line]
