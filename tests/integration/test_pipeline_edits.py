"""What an edit makes `dvc repro` do: the stages that it concerns run, and no others.

In the project that all tests of the pipeline share; each test puts back what it has changed.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from clones import ADAPTER, METHODS, PROFILE, ROOT, RUNS, STAGES, tracked_runs
from ruamel.yaml import YAML

pytestmark = [pytest.mark.integration, pytest.mark.pipeline]

PROFILES = sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))


def after(run: str) -> set[str]:
    return {f"align@{run}", f"generate@{run}", f"evaluate@{run}", "report"}


@pytest.mark.parametrize("profile", PROFILES)
def test_dvc_reads_the_pipeline_with_every_profile(project, profile):
    text = project.params("profile", profile, "params.yaml")
    with project.changed("params.yaml", text):
        assert sorted(project.dvc("stage", "list", "--name-only").split()) == sorted(["plan", *STAGES])


def test_nothing_runs_when_nothing_has_changed(project):
    before = len(tracked_runs(project))
    assert project.repro(tracking="on") == []
    assert len(tracked_runs(project)) == before
    said = project.dvc("status")
    assert said.split() == ["plan:", "always", "changed"], "nothing of searches that nobody has asked for"


def test_a_comment_in_core_code_runs_the_plan_alone(project):
    source = "src/attune/training/loop.py"
    text = project.read(source).replace("for b in bar:", "for b in bar:  # one batch after the other\n")
    assert text != project.read(source)
    with project.changed(source, "# a comment\n" + text):
        assert project.repro() == []


def test_touching_the_view_runs_nothing(project):
    source = "src/attune/tracking/sender.py"
    with project.changed(source, project.read(source) + "\nUNUSED = 1\n"):
        assert project.repro() == []


def test_the_loss_of_dpo_concerns_dpo_alone(project):
    before = project.hashes()
    source = "src/attune/methods/dpo.py"
    text = project.read(source).replace("rejected_error).mean()", "rejected_error).mean() * 2.0")
    assert text != project.read(source)
    with project.changed(source, text):
        ran = project.repro()
        assert ran[0] == "align@dpo"
        assert set(ran) <= after("dpo")
        assert "report" in ran
    assert project.repro() == ["report"], "back again: restored from DVC's cache, not trained again"
    assert project.hashes() == before


def test_a_setting_of_spo_concerns_spo_alone(project):
    before = project.hashes()
    with project.changed(
        "params/short.yaml", project.params("methods.spo.beta", PROFILE["methods"]["spo"]["beta"] * 20)
    ):
        ran, now = project.repro(), project.hashes()
    assert ran[:2] == ["align@spo", "generate@spo"]
    assert set(ran) <= after("spo")
    changed = {path for path in now if now[path] != before[path]}
    assert "models/short/spo" in changed
    assert not [path for path in changed if any(f"/{run}" in path for run in RUNS if run != "spo")]
    assert project.repro() == ["report"]
    assert project.hashes() == before


def test_a_new_scorer_concerns_evaluation_alone(project):
    """PickScore a second time, with other weights: two of a kind stand side by side, each under its name."""
    before = project.hashes()
    block = {"scorer": "pickscore", **PROFILE["scorers"]["pickscore"], "path": "models/embedded/aesthetic"}
    with project.changed("params/short.yaml", project.params("scorers.other", block)):
        assert sorted(project.repro()) == sorted([*(f"evaluate@{run}" for run in RUNS), "report"])
        scores = json.loads(project.read("reports/short/summary.json"))["methods"]["dpo"]["scores"]
        assert scores["other"] != scores["pickscore"]
    project.repro()
    assert project.hashes() == before


def test_a_replaced_local_adapter_is_noticed(project):
    """A file outside of all that DVC watches, with a space in its name and an absolute path."""
    file = project.folder.parent / "adapters of mine" / "one.safetensors"
    file.parent.mkdir()
    shutil.copy(project.folder / "models/short/dpo" / ADAPTER, file)
    entry = {"from": str(file), "trained_on": ["pickscore"], "after": "data"}
    with project.changed("params.yaml", project.params("runs.mine", entry, "params.yaml")):
        assert sorted(project.side_by_side()) == sorted(after("mine"))
        images = [path.read_bytes() for path in sorted((project.folder / "data/short/generated/mine").glob("*.png"))]
        of_dpo = [path.read_bytes() for path in sorted((project.folder / "data/short/generated/dpo").glob("*.png"))]
        assert images == of_dpo
        methods = json.loads(project.read("reports/short/summary.json"))["methods"]
        assert methods["mine"]["trained_on"] == ["pickscore"]
        assert project.repro() == []
        shutil.copy(project.folder / "models/short/spo" / ADAPTER, file)
        assert {"generate@mine", "report"} <= set(project.repro()) <= after("mine")
    project.repro()


def test_a_pair_added_to_a_folder_elsewhere_is_noticed(project):
    """Own data outside of data/raw: what learns from pairs is trained again, and the base's images stay as they are."""
    own, kept = project.folder.parent / "own", project.folder.parent / "kept"
    shutil.copytree(project.folder / "data/short/generated/base", kept)  # as `dvc repro` will make fewer of them
    images = sorted(kept.glob("*.png"))
    for side, offset in (("chosen", 0), ("rejected", 1)):
        (own / side).mkdir(parents=True)
        for i in range(4):
            shutil.copy(images[i + offset], own / side / f"{i}.png")
    prompts = json.loads(project.read("reports/short/summary.json"))["methods"]["dpo"]["extremes"]["gained"]
    (own / "test.txt").write_text("a small red ring on a white background\na large red ring on a white background\n")
    for i in range(6):
        (own / f"{i}.txt").write_text(prompts[0]["prompt"])
    block = {"source": "folder", "path": str(own), "validation_share": 0, "test_share": 0, "score_with": ["pickscore"]}
    values = YAML(typ="safe").load(project.folder / "params/short.yaml")
    values["data"] = block | {"test_list": str(own / "test.txt")}
    values["generate"]["prompts"] = 2
    del values["search"]
    text = io.StringIO()
    YAML().dump(values, text)
    runs = project.params("runs", {"base": {"after": "data"}, "dpo": {"method": "dpo", "after": "data"}}, "params.yaml")
    with project.changed("params/short.yaml", text.getvalue()), project.changed("params.yaml", runs):
        assert {"prepare", "align@dpo", "report"} <= set(project.side_by_side())
        assert project.repro() == []
        for side in ("chosen", "rejected"):
            shutil.copy(images[5 if side == "chosen" else 6], own / side / "4.png")
        ran = project.repro()
        assert ran[0] == "prepare"
        assert {"align@dpo", "generate@dpo"} <= set(ran)
        assert "generate@base" not in ran, "its prompts have not changed"
    project.repro()


def test_a_mistake_stops_the_pipeline_at_once(project):
    before = project.hashes()
    with project.changed("params/short.yaml", project.params("seed", -1)):
        said = project.dvc("repro", fails=True)
        assert "params/short.yaml:seed: Input should be greater than or equal to 0" in said
        assert "Traceback" not in said
    assert project.repro() == []
    assert project.hashes() == before


NEW_SCORER = """
from attune.clip.pixels import check_images
from attune.config.settings import ScorerConfig


class Config(ScorerConfig):
    pass


class Scorer:
    differentiable = True
    license = "part of this repository"

    def __init__(self, config):
        self.expected_range = config.range_of_mean({})

    def __call__(self, images, prompts):
        check_images(images, prompts)
        return images.mean(dim=(1, 2, 3))


def load(config, device="cpu"):
    return Scorer(config)
"""
NEW_BASE = "from attune.backbones.sd import downloads, facts, load\n"
NEW_SOURCE = """
from attune.data.sources.world import FREE_PROMPTS, GIVES, Config, listed_prompts, needs_files, read, split_sizes
"""


def test_a_new_scorer_is_one_file_and_one_entry(project):
    before, file = project.hashes(), project.folder / "src/attune/rewards/brightness.py"
    file.write_text(NEW_SCORER)
    with project.changed("params/short.yaml", project.params("scorers.brightness", {})):
        assert sorted(project.repro()) == sorted([*(f"evaluate@{run}" for run in RUNS), "report"])
        mean = json.loads(project.read("reports/short/summary.json"))["methods"]["base"]["scores"]["brightness"]["mean"]
        assert 0 < mean < 1
    file.unlink()
    project.repro()
    assert project.hashes() == before


def test_a_new_base_model_and_a_new_source_are_one_file_and_one_entry_each(project):
    """As both do what others do under another name, everything runs again and nothing of the results changes."""
    before, prepared = project.hashes(), project.prepared()
    new = {"backbones/mine.py": NEW_BASE, "data/sources/ours.py": NEW_SOURCE}
    for name, text in new.items():
        (project.folder / "src/attune" / name).write_text(text)
    values = YAML(typ="safe").load(project.folder / "params/short.yaml")
    values["model"]["backbone"], values["data"]["source"] = "mine", "ours"
    text = io.StringIO()
    YAML().dump(values, text)
    with project.changed("params/short.yaml", text.getvalue()):
        assert {"prepare", "train_preference", *(f"align@{run}" for run in METHODS)} <= set(project.side_by_side())
        assert project.prepared() == prepared
        changed = {path for path, digest in project.hashes().items() if digest != before[path]} - {
            "data/short/prepared"
        }
        assert not [path for path in changed if path.startswith(("data/", "reports/short/scores"))]
    for name in new:
        (project.folder / "src/attune" / name).unlink()
    project.side_by_side()
    assert project.hashes() == before


NEW_METHOD = """
from pydantic import Field

from attune.config.settings import MethodConfig
from attune.diffusion import losses, process
from attune.distributed import Part


class Config(MethodConfig):
    strength: float = Field(1.0, description="factor of the loss")


class Method:
    consumes = "pairs"
    needs = ()

    def __init__(self, config, policy):
        self.config, self.policy, self.path = config, policy, policy.backbone.path

    def minibatches(self, batch, draws):
        yield Part((batch, *batch.draw_noise(self.path, draws)), draws.n)

    def loss(self, minibatch):
        batch, t, noise = minibatch
        x_t = process.add_noise(batch.chosen, noise, self.path.level(t, noise))
        target = self.path.target(batch.chosen, noise)
        loss = losses.denoising_error(self.policy.predict(x_t, t, batch.cond), target).mean()
        return self.config.strength * loss, {"loss": loss, "grain": x_t.std()}
"""


def test_a_new_method_is_one_file_and_one_entry(project):
    """Under a name of its own, going on from another run's model: DVC, MLflow and the report take it as it is.

    The last test of this file: DVC leaves what a stage made when the stage is gone.
    """
    (project.folder / "src/attune/methods/tilt.py").write_text(NEW_METHOD)
    before = project.hashes()
    settings = {"lora": PROFILE["methods"]["dpo"]["lora"], "lr": 3e-4, "batches": 3, "batch_size": 4, "strength": 2.0}
    for name, key, value in (
        ("params/short.yaml", "methods.tilted", settings),
        ("params.yaml", "runs.tilted", {"method": "tilt", "after": "dpo"}),
    ):
        (project.folder / name).write_text(project.params(key, value, name))
    assert sorted(project.repro(tracking="on")) == sorted(after("tilted"))

    now = project.hashes()
    compared = {out["path"] for out in project.lock()["report"]["outs"]}
    assert {path for path in before if now[path] != before[path]} <= compared
    new = {"models/short/tilted", "data/short/generated/tilted", "reports/short/scores/tilted.parquet"}
    assert new <= set(now) - set(before)
    adapters = {(project.folder / "models/short" / name / ADAPTER).read_bytes() for name in ("dpo", "tilted")}
    assert len(adapters) == 2
    trained = next(r for r in reversed(tracked_runs(project)) if r.data.tags["dvc.stage"] == "align@tilted")
    assert (trained.data.tags["method"], trained.data.tags["uses"]) == ("tilted", "tilt")
    assert trained.data.params["strength"] == "2"
    assert {"loss", "grain", "hpsv2"} <= set(trained.data.metrics)
    note = json.loads(project.read("models/short/tilted/run.json"))
    assert (note["method"], note["starts_from"], note["settings"]["strength"]) == ("tilt", "dpo", 2.0)
    assert "commit" not in note
    assert list(json.loads(project.read("reports/short/summary.json"))["methods"]) == [*RUNS, "tilted"]
    assert "tilted" in project.read("reports/short/report.md")
    assert "tilted" in project.read("reports/short/report.html")
    assert Path(project.folder / "plan/align-tilted.json").exists()
