"""The stage prepare on data of one's own: what each option of the source's block does to what is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import stages
from attune.build import load_policy, load_scorer
from attune.config.plan import PreparePlan, read
from attune.config.plugins import plugin_config
from attune.data.rows import Prompt
from attune.data.splits import hashed_split
from attune.data.store import PreparedData
from attune.world.grammar import all_scenes
from raw_data import asked, pixels, rows_from

N = 40
PROMPTS = [scene.prompt for scene in all_scenes()[:: len(all_scenes()) // N]][:N]
PREPARED = Path("data/short/prepared")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Forty pairs in a table, without splits; the first image of every fifth pair is 24 pixels high, others 32."""
    folder = tmp_path_factory.mktemp("raw")
    for i in range(2 * N):
        Image.fromarray(pixels(i, 40, 24 if i % 10 == 0 else 32)).save(folder / f"{i}.png")
    rows = {"prompt": PROMPTS, "image_0": [f"{2 * i}.png" for i in range(N)]}
    rows |= {"image_1": [f"{2 * i + 1}.png" for i in range(N)], "label_0": [[1, 0, 0.5][i % 3] for i in range(N)]}
    pd.DataFrame(rows).to_csv(folder / "pairs.csv", index=False)
    (folder / "tests.txt").write_text("\n".join(PROMPTS[:7]) + "\n")
    return folder


@pytest.fixture
def prepare(raw, tmp_path):
    """Runs the stage; the counts it has written."""
    shutil.copytree(raw, tmp_path / "raw")

    def run(**options):
        data = {"source": "table", "path": "raw/pairs.csv", "validation_share": 0.2, "test_share": 0.2} | options
        runs = {"base": {"after": "data"}}
        stages.write(tmp_path, runs, data=data, methods={}, generate__prompts=2, preference=None)
        stages.write_plans()
        stages.call("prepare")
        return json.loads(Path("reports/short/data.json").read_text())

    with stages.inside(tmp_path):
        yield run


def splits(validation_share, test_share, prompts=PROMPTS):
    return [hashed_split(prompt, validation_share, test_share) for prompt in prompts]


@pytest.mark.parametrize("shares", [(0.2, 0.2), (0.4, 0.2), (0.2, 0.5)])
def test_shares_decide_by_hash_which_prompts_are_held_out(prepare, shares):
    counts = prepare(validation_share=shares[0], test_share=shares[1])
    expected = splits(*shares)
    for split in ("train", "validation", "test"):
        assert counts[f"pairs/{split}"] == counts[f"prompts/{split}"] == expected.count(split) > 0
    table = pd.read_parquet(PREPARED / "pairs.parquet")
    assert dict(zip(table.prompt, table.split, strict=True)) == dict(zip(PROMPTS, expected, strict=True))
    assert counts["tie_share"] == pytest.approx(sum(i % 3 == 2 for i in range(N)) / N)


def test_shares_are_shares_of_the_prompts():
    """Of 5,000 prompts at 0.1 and 0.3: five standard deviations are 106 and 162."""
    found = [hashed_split(f"prompt {i}", 0.1, 0.3) for i in range(5000)]
    assert found.count("validation") == pytest.approx(500, abs=106)
    assert found.count("test") == pytest.approx(1500, abs=162)


@pytest.mark.parametrize(("pairs", "held_out"), [(5, 3), (None, 2), (1, 500)])
def test_no_more_pairs_are_taken_than_wanted(prepare, pairs, held_out):
    counts = prepare(pairs=pairs, held_out_pairs=held_out)
    there = {split: splits(0.2, 0.2).count(split) for split in ("train", "validation", "test")}
    limits = {"train": pairs or N, "validation": held_out, "test": held_out}
    assert {split: counts[f"pairs/{split}"] for split in there} == {
        split: min(n, limits[split]) for split, n in there.items()
    }


def test_prompts_of_the_test_list_are_tested_and_not_trained_on(prepare):
    counts = prepare(test_list="raw/tests.txt", test_share=0, validation_share=0)
    assert (counts["prompts/test"], counts["pairs/train"], counts["pairs/test"]) == (7, 33, 0)
    assert counts["quarantined/prompt_in_later_split"] == 7
    assert pd.read_parquet(PREPARED / "test_prompts.parquet").prompt.tolist() == PROMPTS[:7]


@pytest.mark.parametrize(("min_side", "bad"), [(24, 0), (25, 8), (32, 8)])
def test_images_with_a_shorter_side_are_quarantined(prepare, min_side, bad):
    counts = prepare(min_side=min_side, max_bad_share=1)
    assert (counts["quarantined"], counts["pairs"]) == (bad, N - bad)


@pytest.mark.parametrize(("share", "stops"), [(0.2, False), (0.19, True), (1.0, False)])
def test_a_larger_share_of_bad_rows_stops_the_stage(prepare, share, stops):
    """8 of 40 rows are bad, which is 0.2 and not more."""
    if not stops:
        assert prepare(min_side=25, max_bad_share=share)["quarantined"] == 8
        return
    with pytest.raises(SystemExit, match=r"8 of 40 rows are bad, more than data\.max_bad_share 0\.19"):
        prepare(min_side=25, max_bad_share=share)


def test_score_with_makes_a_column_of_each_image(prepare):
    prepare(score_with=["hpsv2", "pickscore"])
    plan = read(PreparePlan, "prepare")
    data = PreparedData.read(PREPARED, "train", keep_ties=True)
    row = data.pairs.iloc[0]
    place = PROMPTS.index(row.prompt)
    for name in ("hpsv2", "pickscore"):
        scorer = load_scorer(plan.score_with[name])
        for side in (0, 1):
            array = pixels(2 * place + side, 40, 24 if (2 * place + side) % 10 == 0 else 32)
            own = scorer(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255, [row.prompt])
            assert row[f"{name}_{side}"] == pytest.approx(own.item(), abs=1e-4)
    assert not [column for column in data.pairs if column.startswith("oracle")]


def test_latents_are_of_the_centre_of_the_resized_image(prepare):
    """40 x 32 pixels: four columns are cut on each side."""
    prepare()
    policy = load_policy(read(PreparePlan, "prepare").model)
    data = PreparedData.read(PREPARED, "train", keep_ties=True)
    place = PROMPTS.index(data.pairs.prompt[0])
    array = pixels(2 * place + 1, 40, 32)[:, 4:36]
    own = policy.backbone.encode_images(torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255)
    torch.testing.assert_close(data.pair_batch([0]).latents_1, own, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- prompts and the embedded world


def test_lists_of_their_own_take_the_place_of_shares(tmp_path):
    for name, prompts in (("a", PROMPTS[:20]), ("v", PROMPTS[20:25]), ("t", PROMPTS[25:28])):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts))
    path, validation, test = (str(tmp_path / f"{name}.txt") for name in "avt")

    def found(**block):
        return {(row.prompt, row.split) for row in rows_from("prompts", path=path, **block)}

    shares = {"validation_share": 0.3, "test_share": 0.3}
    plain = set(zip(PROMPTS[:20], splits(0.3, 0.3, PROMPTS[:20]), strict=True))
    assert found(**shares) == plain
    assert {split for _, split in plain} == {"train", "validation", "test"}
    held = {(prompt, "validation") for prompt in PROMPTS[20:25]}
    own = set(zip(PROMPTS[:20], splits(0.0, 0.3, PROMPTS[:20]), strict=True))
    assert found(validation_list=validation, **shares) == own | held
    tested = {(prompt, "test") for prompt in PROMPTS[25:28]}
    own = set(zip(PROMPTS[:20], splits(0.3, 0.0, PROMPTS[:20]), strict=True))
    assert found(test_list=test, **shares) == own | tested


WORLD = {"train_prompts": 6, "validation_prompts": 3, "test_prompts": 4, "pair_prompts": 2, "images_per_prompt": 3}


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, (6, 3, 4, 6, 9)),
        ({"train_prompts": 8}, (8, 3, 4, 6, 9)),
        ({"validation_prompts": 5}, (6, 5, 4, 6, 15)),
        ({"test_prompts": 2}, (6, 3, 2, 6, 9)),
        ({"pair_prompts": 5}, (6, 3, 4, 15, 9)),
        ({"images_per_prompt": 4}, (6, 3, 4, 12, 18)),
    ],
    ids=str,
)
def test_sizes_of_the_embedded_world(changes, sizes):
    """m images of a prompt make m (m - 1) / 2 pairs; what is announced is what comes."""
    block = WORLD | {"temperature": 0.05} | changes
    config = plugin_config("sources", "world", block, "data")
    generated = []

    def generate(prompts, ordinals, desc):
        generated.extend(zip(prompts, ordinals, strict=True))
        return np.stack([pixels(i, 32, 32) for i in range(len(prompts))])

    from attune.data.sources import world

    rows = list(world.read(world.Config.model_validate(config.model_dump()), 0, generate, None))
    prompts = [row.split for row in rows if isinstance(row, Prompt)]
    pairs = [row.split for row in rows if not isinstance(row, Prompt)]
    names = ("train", "validation", "test")
    assert (*map(prompts.count, names), *map(pairs.count, names[:2])) == sizes
    told = asked("world", **block)[1]
    keys = ("prompts/train", "prompts/validation", "prompts/test", "pairs/train", "pairs/validation")
    assert tuple(told[key] for key in keys) == sizes
    assert (
        len(generated)
        == len(set(generated))
        == (block["pair_prompts"] + block["validation_prompts"]) * block["images_per_prompt"]
    )


@pytest.mark.parametrize(("temperature", "share"), [(1e-3, 1.0), (0.5, 0.731), (1e3, 0.5)])
def test_the_temperature_of_choices_is_bradley_terrys(temperature, share):
    """Utilities 0.5 apart: the better image is chosen with probability 1 / (1 + exp(-0.5 / temperature))."""
    from attune.data.sources.world import label_pairs

    n = 4000
    utility = np.tile([0.7, 0.2], (n, 1))
    table = label_pairs([f"p{i}" for i in range(n)], utility, temperature, np.random.default_rng(0))
    assert table.label_0.mean() == pytest.approx(share, abs=0.03)
    assert (table.image_0.tolist()[:3], table.image_1.tolist()[:3]) == ([0, 2, 4], [1, 3, 5])
