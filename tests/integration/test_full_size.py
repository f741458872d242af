"""The profiles `sd15` and `sdxl` from end to end, on small random models in the layouts of the Hub.

The settings are the shipped ones; only locations and budgets are changed. Real parquet with real JPEG bytes, real
stages in their order, bfloat16 and gradient checkpointing as configured.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import params as files
import tiny
import tiny_scorers
from attune.evaluation.protocol import read_scores
from attune.paths import Paths
from attune.rewards._head import Head
from attune.stages import align, evaluate, generate, plan, prepare, report, train_preference

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SIDE = 16
ROWS = 20
RUNS = {
    "base": {"after": "data"},
    "sft": {"method": "sft", "after": "data"},
    "dpo": {"method": "dpo", "after": "data"},
    "spo": {"method": "spo", "after": "preference"},
    "spin_1": {"method": "spin", "after": "data"},
    "spin_2": {"method": "spin", "after": "spin_1"},
}
RELEASED = {"from": "released", "trained_on": ["pickscore"], "after": "data"}
RESULTS = [*RUNS, "released"]
TRAINED = [name for name, run in RUNS.items() if "method" in run]


@dataclass(frozen=True)
class Project:
    """A folder in which every stage has run."""

    folder: Path
    profile: str

    @property
    def data(self) -> Path:
        return self.folder / Paths(self.profile).data

    @property
    def models(self) -> Path:
        return self.folder / "models" / self.profile

    @property
    def reports(self) -> Path:
        return self.folder / Paths(self.profile).reports


def jpeg(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def write_pairs(file: Path) -> None:
    """Twenty rows with Pick-a-Pic's columns: a tie, a pair of two sizes, a row without label, one undecodable."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(ROWS):
        label = {3: 0.5}.get(i, float(i % 2))
        rows.append(
            {
                "caption": f"picture number {'abcdefghijklmnopqrst'[i]}",
                "jpg_0": jpeg(rng, (24, 32)),
                "jpg_1": b"no image" if i == 7 else jpeg(rng, (40, 24) if i == 5 else (24, 32)),
                "label_0": label,
                "label_1": 1 - label,
                "are_different": label != 0.5,
                "has_label": i != 11,
            }
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def write_scorers(folder: Path) -> dict[str, dict[str, Any]]:
    """Every published scorer's layout with small weights."""
    hps = str(ROOT / "models/embedded/hpsv2")
    clip = tiny.write_clip(folder / "clip")
    save_file(Head(8, widths=(8, 8, 4, 4, 1)).state_dict(), folder / "head.safetensors")
    return {
        "pickscore": {"path": clip, "hidden_act": "gelu"},
        "hpsv2": {"version": "2.1", "path": f"{hps}/open_clip_model.safetensors", "tokenizer": hps},
        "aesthetic": {"path": clip, "head": str(folder / "head.safetensors"), "hidden_act": "gelu"},
        "clipscore": {"model": "ViT-tiny/8@16", "path": clip, "hidden_act": "gelu"},
        "imagereward": tiny_scorers.block("imagereward", folder / "imagereward"),
    }


def shrunk(name: str, folder: Path) -> dict[str, Any]:
    """The shipped profile with other locations and smaller budgets."""
    _, profile = files.shipped(name)
    pipeline = (tiny.write_xl_pipeline if name == "sdxl" else tiny.write_pipeline)(folder / "pipeline")
    profile["model"]["path"] = pipeline
    if "vae" in profile["model"]:
        profile["model"]["vae"] = f"{pipeline}/vae"
    write_pairs(folder / "train.parquet")
    profile["data"] |= {"path": str(folder / "train.parquet"), "pairs": 16, "held_out_pairs": 4}
    profile["data"] |= {"validation_share": 0.3, "test_share": 0.3}
    scorers = write_scorers(folder)
    assert set(profile["scorers"]) == set(scorers)
    profile["scorers"] = scorers
    profile["preference"] |= {"clip": scorers["pickscore"]["path"], "tokenizer": None}
    methods = profile["methods"]
    for run in TRAINED:
        methods.setdefault(run, {})
    for block in (profile["preference"], *(methods[run] for run in TRAINED)):
        block |= {"batches": 2, "batch_size": 2, "accumulation": 1, "warmup": 0}
    methods["spo"] |= {"steps": 10, "start_step": 2, "threshold": 0.0, "lr": 1e-3}
    for run in ("spin_1", "spin_2"):
        methods[run]["steps"] = 2
    profile["generate"]["prompts"] = 2
    for search in profile["search"].values():
        search["prompts"] = 2
    return profile


def run_stage(module: ModuleType, *words: str) -> None:
    sys.argv = [module.__name__, *words]
    module.main()


def make_plan(folder: Path, params: dict[str, Any], profile: dict[str, Any]) -> None:
    """Writes the parameter files and runs the stage that plans them."""
    files.write(folder, params, profile)
    run_stage(plan)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def project(request, tmp_path_factory):
    """A folder in which every stage has run; what is released is the model of a first training of spo."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    profile = shrunk(name, folder)
    params = {"profile": name, "runs": RUNS, "tracking": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [])
        make_plan(folder, params, profile)
        run_stage(prepare)
        run_stage(train_preference)
        run_stage(align, "--run", "spo")
        Paths(name).model("spo").rename("released")
        make_plan(folder, params | {"runs": {**RUNS, "released": RELEASED}}, profile)
        for stage in (align, generate, evaluate):
            for run in RESULTS:
                run_stage(stage, "--run", run)
        run_stage(report)
    return Project(folder, name)


def test_every_row_is_used_or_named(project):
    quarantine = pd.read_csv(project.data / "quarantine.csv")
    pairs = pd.read_parquet(project.data / "prepared/pairs.parquet")
    assert sorted(quarantine.row) == [7, 11]
    assert len(pairs) + len(quarantine) == ROWS
    assert (pairs.label_0 == 0.5).sum() == 1
    counts = json.loads((project.reports / "data.json").read_text())
    assert counts["mixed_sizes"] == 1
    assert counts["quarantined"] == 2


def test_sdxl_is_relabelled_by_pickscore_and_sd15_by_people(project):
    pairs = pd.read_parquet(project.data / "prepared/pairs.parquet")
    assert ("pickscore_0" in pairs.columns) is (project.profile == "sdxl")


def test_all_models_are_scored_by_all_scorers_under_one_protocol(project):
    read = {name: read_scores(project.reports / f"scores/{name}.parquet") for name in RESULTS}
    protocols = {protocol for _, protocol in read.values()}
    assert len(protocols) == 1
    assert set(protocols.pop().scorer_names) == set(files.shipped(project.profile)[1]["scorers"])
    assert all(np.isfinite(frame.select_dtypes("number")).all(axis=None) for frame, _ in read.values())


def test_every_method_changed_the_pictures_and_a_released_adapter_generates_as_our_own(project):
    def pictures(name: str) -> np.ndarray:
        files = sorted((project.data / "generated" / name).glob("*.png"))
        return np.stack([np.asarray(Image.open(file)) for file in files])

    base = pictures("base")
    assert base.shape == (2, SIDE, SIDE, 3)
    assert not np.array_equal(pictures("spo"), base)
    assert np.array_equal(pictures("released"), pictures("spo"))  # training twice gave the same bits


def test_what_was_learnt_is_in_diffusers_layout(project):
    lora = load_file(project.models / "spo/pytorch_lora_weights.safetensors")
    assert all(name.startswith("unet.") for name in lora)
    assert any(value.abs().sum() > 0 for name, value in lora.items() if ".up." in name or "lora_B" in name)
    plan = json.loads((project.folder / "plan/align-dpo.json").read_text())
    full = (project.models / "dpo/unet/config.json").exists()
    assert full is (plan["method"]["settings"]["lora"] is None)
    assert full is (project.profile == "sd15")  # the paper trains all weights of SD 1.5


def test_preference_losses_start_at_ln_2(project):
    for name in ("dpo", "spo", "spin_1", "spin_2"):
        history = pd.read_csv(project.reports / f"train/{name}.csv")
        assert history.loss[0] == pytest.approx(np.log(2), abs=1e-6)
        assert (history.grad_norm > 0).all()


def test_the_second_iteration_of_spin_went_on_from_the_first(project):
    """Of all weights in sd15, of an adapter in sdxl; two small steps away from it."""
    facts = json.loads((project.reports / "train/spin_2.json").read_text())
    assert facts["start"] == f"models/{project.profile}/spin_1"
    files = [next((project.models / name).rglob("*.safetensors")) for name in ("spin_1", "spin_2")]
    first, second = map(load_file, files)
    steps = {name: (second[name] - value).abs().max() for name, value in first.items()}
    assert 0 < max(steps.values()) < 1e-4  # Adam moves a weight by its rate, 2e-5 and then half of it, and a hair more


def test_the_preference_model_is_the_released_layout(project):
    tensors = load_file(project.models / "preference/model.safetensors")
    assert all(name.startswith("model.") for name in tensors)
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_the_report_shows_the_released_adapter_too(project):
    summary = json.loads((project.reports / "summary.json").read_text())
    assert list(summary["methods"]) == RESULTS
