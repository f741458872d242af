"""A project of single images in this process: prepared, learned from by KTO and SFT, and what stops it beforehand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import stages
from attune.config.resolve import load
from attune.planning.costs import rows
from attune.planning.data_problems import notes
from attune.planning.problems import problems
from attune.world.grammar import all_scenes
from raw_data import pixels

PROMPTS = [scene.prompt for scene in all_scenes()[:: len(all_scenes()) // 16]][:16]
RUNS = {name: {"method": name, "after": "data"} for name in ("kto", "sft")}
LORA = {"rank": 2, "targets": "attention"}
METHODS = {name: {"lora": LORA, "lr": 3e-3, "batches": 3, "batch_size": 4, "accumulation": 1} for name in RUNS}
METHODS["kto"] |= {"beta": 500, "warmup": 0, "gradient_checkpointing": False}


def write_images(folder: Path, liked: int, disliked: int) -> None:
    """As many images of either kind, which share sixteen prompts."""
    for side, n, first in (("liked", liked, 0), ("disliked", disliked, 100)):
        (folder / side).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(pixels(first + i, 32, 32)).save(folder / side / f"{i}.png")
            (folder / side / f"{i}.txt").write_text(PROMPTS[i % len(PROMPTS)])


def write_project(folder: Path, runs, **changes) -> None:
    data = {"source": "thumbs", "path": "thumbs", "score_with": ["pickscore"]}
    given = {"data": data, "methods": METHODS, "preference": None} | changes
    stages.write(folder, {"base": {"after": "data"}} | runs, **given)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """KTO and SFT trained on 24 liked and 16 disliked images."""
    folder = tmp_path_factory.mktemp("thumbs")
    write_images(folder / "thumbs", 24, 16)
    write_project(folder, RUNS)
    with stages.inside(folder):
        stages.write_plans()
        stages.call("prepare")
        for run in RUNS:
            stages.call("align", run=run)
    return folder


def test_images_are_prepared_with_the_test_prompts_that_the_report_needs(here):
    counts = json.loads(Path("reports/short/data.json").read_text())
    assert counts["prompts/test"] == load().generate.prompts == 4
    assert counts["images"] == counts["images/train"] + counts["images/test"] + counts["images/validation"] == 40
    assert counts["liked/train"] + counts["disliked/train"] == counts["images/train"]
    table = pd.read_parquet("data/short/prepared/images.parquet")
    assert list(table.columns) == ["prompt", "image", "liked", "pickscore", "split"]
    assert np.isfinite(table.pickscore).all()
    assert table.image.nunique() == 40


@pytest.mark.parametrize("run", RUNS)
def test_methods_learn_from_them(here, run):
    curve = pd.read_csv(f"reports/short/train/{run}.csv")
    assert len(curve) == 3
    assert np.isfinite(curve.loss).all()
    assert (curve.grad_norm > 0).all()
    assert list(Path(f"models/short/{run}").glob("*.safetensors"))


def test_the_plan_counts_images(here):
    found = {row.stage: row for row in rows(load(), {}, {}, {})}
    counts = json.loads(Path("reports/short/data.json").read_text())
    assert found["prepare"].does.endswith(f"{counts['images/train']} images")
    assert found["align@kto"].does == "kto: 3 batches of 4 images"
    epochs = 12 / counts["liked/train"]
    assert found["align@sft"].sees == f"12 liked images, {epochs:.3g} epochs"


def test_verdicts_that_have_gone_since_stop_a_training_with_a_line(mine):
    table = pd.read_parquet("data/short/prepared/images.parquet")
    table[table.liked].to_parquet("data/short/prepared/images.parquet")
    with pytest.raises(SystemExit, match="0 train disliked images, but 1 are needed by the runs that learn from liked"):
        stages.call("align", run="kto")


# --- what the plan says -----------------------------------------------------------------------------------


@pytest.fixture
def said(tmp_path):
    """The problems, and then the notes, of a project of single images."""

    def found(runs, liked=24, disliked=16, **changes):
        write_images(tmp_path / "thumbs", liked, disliked)
        write_project(tmp_path, runs, **changes)
        with stages.inside(tmp_path):
            return problems(load(), 0, None), list(notes(load()))

    return found


@pytest.mark.parametrize("name", ["dpo", "mapo"])
def test_methods_that_compare_are_told_what_to_use(said, name):
    (line,), _ = said({name: {"method": name, "after": "data"}}, methods={})
    instead = "data.source thumbs has single images; use kto or sft or spin, or a source of pairs"
    assert line == f"runs.{name}: {name} learns from pairs, and {instead}"


def test_the_preference_model_needs_pairs(said):
    lines, _ = said(
        {"spo": {"method": "spo", "after": "preference"}},
        methods={},
        preference={"clip": "models/embedded/pickscore", "lr": 3e-4, "batches": 3, "batch_size": 4},
    )
    assert any("preference: is trained on pairs, and data.source thumbs has none" in line for line in lines)


@pytest.mark.parametrize(("liked", "disliked", "needed"), [(20, 0, "disliked"), (0, 20, "liked")])
def test_a_kind_that_is_missing_stops_the_plan(said, liked, disliked, needed):
    lines, _ = said(RUNS, liked, disliked)
    assert any(f"data: 0 train {needed} images, but 1 are needed by the runs that learn from" in line for line in lines)


def test_liked_images_alone_are_enough_for_sft(said):
    assert said({"sft": RUNS["sft"]}, 20, 0)[0] == []


def test_weights_that_are_far_from_balance_are_noted_and_stop_nothing(said):
    found, (note,) = said(RUNS, 64, 4, methods__kto__lambda_desirable=1, methods__kto__lambda_undesirable=1)
    assert found == []
    assert note.startswith("params/short.yaml:methods.kto: ")
    assert "set lambda_desirable and lambda_undesirable" in note


def test_prompts_alone_are_no_images(tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(PROMPTS * 3))
    data = {"source": "prompts", "path": "list.txt", "score_with": []}
    stages.write(tmp_path, {"base": {"after": "data"}} | RUNS, data=data, methods=METHODS, preference=None)
    with stages.inside(tmp_path):
        lines = problems(load(), 0, None)
    assert {
        "runs.kto: kto learns from images, and data.source prompts has none; use one that has",
        "runs.sft: sft learns from liked images, and data.source prompts has none; use one that has",
    } <= set(lines)
