"""The whole pipeline, as a user runs it: a fresh clone, `make repro`, and what changes afterwards.

One `attune repro` of the `short` profile serves all tests (a fixture); the tests that change the project put it
back. Nothing is replaced by a stand-in: real DVC, MLflow, models and training.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from clones import ADAPTER, METHODS, PROFILE, PROMPTS, RUNS, SCORERS, STAGES, Project, tracked_runs
from PIL import Image

from attune.diffusion.noise import noise_seed
from attune.evaluation.protocol import Protocol, hash_prompts, read_scores
from attune.evaluation.summary import Summary

pytestmark = [pytest.mark.integration, pytest.mark.pipeline]


# --- what one run leaves behind ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_an_adapter_a_curve_and_a_summary(project, method):
    from safetensors.numpy import load_file

    weights = load_file(project.folder / "models/short" / method / ADAPTER)
    assert all(name.startswith("unet.") for name in weights)
    assert all(np.isfinite(value).all() for value in weights.values())
    up = [value for name, value in weights.items() if "lora.up" in name or "lora_B" in name]
    assert up
    assert all(value.any() for value in up), "B starts at zero: it has learned"
    curve = pd.read_csv(project.folder / f"reports/short/train/{method}.csv")
    facts = json.loads(project.read(f"reports/short/train/{method}.json"))
    assert facts["steps"] == len(curve) >= PROFILE["methods"][method]["batches"]
    assert {"step", "loss", "grad_norm", "lr"} <= set(curve.columns)
    assert (curve.grad_norm > 0).all()
    if "margin" in curve:
        assert curve.loss[0] == pytest.approx(math.log(2), abs=1e-5), "ln 2 while policy == reference"


def test_methods_leave_different_adapters(project):
    contents = {(project.folder / "models/short" / method / ADAPTER).read_bytes() for method in METHODS}
    assert len(contents) == len(METHODS)


def test_the_preference_model_is_there_with_its_accuracy(project):
    files = {path.name for path in (project.folder / "models/short/preference").iterdir()}
    assert any(name.endswith(".safetensors") for name in files)
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    accuracy = json.loads(project.read("reports/short/train/preference.json"))["accuracy_by_t"]
    assert set(accuracy) == {"spm", "untimed"}
    for curve in accuracy.values():
        assert len(curve["t"]) == len(curve["accuracy"]) == len(curve["ci95"]) > 1
        assert all(low <= a <= high for (low, high), a in zip(curve["ci95"], curve["accuracy"], strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_every_model_has_a_row_of_scores_per_prompt(project, name):
    frame, protocol = read_scores(project.folder / f"reports/short/scores/{name}.parquet")
    assert len(frame) == frame.prompt.nunique() == PROMPTS
    assert set(SCORERS) <= set(frame.columns)
    assert protocol.scorer_names == tuple(sorted(SCORERS))
    assert protocol.prompt_set_sha == hash_prompts(frame.prompt)
    for scorer in SCORERS:
        assert np.isfinite(frame[scorer]).all()
        assert frame[scorer].nunique() > 1, f"{scorer} gives every image the same score"
    for file in frame.file:
        with Image.open(project.folder / "data/short/generated" / name / file) as image:
            assert image.size == (protocol.resolution, protocol.resolution)
    assert len(np.load(project.folder / f"reports/short/features/{name}.npy")) == PROMPTS


def test_all_models_were_asked_the_same_held_out_prompts(project):
    asked = {name: read_scores(project.folder / f"reports/short/scores/{name}.parquet")[0] for name in RUNS}
    table = pd.read_parquet(project.folder / "data/short/prepared/prompts.parquet")
    held_out = table.prompt[table.split == "test"].head(PROMPTS).tolist()
    assert not set(held_out) & set(table.prompt[table.split != "test"])
    for frame in asked.values():
        assert frame.prompt.tolist() == held_out
    for method in METHODS:
        tuned, base = (
            np.stack([np.asarray(Image.open(project.folder / "data/short/generated" / n / f)) for f in asked[n].file])
            for n in (method, "base")
        )
        difference = np.abs(tuned.astype(int) - base)
        assert difference.max() > 0, f"{method} generates exactly what base generates"
        assert difference.mean() < 40, "a few training steps from the same noise: still nearly the same picture"


def test_the_summary_has_the_published_schema(project):
    summary = json.loads(project.read("reports/short/summary.json"), parse_constant=pytest.fail)
    assert {"protocol", "n_prompts", "methods"} <= set(summary)
    assert summary["n_prompts"] == PROMPTS == Protocol.from_dict(summary["protocol"]).n_prompts
    assert list(summary["methods"]) == RUNS
    tables = {n: read_scores(project.folder / f"reports/short/scores/{n}.parquet")[0] for n in summary["methods"]}
    for name, entry in summary["methods"].items():
        assert set(SCORERS) <= set(entry["scores"])
        assert set(entry["vs_base"]) == (set() if name == "base" else set(entry["scores"]))
        for scorer in SCORERS:
            column = tables[name][scorer]
            assert set(entry["scores"][scorer]) == {"mean", "median", "sd"}
            assert entry["scores"][scorer]["mean"] == pytest.approx(column.mean())
            assert entry["scores"][scorer]["median"] == pytest.approx(column.median())
            if name != "base":
                check_comparison(entry["vs_base"][scorer], column, tables["base"][scorer])


def check_comparison(entry: dict[str, Any], policy: pd.Series, base: pd.Series) -> None:
    assert {"win_rate", "ci95", "p_value"} <= set(entry)
    low, high = entry["ci95"]
    assert 0 <= low <= entry["win_rate"] <= high <= 1
    assert 0 <= entry["p_value"] <= 1
    wins = ((policy > base) + 0.5 * (policy == base)).mean()
    assert entry["win_rate"] == pytest.approx(wins), "paired, ties half"


def test_the_summary_says_who_was_trained_on_what(project):
    methods = json.loads(project.read("reports/short/summary.json"))["methods"]
    for name in METHODS:
        recorded = json.loads(project.read(f"reports/short/train/{name}.json"))["trained_on"]
        assert methods[name]["trained_on"] == recorded
        assert set(recorded) <= set(SCORERS)
        assert {"vendi", "pairwise_distance", "saturation", "high_frequency", "cmmd"} <= set(methods[name]["signs"])
        assert methods[name]["signs"]["cmmd"]["value"] >= 0
        assert methods[name]["hacking"]["word"] in ("none", "suspect", "hacked")


def test_the_report_is_written_for_people(project):
    text, page = project.read("reports/short/report.md"), project.read("reports/short/report.html")
    sha = Protocol.from_dict(json.loads(project.read("reports/short/summary.json"))["protocol"]).sha
    for word in ["base", *METHODS, *SCORERS, sha]:
        assert word in text
        assert word in page
    pictures = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert pictures
    for picture in pictures:
        with Image.open(project.folder / "reports/short" / picture) as image:
            assert min(image.size) > 100
    assert "data:image/webp;base64," in page
    assert not re.search(r"(src|href)=.https?://", page), "it is read offline"


def test_git_is_left_with_small_files_only(project):
    new = project.run("git", "ls-files", "--others", "--exclude-standard").split()
    assert {"dvc.lock", "reports/short/summary.json", "reports/short/report.md"} <= set(new)
    assert not [name for name in new if name.endswith((".safetensors", ".parquet", ".db", ".npy", ".lock~"))]
    sizes = {name: (project.folder / name).stat().st_size for name in new}
    assert max(sizes.values()) < 1_000_000, sizes
    assert sum(sizes.values()) < 3_000_000, sizes
    changed = project.run("git", "diff", "--name-only").split()
    assert changed == [], "no stage edits a tracked file"
    kept = project.folder / ".checkpoints"
    folders = {path.name for path in kept.iterdir() if path.is_dir()}
    left = folders - {"runs", "tracking", "costs", "logs", "scores"}
    assert not left, "checkpoints and shards are removed on success"
    assert list(kept.rglob("records.jsonl")) == [], "all that was tracked has been sent"


# --- MLflow -----------------------------------------------------------------------------------------------


def first_repro(project: Project) -> tuple[Any, dict[str, Any]]:
    """The oldest pipeline run, and its children by stage."""
    runs = tracked_runs(project)
    parent = next(run for run in runs if run.data.tags["kind"] == "pipeline")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    by_stage = {run.data.tags["dvc.stage"]: run for run in children}
    assert len(by_stage) == len(children)
    return parent, by_stage


def test_mlflow_shows_one_parent_with_a_child_per_stage(project):
    parent, children = first_repro(project)
    assert sorted(children) == sorted(STAGES)
    assert all(run.info.status == "FINISHED" for run in [parent, *children.values()])
    assert all(run.data.tags["profile"] == "short" for run in children.values())
    assert all(run.data.tags["git.dirty"] == "false" for run in children.values())
    assert not list((project.folder / ".checkpoints/tracking").glob("*/records.jsonl"))  # all of it has been sent
    orphans = [
        r for r in tracked_runs(project) if r.data.tags["kind"] == "stage" and "mlflow.parentRunId" not in r.data.tags
    ]
    assert not orphans


def test_the_pipelines_run_says_how_it_went(project):
    """Its duration, a metric per run and stage, the report, and a description that the UI shows on its first pages."""
    parent, children = first_repro(project)
    ends = [run.info.end_time for run in children.values()]
    assert parent.info.end_time == max(ends)
    assert parent.info.start_time <= min(run.info.start_time for run in children.values())
    summary = Summary.from_json(project.read("reports/short/summary.json"))
    scorer = summary.headline
    for name, method in summary.methods.items():
        assert parent.data.metrics[f"{scorer}/{name}"] == pytest.approx(method.scores[scorer].mean)
    gains = {name: method.vs_base[scorer].difference for name, method in summary.tuned.items()}
    for name, gain in gains.items():
        assert parent.data.metrics[f"{scorer} above base/{name}"] == pytest.approx(gain)
        assert f"| {name} | " in parent.data.tags["mlflow.note.content"]
    assert parent.data.metrics["best"] == pytest.approx(max(gains.values()))
    seconds = json.loads(project.read(".checkpoints/seconds.json"))
    assert {key.removeprefix("seconds/").replace(" ", "@") for key in parent.data.metrics if "seconds/" in key} == set(
        STAGES
    )
    assert set(seconds) >= set(STAGES)
    best = max(gains, key=gains.get)
    assert parent.info.run_name.startswith(f"{best} {gains[best]:+.2g} {scorer}, ")
    left = [path.name for path in Path(parent.info.artifact_uri.removeprefix("file://")).iterdir()]
    assert {"report.html", "report.md", "images"} <= set(left)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_run_holds_its_parameters_curve_and_scores(project, method):
    run = first_repro(project)[1][f"align@{method}"]
    assert float(run.data.params["lr"]) == PROFILE["methods"][method]["lr"]
    curve = pd.read_csv(project.folder / f"reports/short/train/{method}.csv")
    assert run.data.metrics["grad_norm"] == pytest.approx(curve.grad_norm.iloc[-1], rel=1e-4)
    means = json.loads(project.read("reports/short/summary.json"))["methods"][method]["scores"]
    for scorer in SCORERS:
        assert run.data.metrics[scorer] == pytest.approx(means[scorer]["mean"])
    artifacts = [path.name for path in Path(run.info.artifact_uri.removeprefix("file://")).rglob("*")]
    assert ADAPTER in artifacts


# --- the code the plan knows -------------------------------------------------------------------------------


# what is no part of the work: settings, which are in the plan, views, and where an earlier output is looked for
NAMES = ("tracking", "config", "costs", "text", "last_output", "copies", "planning", "stages.preloaded")
VIEW = tuple(f"attune.{name}" for name in NAMES)


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_a_stage_really_loaded_is_in_its_plan(project, stage):
    """The plan finds modules by their imports; the interpreter says what was loaded."""
    name = stage.replace("@", "-").replace("train_preference", "preference")
    known = set(json.loads(project.read(f"plan/{name}.json"))["code"])
    files = (Path(line).relative_to("src") for line in (project.loaded / stage).read_text().splitlines())
    modules = {".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files}
    view = {m for m in modules if m.startswith(VIEW)}
    if stage.startswith("align@"):  # sample images for the tracking UI, and the model card
        view |= {m for m in modules if m.startswith(("attune.evaluation", "attune.sharing", "attune.licenses"))}
    if stage == "align@base":  # the settings import it, and nothing is fetched where nothing is trained
        view.add("attune.hub")
    assert modules - view <= known


# --- the adapter outside of attune ------------------------------------------------------------------------

PLAIN_DIFFUSERS = """
import json, sys
import numpy as np, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

torch.set_num_threads(1)
job = json.load(open(sys.argv[1]))
pipe = StableDiffusionPipeline.from_pretrained("models/embedded/base", torch_dtype=torch.float32)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in job["seeds"]]

def generate():
    return pipe(job["prompts"], latents=torch.stack(noise), num_inference_steps=job["steps"], eta=0.0,
                guidance_scale=job["guidance_scale"], output_type="np").images

before = generate()
pipe.load_lora_weights(job["adapter"])
tuned = generate()
pipe.unload_lora_weights()
np.savez(sys.argv[2], before=before, tuned=tuned, after=generate())
assert not [name for name in sys.modules if name.split(".")[0] == "attune"]
"""


@pytest.fixture(scope="module")
def by_diffusers(project, tmp_path_factory) -> dict[str, np.ndarray]:
    """The held-out images of base, of spo's adapter, and of base again, generated by diffusers alone."""
    folder = tmp_path_factory.mktemp("diffusers")
    index, sampling = (
        pd.read_parquet(project.folder / "data/short/generated/spo/index.parquet"),
        PROFILE["generate"]["sampling"],
    )
    job = {
        "adapter": "models/short/spo",
        "prompts": index.prompt.tolist(),
        "seeds": [noise_seed(p, int(o), PROFILE["seed"]) for p, o in zip(index.prompt, index.ordinal, strict=True)],
        "steps": sampling["steps"],
        "guidance_scale": sampling["guidance_scale"],
    }
    (folder / "job.json").write_text(json.dumps(job))
    project.run(sys.executable, "-c", PLAIN_DIFFUSERS, str(folder / "job.json"), str(folder / "out.npz"))
    return dict(np.load(folder / "out.npz"))


def ours(project: Project, name: str) -> np.ndarray:
    files = sorted((project.folder / "data/short/generated" / name).glob("*.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files]) / 255


def test_the_adapter_changes_plain_diffusers_and_comes_off_again(by_diffusers):
    assert np.abs(by_diffusers["tuned"] - by_diffusers["before"]).max() > 1e-3
    assert np.abs(by_diffusers["after"] - by_diffusers["before"]).max() < 1e-5


def test_plain_diffusers_generates_what_attune_generated(by_diffusers, project):
    """Same prompts and noise: the published file means the same to diffusers as to us."""
    for theirs, name in (("before", "base"), ("tuned", "spo")):
        difference = np.abs(by_diffusers[theirs] - ours(project, name))
        assert difference.max() < 2 / 255, f"{name}: off by {difference.max() * 255:.1f} of 255"
    assert np.abs(by_diffusers["before"] - ours(project, "spo")).max() > 2 / 255, "the test can tell them apart"
