"""plan, prepare, train_preference, align and generate by their own `main`: what they write is what they should."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import stages
from attune.build import load_policy, load_scorer
from attune.config import plugins
from attune.config.plan import GeneratePlan, PreferencePlan, PreparePlan, RunPlan, read
from attune.data import manifest
from attune.data.rows import Pair, Prompt, Quota
from attune.data.store import PreparedData
from attune.diffusion.generate import generate_images
from attune.evaluation.protocol import hash_prompts
from attune.files import digest
from attune.finetune import finetune, inputs_of
from attune.spm.model import from_clip, training_pixels
from attune.spm.model import load as load_preference
from attune.stages.common import checkpoint_of
from attune.tracking import Run

RUNS = {
    "base": {"after": "data"},
    "sft": {"method": "sft", "after": "data"},
    "spo": {"method": "spo", "after": "preference"},
    "again": {"method": "sft", "after": "sft"},
}
RELEASED = {"copy": {"from": "released/pytorch_lora_weights.safetensors", "after": "data"}}
SETTINGS = {"methods__again": {"lora": {"rank": 8, "targets": "all"}, "lr": 1e-4, "batches": 2, "batch_size": 2}}
SETTINGS["methods__again"]["accumulation"] = 1
PREPARED, MODELS, REPORTS = Path("data/short/prepared"), Path("models/short"), Path("reports/short")
ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project after plan, prepare, train_preference and every align; no test changes it.

    The model of one run is then released, and another run takes it from there.
    """
    folder = stages.write(tmp_path_factory.mktemp("made"), RUNS, **SETTINGS)
    with stages.inside(folder):
        stages.call("plan")
        stages.call("prepare")
        stages.call("train_preference")
        for run in RUNS:
            stages.call("align", run=run)
        (folder / "released").mkdir()
        shutil.copy(MODELS / "sft" / ADAPTER, folder / "released")
        stages.write(folder, RUNS | RELEASED, **SETTINGS)
        stages.call("plan")
        stages.call("align", run="copy")
    return folder


def pixels(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


# ---------------------------------------------------------------- plan


def test_a_plan_of_every_stage_and_none_of_a_run_that_is_gone(mine):
    names = {file.stem for file in Path("plan").glob("*.json")}
    per_run = {f"{stage}-{run}" for stage in ("align", "generate", "evaluate", "sweep") for run in RUNS | RELEASED}
    assert names == {"prepare", "preference", "report", "session"} | per_run
    written = Path("plan/prepare.json").stat().st_mtime_ns
    stages.write(mine, {name: run for name, run in RUNS.items() if name != "again"})
    stages.call("plan")
    assert not list(Path("plan").glob("*-again.json"))
    assert Path("plan/prepare.json").stat().st_mtime_ns == written  # one that stays the same is not written again


def test_the_plan_holds_what_the_stage_reads(here):
    plan = read(RunPlan, "align", "again")
    assert (plan.after, plan.released, plan.needs_preference, plan.seed) == ("sft", None, False, 0)
    assert plan.method.config.lr == 1e-4
    assert read(RunPlan, "align", "spo").needs_preference
    assert read(GeneratePlan, "generate", "spo").generate.images_per_prompt == 2
    assert read(PreferencePlan, "preference").settings["batches"] == 3


# ---------------------------------------------------------------- prepare


@pytest.fixture(scope="module")
def source(made):
    """The rows of the source, asked again, and the base that generated them."""
    with stages.inside(made):
        plan = read(PreparePlan, "prepare")
        policy = load_policy(plan.model)

        def generate(prompts, ordinals, desc):
            return generate_images(policy, prompts, ordinals, plan.sampling, plan.seed, None)

        rows = plugins.load("sources", "world").read(plan.source.config, plan.seed, generate, Quota())
        return list(rows), policy, plan


def test_the_store_holds_the_sources_prompts_and_their_encodings(here, source):
    rows, policy, _ = source
    wanted = [(row.prompt, row.split) for row in rows if isinstance(row, Prompt)]
    table = pd.read_parquet(PREPARED / "prompts.parquet")
    assert list(zip(table.prompt, table.split, strict=True)) == wanted
    assert pd.read_parquet(PREPARED / "test_prompts.parquet").prompt.tolist() == [p for p, s in wanted if s == "test"]
    encoded = manifest.read(PREPARED)["prompts"]
    for name, value in policy.backbone.encode_prompts([p for p, _ in wanted]).tensors.items():
        stored = manifest.rows_of(PREPARED, encoded, name).tensor()
        torch.testing.assert_close(stored, value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_store_holds_the_sources_pairs_their_latents_and_scores(here, source, split):
    rows, policy, plan = source
    wanted = [row for row in rows if isinstance(row, Pair) and row.split == split]
    data = PreparedData.read(PREPARED, split, keep_ties=True)
    assert data.pairs.prompt.tolist() == [row.prompt for row in wanted]
    assert data.pairs.label_0.tolist() == [row.label_0 for row in wanted]
    assert data.pairs.utility_0.tolist() == [row.extra["utility_0"] for row in wanted]
    scorer = load_scorer(plan.score_with["pickscore"])
    batch = data.pair_batch(range(len(wanted)))
    for side, latents in (("0", batch.latents_0), ("1", batch.latents_1)):
        images = pixels(np.stack([getattr(row, f"image_{side}") for row in wanted]))
        torch.testing.assert_close(latents, policy.backbone.encode_images(images), atol=1e-4, rtol=1e-4)
        expected = scorer(images, [row.prompt for row in wanted])
        torch.testing.assert_close(torch.tensor(data.pairs[f"pickscore_{side}"].to_numpy()).float(), expected)


def test_what_was_prepared_is_counted(here):
    """6 + 4 + 5 prompts; the 4 + 4 that have images have two each, which make one pair."""
    counts = json.loads((REPORTS / "data.json").read_text())
    assert counts == json.loads((MODELS / "data/data.json").read_text())
    assert {key: counts[key] for key in counts if not key.startswith("quarantined")} == {
        **{"prompts": 15, "prompts/train": 6, "prompts/validation": 4, "prompts/test": 5},
        **{"pairs": 8, "pairs/train": 4, "pairs/validation": 4, "pairs/test": 0},
        **{"choices/train": 4, "tie_share": 0.0, "mixed_sizes": 0, "identical_images": 0, "cut_prompts": 0},
    }


# ---------------------------------------------------------------- train_preference


def test_the_preference_model_is_trained_and_its_accuracy_is_that_of_the_saved_file(here):
    """Of true images, t = 0: the share of validation pairs whose image of higher utility scores higher."""
    plan = read(PreferencePlan, "preference")
    facts = json.loads((REPORTS / "train/preference.json").read_text())
    curve = pd.read_csv(REPORTS / "train/preference.csv")
    assert curve.batch.tolist() == [0, 1, 2]
    assert facts["steps"] == 3
    data, backbone = PreparedData.read(PREPARED, "validation"), load_policy(plan.model).backbone
    batch = data.pair_batch(range(len(data.pairs)))
    better = data.pairs.utility_0.to_numpy() > data.pairs.utility_1.to_numpy()
    trained, _ = load_preference(MODELS / "preference")
    start = dict(from_clip(plan.settings["clip"])[0].named_parameters())
    moved = {name: (weight - start[name]).abs().max().item() for name, weight in trained.named_parameters()}
    assert sum(0 < by < 3 * 3e-4 * 1.1 for by in moved.values()) > 0.9 * len(moved)  # three steps of AdamW at 3e-4
    ids = CLIPTokenizer.from_pretrained(MODELS / "preference")
    length = trained.model.config.text_config.max_position_embeddings
    tokens = ids(batch.prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    size = trained.model.config.vision_config.image_size
    images = torch.stack(
        [training_pixels(backbone.decode_latents(x), size) for x in (batch.latents_0, batch.latents_1)]
    )
    with torch.no_grad():
        first, second = trained(images, tokens, torch.zeros(len(tokens), dtype=torch.long))
    right = (first > second).numpy() == better
    accuracy = facts["accuracy_by_t"]["spm"]
    assert accuracy["t"][0] == 0
    assert accuracy["accuracy"][0] == pytest.approx(right.mean())


def test_without_a_run_that_needs_it_no_preference_model_is_trained(mine):
    shutil.rmtree(MODELS / "preference")
    stages.write(mine, {"base": {"after": "data"}, "sft": {"method": "sft", "after": "data"}})
    stages.write_plans()
    stages.call("train_preference")
    assert [file.name for file in (MODELS / "preference").iterdir()] == ["README"]
    assert json.loads((REPORTS / "train/preference.json").read_text()) == {
        "steps": 0,
        "accuracy_by_t": {},
        "last_tenth": {},
    }


# ---------------------------------------------------------------- align


@pytest.mark.parametrize("run", ["sft", "spo", "again"])
def test_the_adapter_and_the_curve_are_finetunes(here, tmp_path, run):
    plan = read(RunPlan, "align", run)
    history, facts = finetune(plan, Run(), tmp_path)
    ours, again = load_file(MODELS / run / ADAPTER), load_file(tmp_path / ADAPTER)
    assert ours.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in ours.items())
    curve = pd.read_csv(REPORTS / f"train/{run}.csv")
    pd.testing.assert_frame_equal(curve, pd.DataFrame(history), rtol=1e-5, check_dtype=False)
    noted = json.loads((REPORTS / f"train/{run}.json").read_text())
    assert noted["steps"] == len(history)
    assert {key: noted[key] for key in facts} == facts
    assert noted["last_tenth"]["loss"] == pytest.approx(history[-1]["loss"], rel=1e-4)


def test_a_note_lies_beside_every_model(here):
    notes = {run: json.loads((MODELS / run / "run.json").read_text()) for run in RUNS | RELEASED}
    assert {run: note["method"] for run, note in notes.items()} == {
        **{"base": None, "sft": "sft", "spo": "spo", "again": "sft", "copy": None}
    }
    assert {run: note["starts_from"] for run, note in notes.items() if note["starts_from"]} == {"again": "sft"}
    assert {run: note["from"] for run, note in notes.items() if note["from"]} == {"copy": RELEASED["copy"]["from"]}
    assert notes["again"]["settings"]["lr"] == 1e-4
    assert notes["spo"]["trained_on"] == ["pickscore"]  # whose CLIP the preference model started from
    assert {note["seed"] for note in notes.values()} == {0}
    assert {note["profile"] for note in notes.values()} == {"short"}
    facts = {run: json.loads((REPORTS / f"train/{run}.json").read_text()) for run in RUNS}
    assert facts["again"]["start"] == "models/short/sft"
    assert facts["sft"]["start"] is None
    assert (facts["base"]["steps"], facts["base"]["last_tenth"]) == (0, {})


def test_checkpoints_are_removed_when_a_training_has_succeeded(here):
    assert not [path for path in Path(".checkpoints").glob("*align*")]


def validated(folder, **validation):
    """The facts of sft trained with a validation, and whether its curve is that of one without."""
    sampling = {"steps": 2, "eta": 0, "guidance_scale": 1, "batch_size": 2}
    block = {"scorer": "hpsv2", "prompts": 3, "sampling": sampling, "every": 2} | validation
    lr = block.pop("lr", 3e-4)
    stages.write(folder, RUNS, **SETTINGS, methods__sft__validation=block, methods__sft__lr=lr)
    stages.write_plans()
    stages.call("align", run="sft")
    return json.loads((REPORTS / "train/sft.json").read_text())


def test_a_validation_score_is_the_mean_of_the_scorer_on_the_first_validation_prompts(mine):
    """Three batches, every second one scored, before and after: 0, 2 and 3. The last is of the saved adapter."""
    curve = (REPORTS / "train/sft.csv").read_text()
    facts = validated(mine)
    assert facts["validation"]["scorer"] == "hpsv2"
    scores = facts["validation"]["scores"]
    assert [(row["batch"], row["step"]) for row in scores] == [(0, 0), (2, 2), (3, 3)]
    assert (REPORTS / "train/sft.csv").read_text() == curve  # watching a training does not change it
    plan = read(RunPlan, "align", "sft")
    table = pd.read_parquet(PREPARED / "prompts.parquet")
    prompts = table.prompt[table.split == "validation"].tolist()[:3]
    scorer, sampling = load_scorer(plan.scorers["hpsv2"]), plan.method.config.validation.sampling
    for policy, score in ((load_policy(plan.model), scores[0]), (load_policy(plan.model), scores[2])):
        if score["batch"]:
            policy.load(MODELS / "sft")
        images = pixels(generate_images(policy, prompts, [0] * 3, sampling, plan.seed, None))
        assert score["score"] == pytest.approx(scorer(images, prompts).mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"every": 1, "at_start_and_end": False}, [1, 2]),
        ({"every": 5}, [0, 3]),
        ({"every": 5, "at_start_and_end": False}, []),
        ({"every": 1, "patience": 1, "lr": 1e-12}, [0, 1]),  # nothing moves: the second score is no new best
    ],
    ids=str,
)
def test_when_validation_scores_are_taken_and_end_a_training(mine, options, batches):
    facts = validated(mine, **options)
    assert [row["batch"] for row in facts["validation"]["scores"]] == batches
    assert facts["steps"] == (1 if "patience" in options else 3)


def test_another_validation_scorer_does_not_go_on_from_a_checkpoint(mine, monkeypatch):
    """A training that breaks off leaves a folder named by all that it depends on, the scorer's settings among them."""

    def broken(batch, score):
        raise KeyError("stop")

    left = []
    for resize in ("hps", "square", "hps"):
        validation = {"scorer": "hpsv2", "prompts": 2, "every": 1, "sampling": stages.PROFILE["sampling"]}
        stages.write(mine, RUNS, **SETTINGS, scorers__hpsv2__preprocess=resize, methods__sft__validation=validation)
        stages.write_plans()
        plan = read(RunPlan, "align", "sft")
        kept = checkpoint_of("align@sft", plan, inputs_of(plan))
        with pytest.raises(KeyError, match="stop"), kept as checkpoint:
            finetune(plan, Run(), mine / "x", checkpoint=checkpoint, on_score=broken)
        left.append({path.name for path in Path(".checkpoints").glob("*align*") if path.is_dir()})
    assert [len(names) for names in left] == [1, 2, 2]


# ---------------------------------------------------------------- generate


@pytest.fixture(scope="module")
def generated(made):
    with stages.inside(made):
        for run in ("base", "sft", "copy", "again"):
            stages.call("generate", run=run)
    return made / "data/short/generated"


def images_of(folder):
    index = pd.read_parquet(folder / "index.parquet")
    return index, np.stack([np.asarray(Image.open(folder / file)) for file in index.file])


def test_the_index_has_the_first_test_prompts_with_every_ordinal(generated, made):
    index, images = images_of(generated / "base")
    test = pd.read_parquet(made / PREPARED / "test_prompts.parquet").prompt.tolist()
    assert index.prompt.tolist() == [prompt for prompt in test[:4] for _ in range(2)]
    assert index.ordinal.tolist() == [0, 1] * 4
    assert index.file.tolist() == [f"{i:05d}.png" for i in range(8)]
    assert images.shape == (8, 32, 32, 3)


@pytest.mark.parametrize("run", ["base", "sft", "again"])
def test_every_image_is_that_of_its_prompt_ordinal_and_model_alone(generated, made, run):
    """Generated one by one, by the adapter that was saved; the stage generates three at a time."""
    index, images = images_of(generated / run)
    with stages.inside(made):
        plan = read(GeneratePlan, "generate", run)
        policy = load_policy(plan.model)
        if run != "base":
            policy.load(MODELS / run)
        for row in (0, 3, 7):
            prompt, ordinal = index.prompt[row], int(index.ordinal[row])
            own = generate_images(policy, [prompt], [ordinal], plan.generate.sampling, plan.seed, None)[0]
            assert np.abs(own.astype(int) - images[row]).max() <= 1  # rounding to 8 bits


def test_models_differ_and_a_released_model_is_the_one_it_was_copied_from(generated):
    found = {run: images_of(generated / run)[1] for run in ("base", "sft", "copy", "again")}
    assert np.array_equal(found["sft"], found["copy"])
    assert not np.array_equal(found["sft"], found["base"])
    assert not np.array_equal(found["sft"], found["again"])
    assert len(np.unique(found["base"], axis=0)) == 8


def test_the_protocol_says_how_they_were_made(generated):
    index, _ = images_of(generated / "sft")
    vae = digest(stages.ROOT / "models/embedded/base/vae")[:12]
    assert json.loads((generated / "sft/protocol.json").read_text()) == {
        "autoencoder": f"{vae} float32",
        "prompt_set_sha": hash_prompts(index.prompt),
        **{"n_prompts": 4, "images_per_prompt": 2, "sampler": "ddim", "steps": 2, "eta": 0.0, "guidance_scale": 2.0},
        **{"resolution": 32, "dtype": "float32", "seed": 0, "scorers": []},
    }


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"generate__sampling__batch_size": 8}, True),
        ({"seed": 1}, False),
        ({"generate__sampling__eta": 1}, False),
        ({"generate__sampling__steps": 3}, False),
        ({"generate__sampling__guidance_scale": 1}, False),
    ],
    ids=str,
)
def test_what_changes_an_image(mine, generated, changes, same):
    _, before = images_of(generated / "sft")
    stages.write(mine, RUNS, **SETTINGS, **changes)
    stages.write_plans()
    stages.call("generate", run="sft")
    _, after = images_of(mine / "data/short/generated/sft")
    difference = np.abs(after.astype(int) - before)
    assert (difference.max() <= 1) == same
    assert same or difference.reshape(8, -1).max(1).min() > 1  # every image is another


def test_too_few_test_prompts_are_an_error_that_says_what_to_lower(mine):
    stages.write(mine, RUNS, **SETTINGS, generate__prompts=6)
    stages.write_plans()
    with pytest.raises(SystemExit, match=r"generate\.prompts: 6 wanted, the test split has 5: lower it"):
        stages.call("generate", run="base")
