"""The stage prepare on a user's own table, with the embedded base and scorer."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import params as files
from attune.config import plugins
from attune.config.resolve import load
from attune.data.store import PreparedData
from attune.stages import plan
from attune.stages import prepare as stage
from attune.world.grammar import all_scenes
from attune.world.render import render

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PREPARED, QUARANTINE, REPORTS = Path("data/short/prepared"), Path("data/short/quarantine.csv"), Path("reports/short")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with parameters, the embedded models and ten pairs in data/raw; plans and runs the stage."""
    scenes = all_scenes()[::300][:10]
    raw = tmp_path / "data/raw"
    raw.mkdir(parents=True)
    rows = []
    for i, (scene, pixels) in enumerate(zip(scenes, render(scenes, np.random.default_rng(0)), strict=True)):
        good = Image.fromarray((pixels * 255).round().astype(np.uint8))
        good.save(raw / f"{i}_good.png")
        good.resize((64, 48)).rotate(180).save(raw / f"{i}_bad.jpg")
        split = ("train", "validation", "test")[min(i // 4, 2)]
        rows.append((scene.prompt, f"{i}_good.png", f"{i}_bad.jpg", 1, split))
    (raw / "3_bad.jpg").write_bytes(b"lost")
    pd.DataFrame(rows, columns=["prompt", "image_0", "image_1", "label_0", "split"]).to_csv(raw / "t.csv", index=False)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/embedded").symlink_to(ROOT / "models/embedded")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTUNE_TRACKING", "off")

    def run(prompts=2, **data):
        """Without the checks of the plan, which would stop some of it before: here `prepare` itself is tested."""
        params, values = files.shipped("short")
        params["runs"] = {"base": {"after": "data"}}
        values |= {"data": {"source": "table", "path": "data/raw/t.csv"} | data, "methods": {}, "search": {}}
        values["scorers"] = {"pickscore": values["scorers"]["pickscore"]}
        files.write(tmp_path, params, files.changed(values, generate__prompts=prompts))
        plan.write(load())
        stage.main()

    return run


def test_a_table_becomes_prepared_data(project):
    project(score_with=["pickscore"])
    counts = json.loads((REPORTS / "data.json").read_text())
    assert {split: counts[f"pairs/{split}"] for split in ("train", "validation", "test")} == {
        "train": 3,
        "validation": 4,
        "test": 2,
    }
    assert (counts["quarantined"], counts["quarantined/undecodable"], counts["mixed_sizes"]) == (1, 1, 9)
    with QUARANTINE.open(newline="") as file:
        (bad,) = csv.DictReader(file)
    assert (bad["source"], bad["file"], bad["row"], bad["reason"]) == ("table", "t.csv", "5", "undecodable")
    assert bad["detail"].startswith("expected a whole JPEG, PNG, WEBP, BMP, GIF, TIFF, found b'lost'")
    data = PreparedData.read(PREPARED, "train")
    assert data.latents.shape == (19, 4, 8, 8)  # of the bad pair one image is good
    assert torch.isfinite(data.pair_batch(range(3)).latents_1).all()
    module = plugins.load("rewards", "pickscore")
    scorer = module.load(module.Config(path="models/embedded/pickscore", license="Apache-2.0"), torch.device("cpu"))
    with Image.open("data/raw/0_bad.jpg") as image:
        own = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    assert own.shape[2:] == (48, 64)
    expected = scorer(own, [data.pairs.prompt[0]]).item()
    assert data.pairs.pickscore_1[0] == pytest.approx(expected, abs=1e-4)


def test_too_many_bad_rows_end_the_stage_with_one_message(project):
    with pytest.raises(
        SystemExit, match=r"1 of 10 rows are bad, more than data\.max_bad_share 0\.05: undecodable 1; see"
    ):
        project(max_bad_share=0.05)
    assert len(QUARANTINE.read_text().splitlines()) == 2
    assert not PREPARED.exists()


def test_what_needs_no_image_to_be_known_is_told_before_a_model_loads(project, monkeypatch):
    monkeypatch.setattr("attune.build.load_policy", None)
    table = pd.read_csv("data/raw/t.csv")
    table.assign(label_0=["left"] * 3 + [1] * 7).to_csv("data/raw/odd.csv", index=False)
    with pytest.raises(
        SystemExit, match=r"3 of 10 rows are bad, .*: no_label 3; see .* row 2: no_label\. label_0: expec"
    ):
        project(path="data/raw/odd.csv")
    table.assign(label_0="left").to_csv("data/raw/odd.csv", index=False)
    with pytest.raises(SystemExit, match=r"no usable row; there are 0 train pairs, .* in the quarantine 10 no_label"):
        project(path="data/raw/odd.csv", max_bad_share=1)
    with QUARANTINE.open(newline="") as file:
        assert {row["detail"] for row in csv.DictReader(file)} == {"label_0: expected 1, 0 or 0.5 for a tie"}


def test_data_that_is_not_there_ends_the_stage_before_a_model_loads(project, monkeypatch):
    monkeypatch.setattr("attune.build.load_policy", None)
    with pytest.raises(SystemExit, match=r"data\.path: data/raw/none\.csv is not there"):
        project(path="data/raw/none.csv")
    assert QUARANTINE.read_text() == "source,file,row,prompt,reason,detail\n"


def test_too_few_test_prompts_end_the_stage_with_the_remedy(project):
    """The table has two test prompts; what all trainings would have been made for cannot be generated."""
    with pytest.raises(SystemExit, match=r"2 test prompts, but 3 are needed by generate\.prompts: set data\.test_list"):
        project(prompts=3)
    assert not PREPARED.exists()
