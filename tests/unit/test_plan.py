"""The plan: what each stage is told, what would stop a run, and whose code a stage depends on."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest

import params as files
from attune import hub
from attune.config.plan import EvaluatePlan, PlanError, RunPlan, plan_file, read, to_json
from attune.config.resolve import Settings, load
from attune.paths import Paths
from attune.planning import code
from attune.planning.costs import as_text, facts, rows
from attune.planning.local_files import Digests
from attune.planning.make import make, selected_by, trained_on, wanted_rows
from attune.planning.problems import Machine, missing_files, problems, too_large
from attune.stages.plan import _missing_on_the_hub

ROOT = Path(__file__).parents[2]
LAPTOP = Machine(gpus=0, gpu_bytes=0, ram_bytes=16 * 10**9, free_disk_bytes=10**11)
GPU_BOX = dataclasses.replace(LAPTOP, gpus=1, gpu_bytes=80 * 10**9)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def settings(tmp_path):
    """Settings of a profile with values changed: `settings(runs__dpo=..., tiny__seed=1)`."""

    def made(profile: str = "tiny", runs: dict | None = None, **changes) -> Settings:
        params, values = files.shipped(profile)
        params = files.changed(params, **(runs or {}))
        return load(files.write(tmp_path, params, files.changed(values, **changes)))

    return made


def said(found: Settings, machine: Machine = LAPTOP) -> list[str]:
    return [*missing_files(found), *problems(found, facts(found).denoiser, machine)]


VALIDATION = {"scorer": "hpsv2", "prompts": 4, "every": 1, "patience": 2}
VALIDATION |= {"sampling": {"steps": 4, "eta": 0, "guidance_scale": 1, "batch_size": 4}}

# --- what would stop a run --------------------------------------------------------------------------------


def test_nothing_stops_the_shipped_laptop_profiles(settings):
    assert said(settings()) == said(settings("short")) == []


def test_ties_are_not_enough_for_a_run_that_learns_from_choices(settings, tmp_path):
    lines = [
        f'{{"prompt": "p {i}", "image_0": "a", "image_1": "b", "label_0": 0.5, "split": "train"}}' for i in range(3)
    ]
    (tmp_path / "ties.jsonl").write_text("\n".join(lines))
    found = settings(data={"source": "table", "path": str(tmp_path / "ties.jsonl")})
    assert wanted_rows(found)["choices/train"] == 1
    assert any("0 train pairs that are no ties, but 1 are needed by the runs" in line for line in said(found))


def test_more_test_prompts_than_the_world_has(settings):
    (line,) = said(settings(generate__prompts=241))
    assert line.startswith("params/tiny.yaml:data: 240 test prompts, but 241 are needed by generate.prompts")
    assert "data.test_prompts" in line
    lines = said(settings(generate__prompts=241, methods__dpo__validation={**VALIDATION, "prompts": 61}))
    assert [line.split(", but")[0] for line in lines] == [
        "params/tiny.yaml:data: 60 validation prompts",
        "params/tiny.yaml:data: 240 test prompts",
    ]


def test_own_data_without_test_prompts(settings, tmp_path):
    """What stopped a run after all trainings: 15 pairs, of whose prompts none falls into the test split."""
    from PIL import Image

    for side in ("chosen", "rejected"):
        (tmp_path / "own" / side).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (9 * i, 0, 0)).save(tmp_path / "own" / side / f"{i}.png")
            (tmp_path / "own" / f"{i}.txt").write_text(f"the picture {i}")
    data = {"source": "folder", "path": str(tmp_path / "own"), "score_with": ["pickscore"]}
    lines = said(settings(data=data, scorers__oracle=...))
    assert any("generate.prompts" in line and "test_list" in line for line in lines)


def test_data_that_is_not_there(settings, tmp_path):
    data = {"source": "folder", "path": str(tmp_path / "nothing"), "score_with": ["pickscore"]}
    assert any(str(tmp_path / "nothing") in line and "docs/data.md" in line for line in said(settings(data=data)))


def test_a_free_prompt_and_the_oracle(settings, tmp_path):
    (tmp_path / "list.txt").write_text("a photo of a cat\n" * 300)
    data = {"source": "prompts", "path": str(tmp_path / "list.txt"), "score_with": []}
    runs = {"runs__sft": ..., "runs__dpo": ..., "runs__spo": ...}
    lines = said(settings(runs=runs, data=data, preference=...))
    assert any(
        "scorers.oracle" in line and "a photo of a cat" in line and "remove scorers.oracle" in line for line in lines
    )


def test_a_method_that_learns_from_pairs_and_a_source_without(settings, tmp_path):
    (tmp_path / "list.txt").write_text("a cat\n" * 400)
    data = {"source": "prompts", "path": str(tmp_path / "list.txt"), "score_with": []}
    lines = said(settings(data=data, scorers__oracle=...))
    assert any(line.startswith("runs.dpo: dpo learns from pairs, and data.source prompts has none") for line in lines)


def sizes(found: Settings, seconds: dict | None = None, **machine) -> list[str]:
    return list(too_large(found, list(rows(found, {}, seconds or {}, {})), dataclasses.replace(GPU_BOX, **machine)))


def test_full_fine_tuning_of_sdxl_does_not_fit_a_small_gpu(settings):
    """2,567 million weights of 16 bytes and 4 of the frozen copy: 51.3 GB. The encoders are let go of before.

    An adapter leaves them at 2 bytes each.
    """
    full = settings("sdxl", methods__dpo__lora=None, methods__dpo__optimizer="adamw")
    (line,) = sizes(full, gpu_bytes=40 * 10**9)
    assert line.startswith("params/sdxl.yaml:methods.dpo: align@dpo needs 51.3 GB of GPU memory")
    assert "has 40.0 GB; train an adapter (lora)" in line
    assert sizes(full) == sizes(settings("sdxl"), gpu_bytes=40 * 10**9) == []
    (line,) = sizes(settings("sdxl"), gpu_bytes=24 * 10**9)
    assert line.startswith("params/sdxl.yaml:preference: train_preference needs 27.7 GB")


def test_what_is_to_be_written_must_fit_the_disk(settings):
    assert sizes(settings(), free_disk_bytes=10**9) == []
    (line,) = sizes(settings(), free_disk_bytes=10**6)
    assert line.startswith("params/tiny.yaml: the stages that have not run here write about")
    ran = {row.stage: 1.0 for row in rows(settings(), {}, {}, {})}
    assert sizes(settings(), ran, free_disk_bytes=0) == []


@pytest.mark.parametrize("profile", ["sd15", "sdxl"])
def test_a_large_model_and_no_gpu(profile, settings):
    assert any("allow_cpu: this machine has no GPU" in line for line in said(settings(profile)))
    assert not any("GPU" in line for line in said(settings(profile), GPU_BOX))
    assert not any("GPU" in line for line in said(settings(profile, allow_cpu=True)))


NOPE = {"space": {"lr": {"choices": [1.0]}}, "objectives": ["hpsv2"], "prompts": 4, "sampler": "grid"}
# changes of the profile, changes of params.yaml, and what is said
CHANGES = {
    "a scorer without a block": (
        {"methods__dpo__validation": {**VALIDATION, "scorer": "lpips"}},
        {},
        "'lpips' is not in scorers",
    ),
    "labels by a scorer that scored nothing": ({"data__score_with": []}, {}, "'pickscore' must be in data.score_with"),
    "a range that the method refuses": ({"search__spo__space": {"clip": {"low": 0.1, "high": 2}}}, {}, "space.clip: 2"),
    "a fixed value that it refuses": ({"search__spo__fixed": {"batches": 0}}, {}, "fixed.batches: 0"),
    "a search of nothing": ({"search__nope": NOPE}, {}, "there is no run"),
    "a preference model that is missing": ({"preference": ...}, {}, "preference: is missing"),
    "spo after the data alone": ({}, {"runs__spo__after": "data"}, "runs.spo.after: spo needs the preference model"),
    "after nothing that there is": ({}, {"runs__dpo__after": "spin_7"}, "runs.dpo.after: 'spin_7' is none of"),
    "after itself": ({}, {"runs__dpo__after": "dpo"}, "runs.dpo.after: goes round in a circle"),
    "a run with a folder's name": ({}, {"runs__preference": {"after": "data"}}, "runs.preference: the name is taken"),
    "no base": ({}, {"runs__base": ...}, "runs.base: is what every run is compared with"),
    "two starts": (
        {"methods__dpo__start": "models/embedded/base"},
        {"runs__dpo__after": "sft"},
        "methods.dpo.start: the run starts from runs.sft",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_together_is_one_line_with_its_key(name, settings):
    changes, runs, expected = CHANGES[name]
    lines = said(settings(runs=runs, **changes))
    assert [line for line in lines if expected in line], lines


# --- what a stage is told ---------------------------------------------------------------------------------


def test_weights_in_few_bits_are_for_adapters_alone(settings):
    found = settings(methods__dpo__lora=None)
    model = found.model.model_copy(update={"quantize": "nf4"})  # the package need not be here
    line = "params/tiny.yaml:model.quantize: weights of nf4 cannot be trained; set methods.dpo.lora"
    assert line in said(dataclasses.replace(found, model=model))
    assert line not in said(found)


def plans(found: Settings, tmp_path) -> dict[str, str]:
    """In a folder without summaries of other seeds, which make the report depend on all settings."""
    if not (tmp_path / "models").exists():
        (tmp_path / "models").symlink_to(ROOT / "models")
    with chdir(tmp_path):
        made = make(found, Digests(tmp_path / "digests.json"))
    return {file.stem: to_json(plan) for file, plan in made.items()}


def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one | other if one.get(name) != other.get(name)}


@pytest.mark.parametrize("seed", [10**12, 2**63 - 1])
def test_every_seed_that_the_profile_may_have_is_planned(seed, settings, tmp_path):
    """10^12 was taken for a number of things, of which no machine can do as many."""
    assert f'"seed": {seed}' in plans(settings(seed=seed), tmp_path)["align-dpo"]


def test_a_setting_changes_the_plans_of_the_stages_that_read_it(settings, tmp_path):
    before = plans(settings(), tmp_path)
    assert plans(settings(), tmp_path) == before
    assert changed(before, plans(settings(methods__spo__beta=7), tmp_path)) == {"align-spo", "sweep-spo", "report"}
    evaluations = {f"evaluate-{run}" for run in ("base", "sft", "dpo", "spo")}
    block = {"scorer": "hpsv2", "version": "2.1", "path": "models/embedded/hpsv2/open_clip_model.safetensors"}
    block |= {"tokenizer": "models/embedded/hpsv2", "antialias": False}
    assert changed(before, plans(settings(scorers__other=block), tmp_path)) == evaluations
    assert changed(before, plans(settings(threads=2), tmp_path)) == {"session"}
    assert changed(before, plans(settings(preference__lr=1e-5), tmp_path)) == {"preference"}


def test_a_plan_reads_back_as_it_was_written(settings, tmp_path, monkeypatch):
    found = make(settings(methods__dpo__validation=VALIDATION), Digests(tmp_path / "d.json"))
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    for file, plan in found.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(to_json(plan))
        name = file.stem.partition("-")
        assert read(type(plan), name[0], name[2] or None) == plan
    assert read(RunPlan, "align", "dpo").method.config.validation.patience == 2
    assert list(read(EvaluatePlan, "evaluate", "dpo").scorers) == ["oracle", "pickscore", "hpsv2", "aesthetic"]
    with pytest.raises(PlanError, match="make plan"):
        read(RunPlan, "align", "nothing")
    plan_file("align", "dpo").write_text("{}")
    with pytest.raises(PlanError, match="made by other code"):
        read(RunPlan, "align", "dpo")


def test_what_a_run_was_trained_on_is_worked_out(settings):
    found = settings(
        runs={
            "runs__reward": {"method": "alignprop", "after": "dpo"},
            "runs__released": {"from": "models/embedded/base", "trained_on": ["aesthetic"], "after": "data"},
        },
        methods__reward=files.shipped()[1]["methods"]["alignprop"],
        methods__dpo__ai_feedback={"scorer": "pickscore", "weight": 0.5},
    )
    names = {name: trained_on(name, found) for name in found.runs}
    assert names["base"] == names["sft"] == []
    assert names["dpo"] == ["pickscore"]  # the labels
    assert names["spo"] == ["pickscore"]  # the CLIP that the preference model starts from
    assert names["reward"] == ["pickscore"]  # its own reward, and what it goes on from
    assert names["released"] == ["aesthetic"]


def test_a_preference_model_of_another_clip_is_no_pickscore(settings):
    found = settings(preference__clip="models/embedded/aesthetic", preference__ai_feedback=...)
    assert trained_on("spo", found) == ["aesthetic"]


def test_early_stopping_selects(settings, tmp_path):
    found = make(settings(methods__dpo__validation=VALIDATION), Digests(tmp_path / "d.json"))
    assert found[plan_file("report")].selected_by == {"dpo": ["hpsv2"]}


def test_a_search_selects_once_its_best_settings_are_applied(settings, tmp_path, monkeypatch):
    """And what goes on from such a run is selected by it too."""
    runs = {"runs__on": {"method": "sft", "after": "dpo"}}
    before, applied = settings(runs=runs), settings(runs=runs, methods__dpo__beta=123.0, methods__dpo__lora__rank=3)
    monkeypatch.chdir(tmp_path)
    file = Paths("tiny").best_settings("dpo")
    file.parent.mkdir(parents=True)
    file.write_text("profile: tiny\nrun: dpo\nscores: {hpsv2: 0.2}\nparams: {beta: 123, lora.rank: 3}\n")
    assert (selected_by("dpo", before), selected_by("on", before)) == ([], [])
    assert (selected_by("dpo", applied), selected_by("on", applied)) == (["hpsv2"], ["hpsv2"])
    file.write_text("profile: tiny\nrun: dpo\nscores: {hpsv2: 0.2}\nparams: {ai_feedback.scorer: hpsv2}\n")
    assert selected_by("dpo", applied) == []


def test_a_replaced_adapter_changes_the_plan_of_its_run(settings, tmp_path):
    adapter = tmp_path / "adapters" / "mine with a space.safetensors"
    adapter.parent.mkdir()
    adapter.write_bytes(b"one")
    found = settings(runs={"runs__mine": {"from": str(adapter), "after": "data"}})
    before = plans(found, tmp_path)
    adapter.write_bytes(b"another")
    assert changed(before, plans(found, tmp_path)) == {"align-mine", "generate-mine", "sweep-mine"}


# --- code -------------------------------------------------------------------------------------------------


def test_comments_and_docstrings_are_no_code(tmp_path, monkeypatch):
    monkeypatch.setattr(code, "SRC", tmp_path)
    (tmp_path / "attune").mkdir()
    file = tmp_path / "attune" / "one.py"

    def digest(text: str) -> str:
        code.digest.cache_clear()
        code.file_of.cache_clear()
        file.write_text(text)
        return code.digest("attune.one")

    first = digest('"""One."""\n\ndef f(x):\n    """Adds."""\n    return x + 1\n')
    assert digest('"""Two."""\n# a comment\ndef f(x):\n\n    return x + 1  # one more\n') == first
    assert digest("def f(x):\n    return x + 2\n") != first
    code.digest.cache_clear()
    code.file_of.cache_clear()


# --- the command ------------------------------------------------------------------------------------------


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "attune.stages.plan", *words]
    return subprocess.run(line, cwd=folder, env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True)


def test_the_table_names_every_stage_and_says_what_is_unknown(settings):
    found = {row.stage: row for row in rows(settings(), {}, {"report": 3.0}, {})}
    assert list(found)[:2] == ["prepare", "train_preference"]
    assert found["align@dpo"].sees == "3,200 pairs, 1.33 epochs"
    assert (found["report"].time, found["align@dpo"].time) == (3.0, None)
    text = as_text(list(found.values()))
    assert "3 s (last time)" in text
    assert "unknown" in text


def test_a_preference_model_that_is_not_trained_sees_no_pairs(settings):
    found = {row.stage: row for row in rows(settings(preference__batches=0), {}, {}, {})}
    assert found["train_preference"].does == "nothing is trained: the weights as they are"
    assert found["train_preference"].sees == ""


def test_make_plan_ends_with_the_problems(tmp_path):
    params, profile = files.shipped()
    folder = files.write(tmp_path, params, files.changed(profile, generate__prompts=500))
    (folder / "models").symlink_to(ROOT / "models")
    done = command(folder, "--show")
    assert done.returncode == 1
    assert "align@spo" in done.stdout
    assert done.stderr.strip().startswith("params/tiny.yaml:data: 240 test prompts, but 500 are needed")
    assert "Traceback" not in done.stderr
    assert not (folder / "plan").exists()


def test_a_mistake_ends_the_stage_plan_at_once_and_leaves_the_plans_as_they_are(tmp_path):
    params, profile = files.shipped()
    folder = files.write(tmp_path, params, profile)
    (folder / "models").symlink_to(ROOT / "models")
    assert command(folder).returncode == 0
    before = {path.name: path.read_text() for path in (folder / "plan").iterdir()}
    files.write(folder, params, files.changed(profile, methods__dpo__betta=1))
    done = command(folder)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("params/tiny.yaml:methods.dpo.betta: Extra inputs are not permitted; known keys: ")
    assert {path.name: path.read_text() for path in (folder / "plan").iterdir()} == before


def test_what_the_hub_does_not_have_is_named_by_its_key(settings, monkeypatch):
    """Each asked for once, under the first key that names it; also what a method starts from."""
    commit, asked = "a" * 40, []

    def list_files(source, repo_type):
        asked.append((str(source), repo_type))
        raise hub.HubError(f"{source}: there is no such repository")

    monkeypatch.setattr(hub, "list_files", list_files)
    runs = {"runs__theirs": {"from": f"them/adapter@{commit}", "after": "data"}}
    found = settings(runs=runs, methods__dpo__start=f"me/start@{commit}")
    lines = list(_missing_on_the_hub(found))
    assert [line.split(": ")[0] for line in lines] == ["params/tiny.yaml:methods.dpo.start", "runs.theirs.from"]
    assert len(asked) == len(set(asked)) == 4


def test_a_packages_templates_are_code(tmp_path, monkeypatch):
    """The page of the report is made again after an edit of its template or its style."""
    monkeypatch.setattr(code, "SRC", tmp_path)
    folder = tmp_path / "attune/report"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    found = set()
    for text in ("a", "b"):
        for name in ("page.html.j2", "page.css"):
            (folder / name).write_text(text)
            code.digest.cache_clear()
            code.file_of.cache_clear()
            found.add(code.digest("attune.report"))
    code.digest.cache_clear()
    code.file_of.cache_clear()
    assert len(found) == 4
    assert "attune.evaluation.report" in code.closure(["attune.stages.report"])
