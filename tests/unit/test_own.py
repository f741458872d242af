"""`attune init`: which source reads a folder, which runs learn from it, and settings that fit its size."""

from __future__ import annotations

import json
import shutil
from contextlib import chdir
from pathlib import Path

import pytest

import params
import raw_data
from attune.config.resolve import load
from attune.config.schema import ConfigError
from attune.data.rows import SourceError
from attune.planning import own
from attune.planning.problems import Machine, problems
from attune.stages.init import init

ROOT = Path(__file__).parents[2]
BOX = Machine(1, 24 * 10**9, 64 * 10**9, 10**12)


@pytest.fixture
def project(tmp_path):
    """The parameter files of the repository in a folder of their own."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/embedded").symlink_to(ROOT / "models/embedded")
    with chdir(tmp_path):
        yield tmp_path


def folder(path: Path, sides: tuple[str, str], n: int, prompt: str = "a photo of cat {}") -> Path:
    """n images on each side, with captions."""
    for side in sides:
        (path / side).mkdir(parents=True)
        for i in range(n):
            (path / side / f"{i}.png").write_bytes(raw_data.image(i + 100 * len(side)))
            (path / side / f"{i}.txt").write_text(prompt.format(i))
    return path


@pytest.mark.parametrize("base", ["tiny", "sd15_12gb", "sd15_24gb", "sdxl_24gb", "sd35m_24gb", "z_image_24gb"])
@pytest.mark.parametrize(("sides", "method"), [(("chosen", "rejected"), "dpo"), (("liked", "disliked"), "kto")])
def test_a_profile_that_has_no_problem_is_written(project, base, sides, method):
    data = folder(project / "mine", sides, 20)
    init(data, base, "own", None, None)
    settings = load()
    assert settings.profile == "own"
    assert list(settings.runs) == ["base", method]
    assert problems(settings, 860_000_000, BOX) == []
    assert settings.generate.prompts == 4
    assert settings.generate.images_per_prompt == 4
    rows = 20 if method == "dpo" else 40
    config = settings.methods[method]
    shipped = params.shipped(base)[1]["methods"][method]["batches"]
    least = own.STEPS * config.accumulation
    assert config.batches == min(shipped, max(least, -(-own.PASSES * rows // config.batch_size)))
    assert "oracle" not in settings.scorers  # which cannot score cats
    assert settings.search == {}


def test_the_oracle_stays_where_every_prompt_is_of_its_world(project):
    init(ROOT / "docs/examples/pairs", "tiny", "own", None, None)
    assert "oracle" in load().scorers
    assert load().generate.prompts == 8


def test_other_lines_stay_as_they_are(project):
    init(folder(project / "mine", ("chosen", "rejected"), 5), "tiny", "own", None, None)
    written, template = ((project / f"params/{name}.yaml").read_text() for name in ("own", "tiny"))
    assert written.splitlines()[:10] == template.splitlines()[:10]
    assert (project / "params/tiny.yaml").read_text() == (ROOT / "params/tiny.yaml").read_text()
    assert "# default: mlflow.db in the repository's root" in (project / "params.yaml").read_text()


def test_a_method_that_needs_the_preference_model_keeps_it(project):
    init(folder(project / "mine", ("chosen", "rejected"), 5), "tiny", "own", ["spo", "dpo"], None)
    settings = load()
    assert settings.preference is not None
    assert settings.runs["spo"].after == "preference"
    assert settings.runs["dpo"].after == "data"
    assert problems(settings, 10**6, BOX) == []


def test_a_list_of_test_prompts_spares_the_datas_own(project):
    (project / "test.txt").write_text("a dog\na horse\na cow\n")
    init(folder(project / "mine", ("chosen", "rejected"), 2), "tiny", "own", None, Path("test.txt"))
    assert load().generate.prompts == 3
    assert load().data.test_list == "test.txt"


@pytest.mark.parametrize(
    ("name", "rows", "source"),
    [
        ("t.csv", "prompt,image_0,image_1,label_0\na,a.png,b.png,1\n", "table"),
        ("t.jsonl", json.dumps({"prompt": "a", "image_0": "a", "image_1": "b", "label_0": 1}), "table"),
        ("t.csv", "prompt,image,liked\na,a.png,1\n", "thumbs"),
        ("t.csv", "prompt,image,rank\na,a.png,1\n", "ranked"),
        ("t.jsonl", json.dumps({"prompt": "a", "images": ["a", "b"], "scores": [1, 2]}), "ranked"),
        ("t.txt", "a\nb\n", "prompts"),
        ("t.jsonl", json.dumps({"prompt": "a"}), "prompts"),
        ("d/train.json", json.dumps([{"prompt": "a", "path1": "a", "path2": "b"}]), "hpdv3"),
        ("d/train.json", json.dumps([{"prompt": "a", "image_path": ["a"], "human_preference": [1]}]), "hpdv2"),
        ("d/metadata-train.parquet", "x", "imagerewarddb"),
        ("d/train-0.tar", "x", "pickapic"),
    ],
)
def test_a_source_knows_its_data(tmp_path, name, rows, source):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(rows)
    assert own._source_of(tmp_path / "d" if name.startswith("d/") else file) == source


def test_what_cannot_be_is_said_and_nothing_is_written(project):
    data, before = folder(project / "mine", ("chosen", "rejected"), 2), (project / "params.yaml").read_text()
    with pytest.raises(SourceError, match=r"2 different prompts, and some must be kept to test with.*--test-list"):
        init(data, "tiny", "own", None, None)
    with pytest.raises(SourceError, match="nowhere is not there"):
        init(Path("nowhere"), "tiny", "own", None, None)
    with pytest.raises(SourceError, match="is no data that is known"):
        init(project / "params", "tiny", "own", None, None)
    with pytest.raises(ConfigError, match=r"there is no params/sd3.yaml; there are: .*sd15_12gb"):
        init(data, "sd3", "own", None, None)
    with pytest.raises(ConfigError, match=r"params/tiny.yaml is there already"):
        init(data, "tiny", "tiny", None, None)
    with pytest.raises(ConfigError, match="there is no ppo; there are alignprop, "):
        init(folder(project / "more", ("chosen", "rejected"), 5), "tiny", "own", ["ppo"], None)
    assert (project / "params.yaml").read_text() == before
    assert not (project / "params/own.yaml").exists()
