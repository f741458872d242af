"""params.yaml: every mistake is found before anything heavy is imported, and its message names the key."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from attune.config import check as config
from attune.config import plugins
from attune.config.schema import ConfigError
from attune.files import digest, values_sha

ROOT = Path(__file__).parents[2]
TINY = "profiles.tiny"


def params() -> dict[str, Any]:
    """The repository's own params.yaml, merge keys resolved, profile tiny."""
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    return plain(values) | {"profile": "tiny"}


def plain(value: Any) -> Any:
    """Copies nested values, so that blocks shared by anchors can be changed apart."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *folders, key = dotted.split(".")
    for folder in folders:
        values = values[folder]
    values[key] = value


def drop(values: dict[str, Any], dotted: str) -> None:
    *folders, key = dotted.split(".")
    for folder in folders:
        values = values[folder]
    del values[key]


def write(folder: Path, values: dict[str, Any]) -> Path:
    buffer = io.StringIO()
    YAML().dump(values, buffer)
    path = folder / "params.yaml"
    path.write_text(buffer.getvalue())
    return path


def refusal(folder: Path, values: dict[str, Any]) -> str:
    """The message of the ConfigError these values raise."""
    with pytest.raises(ConfigError) as caught:
        config.load(write(folder, values))
    return str(caught.value)


@pytest.fixture
def values() -> dict[str, Any]:
    return params()


def test_the_shipped_file_is_valid(tmp_path, values):
    read, profile = config.load(write(tmp_path, values))
    assert read.profile == "tiny"
    assert profile.methods["spo"]["beta"] == 10


# What is put where, and what the message must say besides the key.
WRONG = {
    "unknown key": (f"{TINY}.model.backbon", "sd", "known keys: backbone, path"),
    "unknown key at the top": ("trackin", None, "known keys: profile, run_methods"),
    "unknown section": (f"{TINY}.metods", {}, "known keys: seed, threads"),
    "unknown key of a method": (f"{TINY}.methods.spo.betta", 1, "known keys: lr, batches"),
    "unknown key of a scorer": (f"{TINY}.scorers.oracle.paht", "x", "expected_mean"),
    "unknown key of the source": (f"{TINY}.data.prompts", 3, "train_prompts"),
    "unknown key of the preference model": (f"{TINY}.preference.betta", 3, "clip"),
    "text for a number": (f"{TINY}.methods.dpo.beta", "2000", "valid number (given '2000')"),
    "text for a whole number": (f"{TINY}.methods.dpo.lora.rank", "8", "valid integer (given '8')"),
    "a fraction for a whole number": (f"{TINY}.sampling.steps", 20.5, "valid integer (given 20.5)"),
    "a list for a block": (f"{TINY}.methods.dpo.lora", [8], "given [8]"),
    "a number for a name": (f"{TINY}.model.path", 3, "valid string (given 3)"),
    "true for a number": (f"{TINY}.methods.dpo.beta", True, "valid number (given True)"),
    "true for a whole number": (f"{TINY}.seed", True, "valid integer (given True)"),
    "NaN": (f"{TINY}.methods.spo.beta", float("nan"), "finite number (given nan)"),
    "infinity": (f"{TINY}.methods.spo.lr", float("inf"), "finite number (given inf)"),
    "zero beta": (f"{TINY}.methods.spo.beta", 0, "greater than 0 (given 0"),
    "negative learning rate": (f"{TINY}.preference.lr", -1e-4, "greater than 0 (given -0.0001)"),
    "clip above one": (f"{TINY}.methods.spo.clip", 1.5, "less than 1 (given 1.5)"),
    "eta above one": (f"{TINY}.generate.sampling.eta", 2, "less than or equal to 1 (given 2"),
    "more held-out prompts than there are": (f"{TINY}.generate.prompts", 241, "241 is more than data.test_prompts"),
    "no prompts": (f"{TINY}.data.test_prompts", 1, "greater than or equal to 2 (given 1)"),
    "an unknown dtype": (
        f"{TINY}.model.dtype",
        "float8",
        "'float32', 'bfloat16' or 'float16' (given 'float8')",
    ),
    "a moving target": (f"{TINY}.model.revision", "main", "pattern"),
    "a hub id without its commit": (
        f"{TINY}.model.vae",
        "owner/name",
        "its commit in vae_revision (given 'owner/name')",
    ),
    "a model without its commit": (f"{TINY}.model.path", "owner/name", "needs its commit in revision"),
    "a CLIP without its commit": (f"{TINY}.preference.clip", "owner/name", "needs its commit in revision"),
    "its tokenizer without one": (f"{TINY}.preference.tokenizer", "owner/name", "its commit in tokenizer_revision"),
    "its weights without one": (f"{TINY}.preference.weights", "hf://o/n/spm.bin", "its commit in weights_revision"),
    "its weights at a branch": (f"{TINY}.preference.weights_revision", "main", "pattern"),
    "a judge that scored no pairs": (
        f"{TINY}.preference.ai_feedback.scorer",
        "hpsv2",
        "'hpsv2' is not in data.score_with: ['pickscore']",
    ),
    "a method's judge that scored no pairs": (
        f"{TINY}.methods.dpo.ai_feedback",
        {"scorer": "oracle"},
        "ai_feedback.scorer: 'oracle' is not in data.score_with: ['pickscore']",
    ),
    "an optimizer that is not installed": (
        f"{TINY}.methods.dpo.optimizer",
        "adamw8bit",
        "needs the package bitsandbytes",
    ),
    "unknown key of an adapter": (f"{TINY}.methods.dpo.lora.alpha", 1, "known keys: rank, targets"),
    "unknown backbone": (f"{TINY}.model.backbone", "sd9", "no backbones plug-in named 'sd9'; there are "),
    "unknown source": (f"{TINY}.data", {"source": "web"}, "no sources plug-in named 'web'; there are folder"),
    "no source": (f"{TINY}.data", {"train_prompts": 3}, "no sources plug-in named None; there are folder"),
    "unknown method": (f"{TINY}.methods.nope", {}, "no methods plug-in named 'nope'; there are "),
    "unknown scorer": (f"{TINY}.scorers.lpips", {}, "no rewards plug-in named 'lpips'; there are "),
    "a method without settings": (f"{TINY}.methods.dpo", None, "given None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_named_with_its_full_key(name, tmp_path, values):
    key, value, says = WRONG[name]
    put(values, key, value)
    message = refusal(tmp_path, values)
    assert message.startswith(key)
    assert says in message
    assert len(message.splitlines()) == 1 or name in ("unknown source", "no source")


IN_PROFILE = """
    seed model.backbone model.path sampling.steps data.temperature preference.clip
    methods.dpo.lora methods.spo.lora.rank methods.spo.beta
    methods.sft.lr generate.prompts generate.sampling.eta scorers.hpsv2.tokenizer
"""
MISSING = ["profile", "run_methods", "profiles", "tracking", *(f"{TINY}.{key}" for key in IN_PROFILE.split())]


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_key_is_named(key, tmp_path, values):
    drop(values, key)
    message = refusal(tmp_path, values)
    assert message.startswith(f"{key}: Field required")
    assert len(message.splitlines()) == 1


def test_unknown_profile_lists_what_there_is(tmp_path, values):
    values["profile"] = "huge"
    message = refusal(tmp_path, values)
    assert message.startswith("profile: 'huge' is not in profiles: tiny, short")


def test_a_method_to_run_needs_a_block(tmp_path, values):
    drop(values, f"{TINY}.methods.dpo")
    assert refusal(tmp_path, values) == "run_methods.dpo: profiles.tiny.methods has no block of that name"


def test_pins_that_are_missing_are_reported_together_and_a_pinned_address_is_fine(tmp_path, values):
    put(values, f"{TINY}.model.path", "owner/base")
    put(values, f"{TINY}.model.vae", "owner/vae")
    lines = refusal(tmp_path, values).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{TINY}.model.path", f"{TINY}.model.vae"]
    put(values, f"{TINY}.model.revision", "0" * 40)
    put(values, f"{TINY}.model.vae_revision", "1" * 40)
    assert config.load(write(tmp_path, values))[1].model.vae_revision == "1" * 40


def test_without_scores_no_judge_can_label(tmp_path, values):
    put(values, f"{TINY}.data.score_with", [])
    message = refusal(tmp_path, values)
    assert message == f"{TINY}.preference.ai_feedback.scorer: 'pickscore' is not in data.score_with: []"
    put(values, f"{TINY}.preference.ai_feedback", None)
    config.load(write(tmp_path, values))


def test_only_the_active_profile_is_checked_in_depth(tmp_path, values):
    put(values, "profiles.short.methods.dpo.beta", "x")
    config.load(write(tmp_path, values))
    assert "profiles.short.methods.dpo.beta" in refusal(tmp_path, values | {"profile": "short"})


def test_several_mistakes_are_reported_together(tmp_path, values):
    put(values, f"{TINY}.methods.spo.beta", -1)
    put(values, f"{TINY}.methods.spo.clip", "x")
    put(values, f"{TINY}.methods.spo.speed", 1)
    drop(values, f"{TINY}.methods.spo.steps")
    lines = refusal(tmp_path, values).splitlines()
    assert {line.split(":")[0] for line in lines} == {
        f"{TINY}.methods.spo.{key}" for key in ("beta", "clip", "speed", "steps")
    }


def test_mistakes_in_several_sections_are_reported_together(tmp_path, values):
    put(values, f"{TINY}.seed", -1)
    put(values, f"{TINY}.threads", 0)
    put(values, f"{TINY}.generate.sampling.steps", 0)
    message = refusal(tmp_path, values)
    for key in ("seed", "threads", "generate.sampling.steps"):
        assert f"{TINY}.{key}: " in message


@pytest.mark.parametrize(
    "text",
    ["profile: [tiny", "profile: tiny\n\tseed: 0", "a: 1\na: 2", "- tiny", "", "just words"],
    ids=["open bracket", "tab", "key twice", "list", "empty", "text"],
)
def test_a_file_that_is_no_mapping_is_refused(text, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"params\.yaml (is not valid YAML|must be a mapping)"):
        config.load(path)


def test_a_missing_file_says_where_to_run_from(tmp_path):
    with pytest.raises(ConfigError, match=r"params\.yaml does not exist; run from the repository root"):
        config.load(tmp_path / "params.yaml")


# --- numbers as people and DVC write them -----------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-05", "1e-5", "1.0e-5", "0.00001", "1E-05"])
def test_a_learning_rate_is_a_number_however_it_is_written(text, tmp_path, values):
    """`dvc exp run -S ...lr=1e-5` writes 1e-05, which PyYAML would read as a string (iterative/dvc#5971)."""
    put(values, f"{TINY}.methods.dpo.lr", "THE_RATE")
    path = write(tmp_path, values)
    path.write_text(path.read_text().replace("THE_RATE", text))
    _, profile = config.load(path)
    rate = profile.methods["dpo"]["lr"]
    assert type(rate) is float
    assert rate == 1e-5


def test_a_whole_number_is_a_float_where_one_is_meant(values):
    block = values["profiles"]["tiny"]["methods"]["spo"] | {"beta": 10, "lr": 1}
    read = config.plugin_config("methods", "spo", block, "methods.spo")
    assert (type(read.beta), read.beta) == (float, 10.0)
    assert type(read.candidates) is int


def test_blocks_are_immutable(tmp_path, values):
    _, profile = config.load(write(tmp_path, values))
    with pytest.raises(ValueError, match="frozen"):
        profile.seed = 1


# --- plug-ins ---------------------------------------------------------------------------------------------


PLUG_INS = [(kind, name) for kind in ("methods", "rewards", "sources") for name in plugins.available(kind)]


@pytest.mark.parametrize("name", ["../config", "__init__", "spo.py", ""])
def test_a_plug_in_is_a_plain_file_name(name):
    with pytest.raises(ConfigError, match=r"^some\.key: no methods plug-in named"):
        plugins.find("methods", name, "some.key")


VALIDATION = {"scorer": "hpsv2", "prompts": 4, "every": 1}
VALIDATION |= {"sampling": {"steps": 4, "eta": 0, "guidance_scale": 1, "batch_size": 4}}


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({}, "run_methods.dpo.reads: must be scorers, for its block has held_out"),
        ({"reads": "scorers"}, "run_methods.dpo.code: must be src/attune, for its block has held_out"),
        ({"reads": "scorers", "code": "src/attune"}, None),
    ],
)
def test_dvc_must_watch_a_scorer_that_a_training_asks(values, tmp_path, run, said):
    put(values, f"{TINY}.methods.dpo.validation", VALIDATION)
    put(values, "run_methods.dpo", {**values["run_methods"]["dpo"], **run})
    write(tmp_path, values)
    if said is None:
        config.load(tmp_path / "params.yaml")
        return
    with pytest.raises(ConfigError, match=said):
        config.load(tmp_path / "params.yaml")


# --- a fresh process --------------------------------------------------------------------------------------


def run_stage(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -X importtime -m ...` in the folder; the modules it imports are listed on stderr."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "ATTUNE_"))}
    command = [sys.executable, "-X", "importtime", "-m", *words]
    env = clean | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def imported(stderr: str) -> set[str]:
    """Top-level packages in an import-time listing."""
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


STAGES = (
    ("attune.stages.prepare",),
    ("attune.stages.train_preference",),
    ("attune.stages.align", "--method", "dpo"),
    ("attune.stages.generate", "--method", "base"),
    ("attune.stages.evaluate", "--method", "base"),
    ("attune.stages.report",),
)


@pytest.mark.parametrize("words", STAGES, ids=lambda words: words[0].rpartition(".")[2])
def test_a_stage_stops_at_once_at_a_wrong_key(words, tmp_path, values):
    put(values, f"{TINY}.methods.dpo.betta", 1)
    write(tmp_path, values)
    done = run_stage(tmp_path, *words)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(said) == 1, done.stderr[-2000:]
    assert said[0].startswith(f"params.yaml: {TINY}.methods.dpo.betta: Extra inputs are not permitted; known keys: ")
    packages = imported(done.stderr)
    assert {"attune", "pydantic", "ruamel"} <= packages
    assert not packages & {"torch", "transformers", "diffusers", "mlflow", "accelerate", "peft", "optuna"}
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"], "no mlflow.db, no half-made output"


def test_without_params_yaml_a_stage_says_so(tmp_path):
    done = run_stage(tmp_path, "attune.stages.prepare")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "params.yaml does not exist; run from the repository root" in done.stderr


def test_help_loads_nothing_heavy(tmp_path):
    done = run_stage(tmp_path, "attune.stages.align", "--help")
    assert done.returncode == 0
    assert "--method" in done.stdout
    assert "torch" not in imported(done.stderr)


# --- identities -------------------------------------------------------------------------------------------


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return value


def test_the_hash_of_values_ignores_key_order_and_nothing_else(values):
    turned = reversed_keys(values)
    assert list(turned) != list(values)
    assert values_sha(turned) == values_sha(values)
    seen = {values_sha(values)}
    for change in (
        ("methods.spo.beta", 11),
        ("seed", 1),
        ("methods.spo.lora.targets", ["to_q"]),
        ("methods.spo.lora.targets", ["to_k"]),
    ):
        changed = params()
        put(changed, f"{TINY}.{change[0]}", change[1])
        seen.add(values_sha(changed))
    assert len(seen) == 5
    assert values_sha([1, 2]) != values_sha([2, 1])


def test_the_digest_of_a_folder_is_of_names_and_content(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "x").write_text("1")
    (tmp_path / "a" / "deep" / "y").write_text("2")
    before = digest(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert digest(tmp_path / "b") == before
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "z")
    assert digest(tmp_path / "b") != before
    (tmp_path / "a" / "x").write_text("3")
    assert digest(tmp_path / "a") != before
