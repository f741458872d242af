"""Parameter files that would cost hours, run into a traceback, or print what they should not."""

import time
from types import SimpleNamespace

import pytest

from attune.config.edit import update_params_file
from attune.config.resolve import read_yaml
from attune.config.schema import ConfigError, check
from attune.config.search import Config
from attune.stages import sweep


def merges(depth):
    """Each line merges the one before eight times: 8^depth values, if they are followed."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 8)}], k{i}: 1}}" for i in range(1, depth + 1)]
    return "\n".join(lines) + "\n"


def test_merges_are_counted_before_they_are_followed(tmp_path):
    file = tmp_path / "params.local.yaml"
    file.write_text(merges(13))
    began = time.monotonic()
    with pytest.raises(ConfigError, match="holds more than 50,000 values"):
        read_yaml(file)
    assert time.monotonic() - began < 5
    file.write_text(merges(2))
    assert read_yaml(file)["a2"] == {"x": 1, "y": 2, "k1": 1, "k2": 1}


def test_a_tag_is_not_repeated(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("tracking: !<tag:hunter2SECRET> x\n")
    with pytest.raises(ConfigError, match="line 1, column 11: could not determine a constructor for the tag") as error:
        read_yaml(file)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("text", ["asked:\n", "foo: 1\n", "asked: 3\n", "asked: [a]\n"])
def test_a_list_of_searches_that_is_none(tmp_path, monkeypatch, text):
    settings = SimpleNamespace(runs={"sft": None})
    (tmp_path / "asked.yaml").write_text(text)
    monkeypatch.setattr(sweep, "ASKED", tmp_path / "asked.yaml")
    monkeypatch.setattr(sweep, "load", lambda: settings)
    with pytest.raises(SystemExit, match=r"asked\.yaml: asked: a block of runs is wanted"):
        sweep.ask("sft")


@pytest.mark.parametrize("text", ["a:\n", "a: 3\n"])
def test_a_value_is_not_written_into_what_is_no_block(tmp_path, text):
    file = tmp_path / "p.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.b: a is no block"):
        update_params_file({"a.b": 1}, file)
    assert file.read_text() == text


def test_a_linked_file_stays_a_link(tmp_path):
    (tmp_path / "real.yaml").write_text("a:\n  b: 1\n")
    (tmp_path / "p.yaml").symlink_to("real.yaml")
    update_params_file({"a.b": 2}, tmp_path / "p.yaml")
    assert (tmp_path / "p.yaml").is_symlink()
    assert (tmp_path / "real.yaml").read_text() == "a:\n  b: 2\n"


@pytest.mark.parametrize("query", ["passwd=hunter2", "pass%77ord=hunter2", "token=hunter2"])
def test_a_password_in_the_query_of_a_storage_is_refused_and_not_shown(query):
    block = {
        "space": {"beta": {"low": 1, "high": 2}},
        "trials": 1,
        "storage": f"postgresql+psycopg://h/d?user=x&{query}",
    }
    with pytest.raises(ConfigError, match="a password does not belong here") as error:
        check(Config, block, "search.dpo")
    assert "hunter2" not in str(error.value)
