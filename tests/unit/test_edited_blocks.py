"""Whole blocks of a parameter file written anew: every other line, comments among them, stays."""

import pytest

from attune.config.edit import replace_blocks
from attune.config.resolve import read_yaml
from attune.config.schema import ConfigError

TEXT = """\
# what this is
seed: 0

data:
  source: world   # its own
  path:
  - a

# about the search
search:
  dpo: {}

# last
scorers:
  oracle: {}
"""


def edited(tmp_path, blocks, text=TEXT):
    file = tmp_path / "p.yaml"
    file.write_bytes(text.encode())
    replace_blocks(blocks, file)
    return file.read_bytes().decode()


def test_a_block_is_replaced_taken_out_or_added(tmp_path):
    found = edited(tmp_path, {"data": {"source": "folder", "path": "a b"}, "search": None, "runs": {"base": {}}})
    assert found.startswith("# what this is\nseed: 0\n\ndata:\n  source: folder\n  path: a b\n\n# last\nscorers:\n")
    assert read_yaml(tmp_path / "p.yaml") == {
        "seed": 0,
        "data": {"source": "folder", "path": "a b"},
        "scorers": {"oracle": {}},
        "runs": {"base": {}},
    }


def test_line_ends_are_kept_and_another_file_may_be_written(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_bytes(TEXT.replace("\n", "\r\n").encode())
    replace_blocks({"data": {"source": "table"}}, file, to=tmp_path / "q.yaml")
    assert file.read_bytes().decode() == TEXT.replace("\n", "\r\n")
    written = (tmp_path / "q.yaml").read_bytes()
    assert written.count(b"\n") == written.count(b"\r\n")
    assert read_yaml(tmp_path / "q.yaml")["data"] == {"source": "table"}


def test_a_layout_that_hides_the_block_is_an_error_and_nothing_is_written(tmp_path):
    text = "{seed: 0, data: {source: world}}\n"
    with pytest.raises(ConfigError, match="data: write each of these as a block of its own"):
        edited(tmp_path, {"data": {"source": "table"}}, text)
    assert (tmp_path / "p.yaml").read_text() == text
