"""Parameter files: every mistake is found before anything slow is imported, and its message names file and key."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import params as files
from attune.config import plugins
from attune.config.edit import update_params_file
from attune.config.resolve import load, merged, read_yaml
from attune.config.schema import ConfigError

ROOT = Path(__file__).parents[2]
WHERE = "params/tiny.yaml:"
PROFILES = sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Locations in parameter files are relative to the repository."""
    monkeypatch.chdir(ROOT)


def refusal(folder: Path, params: dict[str, Any], profile: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(files.write(folder, params, profile))
    return str(caught.value).removeprefix(f"{folder}/")


@pytest.mark.parametrize("name", PROFILES)
def test_every_shipped_profile_is_valid(name, tmp_path):
    settings = load(files.write(tmp_path, *files.shipped(name)))
    assert settings.profile == name
    assert {run for run, entry in settings.runs.items() if entry.method} <= set(settings.methods)


def test_a_profile_is_plain_block_style():
    """No anchors and nothing in braces: `dvc exp run -S` writes the file anew, and only the value may change."""
    for name in PROFILES:
        lines = (ROOT / "params" / f"{name}.yaml").read_text().splitlines()
        code = [line.split(" #")[0] for line in lines if not line.lstrip().startswith("#")]
        assert not [
            line for line in code if any(sign in line for sign in ("&", "*", "<<", "[", "{")) and line != "  oracle: {}"
        ]


@pytest.mark.parametrize("file", ["params.yaml", *(f"params/{name}.yaml" for name in PROFILES)])
def test_dvc_and_a_search_change_one_line_of_what_is_shipped(file, tmp_path):
    """DVC breaks lines at 80 and loses what follows a list, so the files are laid out as it writes them."""
    from dvc.utils.hydra import apply_overrides

    key, value = ("tracking", "none") if file == "params.yaml" else ("seed", 77)
    before = (ROOT / file).read_text().splitlines()
    for change in (
        lambda path: apply_overrides(str(path), [f"{key}={value}"]),
        lambda path: update_params_file({key: value}, path),
    ):
        copy = tmp_path / "copy.yaml"
        copy.write_text((ROOT / file).read_text())
        change(copy)
        after = copy.read_text().splitlines()
        assert len(after) == len(before)
        (changed,) = [new for old, new in zip(before, after, strict=True) if old != new]
        assert changed == f"{key}: {value}"


WRONG = {
    "a slip": ("methods.spo.betta", 1, "did you mean beta?"),
    "unknown key of a dimension": ("search.dpo.space.beta.step", 1, "known keys: low, high, log, choices"),
    "unknown key of a validation": ("methods.dpo.lora.alpha", 1, "known keys: rank, targets"),
    "one of two kinds": ("methods.dpo.lora.targets", 3, "'attention' or 'all' or a valid list (given 3)"),
    "one of many kinds": ("search.dpo.space.beta.choices", [[1]], "a valid number or a valid string (given [1])"),
    "an integer beyond float64": ("methods.dpo.beta", 10**400, "float32 holds (given a whole number of 1329 bits)"),
    "a number beyond float32": ("methods.dpo.lr", 1e300, "float32 holds (given 1e+300)"),
    "more than a machine holds": ("methods.dpo.batch_size", 10**9, "at most 1,000,000 (given 1000000000)"),
    "more than anybody waits for": ("methods.dpo.batches", 10**10, "at most 1,000,000,000 (given 10000000000)"),
    "a rank no layer has": ("methods.dpo.lora.rank", 10**12, "less than or equal to 100000 (given 1000000000000)"),
    "an empty path": ("model.path", "", "an empty path"),
    "a path no system has": ("model.path", "a" * 300, "File name too long"),
    "a character that does not show": ("model.path", "a\u202eb", r"U+202E, which does not show (given 'a\u202eb')"),
    "text without end": ("model.path", "a" * 10**6, "a text of 1,000,000 characters"),
    "an address with a password": ("scorers.oracle", "http://me:s3cret@host", "given 'http://***@host'"),
    "unknown key": ("model.backbon", "sd", "known keys: backbone, path"),
    "unknown section": ("metods", {}, "known keys: seed, threads"),
    "unknown key of a method": ("methods.spo.betta", 1, "known keys: lr, batches"),
    "unknown key of a scorer": ("scorers.oracle.paht", "x", "expected_range"),
    "unknown key of the source": ("data.prompts", 3, "train_prompts"),
    "unknown key of the preference model": ("preference.betta", 3, "clip"),
    "text for a number": ("methods.dpo.beta", "2000", "valid number (given '2000')"),
    "text for a whole number": ("methods.dpo.lora.rank", "8", "valid integer (given '8')"),
    "a fraction for a whole number": ("sampling.steps", 20.5, "valid integer (given 20.5)"),
    "a list for a block": ("methods.dpo.lora", [8], "given [8]"),
    "a number for a name": ("model.path", 3, "string"),
    "true for a number": ("methods.dpo.beta", True, "valid number (given True)"),
    "true for a whole number": ("seed", True, "valid integer (given True)"),
    "NaN": ("methods.spo.beta", math.nan, "finite number (given nan)"),
    "infinity": ("methods.spo.lr", math.inf, "finite number (given inf)"),
    "zero beta": ("methods.spo.beta", 0, "greater than 0 (given 0"),
    "negative learning rate": ("preference.lr", -1e-4, "greater than 0 (given -0.0001)"),
    "clip above one": ("methods.spo.clip", 1.5, "less than 1 (given 1.5)"),
    "eta above one": ("generate.sampling.eta", 2, "less than or equal to 1 (given 2"),
    "a seed that no generator takes": ("seed", 2**63, "less than 9223372036854775808"),
    "an unknown dtype": ("model.dtype", "float8", "'float32', 'bfloat16' or 'float16' (given 'float8')"),
    "unknown backbone": ("model.backbone", "sd9", "no backbones plug-in named 'sd9'; there are "),
    "unknown method": ("methods.nope", {}, "no methods plug-in named 'nope'; there are "),
    "an optimizer that is not installed": ("methods.dpo.optimizer", "adamw8bit", "needs the package bitsandbytes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_named_with_file_and_key(name, tmp_path):
    key, value, says = WRONG[name]
    params, profile = files.shipped()
    message = refusal(tmp_path, params, files.changed(profile, **{key: value}))
    assert message.startswith(f"{WHERE}{key}")
    assert says in message
    assert len(message) < 600
    assert "s3cret" not in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("key", ["seed", "model.backbone", "sampling.steps", "data.temperature", "generate.prompts"])
def test_a_missing_key_is_named(key, tmp_path):
    params, profile = files.shipped()
    assert refusal(tmp_path, params, files.without(profile, key)).startswith(f"{WHERE}{key}: Field required")


def test_a_run_says_what_it_comes_after(tmp_path):
    params, profile = files.shipped()
    assert refusal(tmp_path, files.without(params, "runs.dpo.after"), profile).startswith(
        "runs.dpo.after: Field required"
    )


def test_a_run_is_trained_or_released_and_not_both(tmp_path):
    params, profile = files.shipped()
    entry = {"method": "dpo", "from": "models/embedded", "after": "data"}
    assert "either method" in refusal(tmp_path, files.changed(params, runs__dpo=entry), profile)


def test_an_unknown_profile_lists_what_there_is(tmp_path):
    params, profile = files.shipped()
    folder = files.write(tmp_path, params, profile)
    (folder / "params.yaml").write_text((folder / "params.yaml").read_text().replace("profile: tiny", "profile: huge"))
    with pytest.raises(ConfigError, match=r"profile: there is no params/huge\.yaml; there are: tiny"):
        load(folder)


def test_several_mistakes_are_reported_together(tmp_path):
    params, profile = files.shipped()
    profile = files.changed(profile, methods__spo__beta=-1, methods__spo__clip="x", methods__spo__speed=1)
    lines = refusal(tmp_path, params, profile).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{WHERE}methods.spo.{key}" for key in ("beta", "clip", "speed")]


@pytest.mark.parametrize("text", ["profile: [tiny", "a: 1\na: 2", "- tiny", "", "just words"])
def test_a_file_that_is_no_mapping_is_refused(text, tmp_path):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"params\.yaml (is not valid YAML|must be a mapping)"):
        load(tmp_path)


def test_a_missing_file_says_where_to_run_from(tmp_path):
    with pytest.raises(ConfigError, match=r"params\.yaml does not exist; run from the repository's root"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["1e-05", "1e-5", "1.0e-5", "0.00001", "1E-05"])
def test_a_learning_rate_is_a_number_however_it_is_written(text, tmp_path):
    """`dvc exp run -S ...lr=1e-5` writes 1e-05, which PyYAML would read as a string (iterative/dvc#5971)."""
    params, profile = files.shipped()
    folder = files.write(tmp_path, params, files.changed(profile, methods__dpo__lr="THE_RATE"))
    file = folder / "params" / "tiny.yaml"
    file.write_text(file.read_text().replace("THE_RATE", text))
    rate = load(folder).methods["dpo"].lr
    assert (type(rate), rate) == (float, 1e-5)


def test_a_method_without_a_block_has_the_papers_settings(tmp_path):
    params, profile = files.shipped()
    settings = load(files.write(tmp_path, params, files.without(profile, "methods.spo")))
    assert settings.methods["spo"] == plugins.config_class("methods", "spo")()
    assert (settings.methods["spo"].beta, settings.methods["spo"].clip, settings.methods["spo"].steps) == (10, 0.1, 20)


def test_two_scorers_of_one_kind_stand_side_by_side(tmp_path):
    params, profile = files.shipped()
    block = {"scorer": "hpsv2", **profile["scorers"]["hpsv2"], "antialias": False}
    settings = load(files.write(tmp_path, params, files.changed(profile, scorers__hpsv2_old=block)))
    assert settings.scorers["hpsv2_old"].plugin == settings.scorers["hpsv2"].plugin == "hpsv2"
    assert not settings.scorers["hpsv2_old"].config.antialias


def test_local_values_override_and_others_stay(tmp_path):
    params, profile = files.shipped()
    folder = files.write(tmp_path, params, profile)
    (folder / "params.local.yaml").write_text("tiny:\n  threads: 3\n  generate:\n    prompts: 12\n")
    settings = load(folder)
    assert (settings.threads, settings.generate.prompts, settings.generate.sampling.steps) == (3, 12, 20)
    (folder / "params.local.yaml").write_text("profile: short\n")
    with pytest.raises(ConfigError, match=r"params\.local\.yaml: profile is not a profile"):
        load(folder)


def test_merging_replaces_all_but_mappings():
    assert merged({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"c": [2]}}) == {"a": {"b": 1, "c": [2]}, "d": 2}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_changing_a_value_changes_its_line_alone(tmp_path, newline):
    text = (ROOT / "params" / "tiny.yaml").read_text().replace("\n", newline)
    file = tmp_path / "tiny.yaml"
    file.write_bytes(text.encode())
    update_params_file({"methods.spo.beta": 7, "methods.dpo.lora.rank": 16}, file)
    before, after = text.split(newline), file.read_bytes().decode().split(newline)
    assert read_yaml(file)["methods"]["spo"]["beta"] == 7
    added = [line for line in after if line not in before]
    assert [line.strip() for line in added] == ["rank: 16", "beta: 7"]
    assert len(after) == len(before) + 1  # spo's beta is the paper's, so its line is new


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_changing_a_value_keeps_how_the_file_is_written(tmp_path, newline, encoding):
    """Its encoding, line ends, blank lines and comments, its mode, and that its last line does not end."""
    text = newline.join(["# a comment", "a:", "  b: 1  # one", "", "", "c: 'ü'"])
    file = tmp_path / "x.yaml"
    file.write_bytes(text.encode(encoding))
    file.chmod(0o600)
    update_params_file({"a.b": 2}, file)
    assert file.read_bytes() == text.replace("b: 1", "b: 2").encode(encoding)
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_change_that_breaks_off_leaves_the_file(tmp_path):
    """A limit on the size of files stands for a full disk."""
    text = "a: 1\n" + "# a comment\n" * 2000
    file = tmp_path / "x.yaml"
    file.write_text(text)
    script = (
        "import resource, signal, sys; from attune.config.edit import update_params_file;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "update_params_file({'a': 2}, sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert file.read_text() == text
    assert list(tmp_path.iterdir()) == [file]


def test_a_value_shared_by_an_anchor_is_refused(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("a: &x\n  beta: 1\nb: *x\n")
    with pytest.raises(ConfigError, match="anchor"):
        update_params_file({"a.beta": 2}, file)
    assert file.read_text() == "a: &x\n  beta: 1\nb: *x\n"


@pytest.mark.parametrize("run", ["dpo", "base"])
def test_an_unknown_key_of_a_run_is_named(run, tmp_path):
    params, profile = files.shipped()
    message = refusal(tmp_path, files.changed(params, **{f"runs.{run}.form": "x"}), profile)
    assert message.startswith(f"runs.{run}.form: Extra inputs are not permitted; known keys: method, from, trained_on")
    assert message.endswith("did you mean from?")


@pytest.mark.parametrize("uri", ["foo://me:s3cret@x", "mlruns", "file:///tmp/x", "me:s3cret@host:5000", ""])
def test_a_store_of_no_known_kind_is_refused(uri, tmp_path):
    params, profile = files.shipped()
    message = refusal(tmp_path, {**params, "tracking": uri}, profile)
    assert message.startswith("tracking: Value error, must be default, null, or begin with one of http://, https://,")
    assert "s3cret" not in message


@pytest.mark.parametrize("local", ["tiny: 3", "tiny: [1]", "short: x"])
def test_a_local_block_is_a_block(local, tmp_path):
    folder = files.write(tmp_path, *files.shipped())
    for name in ("tiny", "short"):
        (folder / "params" / f"{name}.yaml").write_bytes((ROOT / "params" / f"{name}.yaml").read_bytes())
    (folder / "params.local.yaml").write_text(local)
    with pytest.raises(ConfigError, match=r"params\.local\.yaml: (tiny|short): must be a block of settings"):
        load(folder)


@pytest.mark.parametrize("name", ["../config", "__init__", "spo.py", ""])
def test_a_plug_in_is_a_plain_file_name(name):
    with pytest.raises(ConfigError, match=r"^some\.key: no methods plug-in named"):
        plugins.find("methods", name, "some.key")
