"""CSV, JSON and JSONL that people write by hand: a line that cannot be read costs itself, and no other."""

import json
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest

from attune.config import plugins
from attune.data.ingest.rules import clean_prompt
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow, Pair
from raw_data import rows_from

HEADER = "prompt,image_0,image_1,label_0\n"


def table(tmp_path: Path, *lines: str, name: str = "t.csv") -> tuple[list[str], dict[int, str]]:
    """Prompts of the good rows, and line -> what is wrong with the bad ones."""
    (tmp_path / name).write_text("".join([HEADER * name.endswith("csv"), *lines]))
    rows = rows_from("table", path=str(tmp_path / name))
    good = [row.prompt for row in rows if isinstance(row, Pair)]
    return good, {row.row: row.detail for row in rows if isinstance(row, BadRow)}


def line(prompt: str, cells: str = "a.png,b.png,1") -> str:
    return f"{prompt},{cells}\n"


STRAYS = {
    "to the end": ([line('"stray'), line("a cat"), line("a dog")], ["a cat", "a dog"]),
    "up to a quoted row": ([line('"stray'), line("a cat"), line('"a dog, black"')], ["a cat", "a dog, black"]),
    "up to a quote that closes": ([line('"stray'), line("a cat"), line('a nail of 5"')], ["a cat", 'a nail of 5"']),
    "two of them": ([line('"stray'), line("a cat"), line('"stray'), line("a dog")], ["a cat", "a dog"]),
    "in another column": ([line("a hen", 'a.png,"b.png,1'), line("a cat"), line("a dog")], ["a cat", "a dog"]),
    "in the last line": ([line("a cat"), line("a dog"), line('"stray')], ["a cat", "a dog"]),
}


@pytest.mark.parametrize("case", STRAYS)
def test_a_quote_that_is_never_closed_costs_its_own_line(tmp_path, case):
    lines, prompts = STRAYS[case]
    good, bad = table(tmp_path, *lines)
    assert good == prompts
    assert set(bad) == {n for n, text in enumerate(lines, start=2) if "stray" in text or "hen" in text}
    assert all(text.startswith(f"line {n}: a quote is opened here, ") for n, text in bad.items())


def test_a_stray_quote_in_a_long_table_costs_one_row(tmp_path):
    good, bad = table(tmp_path, *(line(f'"{i}' if i == 20 else str(i)) for i in range(3000)))
    assert len(good) == 2999
    assert list(bad) == [22]


def test_quotes_that_are_right_are_read_as_they_are(tmp_path):
    prompts = [
        "a cat,\nred, blue\nor 1, 2, 3",
        'a "big" cat',
        "a\r\nb",
        '"',
        ",",
        "foreground, sky, tree",
        '5" nail',
        "",
    ]
    frame = pd.DataFrame({"prompt": prompts, "image_0": "a.png", "image_1": "b.png", "label_0": 1})
    frame.to_csv(tmp_path / "t.csv", index=False)
    rows = rows_from("table", path=str(tmp_path / "t.csv"))
    assert [row.prompt for row in rows] == prompts
    assert [row.row for row in rows] == [2, 5, 6, 8, 9, 10, 11, 12]  # the first line of each


def test_a_row_of_too_many_cells_and_a_cell_that_is_too_long_are_told(tmp_path):
    good, bad = table(
        tmp_path, line("a cat, black"), line("x" * 200_000), line('"' + "y" * 200_000 + '"'), line("a dog")
    )
    assert good == ["a dog"]
    assert bad[2] == "line 2: expected 4 cells, found 5: a comma inside a cell needs quotes around it"
    assert table(tmp_path, line("a cow", "a.png,b.png,1,,"), line("a dog")) == (["a cow", "a dog"], {})
    assert bad[3].startswith("line 3, column prompt: 200000 characters; ")
    assert bad[4].startswith("line 4, column prompt: 200000 characters; ")


def row(prompt: str, label: str = "1") -> str:
    return f'{{"prompt": "{prompt}", "image_0": "a.png", "image_1": "b.png", "label_0": {label}}}\n'


@pytest.mark.parametrize(
    "hostile",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "{",
        '{"a": 1',
        "\ufeff",
        "nul",
        '["prompt"]',
        '{"prompt": "no images"}',
        '"text"',
    ],
    ids=lambda text: text[:9],
)
def test_a_line_that_is_no_row_costs_itself(tmp_path, hostile):
    good, bad = table(tmp_path, row("a cat"), hostile + "\n", row("a dog"), name="t.jsonl")
    assert good == ["a cat", "a dog"]
    assert list(bad) == [2]


@pytest.mark.parametrize(
    "label", ["9" * 5000, "9" * 401, "-" + "9" * 400, "NaN", "Infinity", "1e999", '"left"', "null", "[1]"]
)
def test_a_label_that_is_no_number_is_no_label(tmp_path, label):
    (tmp_path / "t.jsonl").write_text(row("a cat", label) + row("a dog"))
    odd, good = rows_from("table", path=str(tmp_path / "t.jsonl"))
    assert odd.label_0 is None or abs(odd.label_0) == float("inf")
    assert good.label_0 == 1


@pytest.mark.parametrize("words", [("True", "False"), ("yes", "no"), ("TRUE", "FALSE"), ("1.0", "0"), (" 1", "0 ")])
def test_labels_in_words_are_read_as_those_of_json(tmp_path, words):
    text = HEADER + "".join(line("a cat", f"a.png,b.png,{word}") for word in words)
    (tmp_path / "t.csv").write_text(text)
    assert [row.label_0 for row in rows_from("table", path=str(tmp_path / "t.csv"))] == [1, 0]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_prompt_list_loses_only_what_cannot_be_read(tmp_path, name):
    elements = [
        '"a cat"',
        "[" * 100_000 + "]" * 100_000,
        "9" * 5000,
        '{"prompt": "a [dog], {so}"}',
        "3",
        '"say \\"hi\\", you"',
    ]
    (tmp_path / name).write_text(f"[{', '.join(elements)}]" if name == "a.json" else "\n".join(elements))
    rows = rows_from("prompts", path=str(tmp_path / name))
    assert [row.prompt for row in rows if not isinstance(row, BadRow)] == ["a cat", "a [dog], {so}", 'say "hi", you']
    assert [row.row for row in rows if isinstance(row, BadRow)] == [1, 2, 4]


def test_an_index_loses_only_what_cannot_be_read(tmp_path):
    good = json.dumps({"prompt": "a cat", "image_path": ["a.png", "b.png"], "rank": [1, 2]})
    deep, huge = "[" * 100_000 + "]" * 100_000, good.replace("[1, 2]", f"[1, {'9' * 5000}]")
    (tmp_path / "train.json").write_text(f"[{good}, {deep}, {huge}, {good}]")
    rows = rows_from("hpdv2", path=str(tmp_path))
    assert [(getattr(row, "reason", "pair"), row.row) for row in rows] == [
        ("pair", "0:0-1"),
        ("malformed_row", 1),
        ("malformed_row", 2),
        ("pair", "3:0-1"),
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_one_prompt_that_is_not_utf_8_costs_itself(tmp_path, name):
    prompts = [b"a cat", b"\x92", b"nul \0", b"a dog"]
    if name != "a.txt":
        prompts = [b'"' + prompt.replace(b"\0", b"\\u0000") + b'"' for prompt in prompts]
    (tmp_path / name).write_bytes(b"[" + b", ".join(prompts) + b"]" if name == "a.json" else b"\r".join(prompts))
    rows = rows_from("prompts", path=str(tmp_path / name))
    kept = []
    for row in rows:
        with suppress(RejectedRow):
            kept.append(clean_prompt(row.prompt))
    assert len(rows) == 4
    assert kept == ["a cat", "nul \0", "a dog"]


def test_cells_nested_deeply_are_told(tmp_path):
    deep = row("a cat").replace('"a cat"', "[" * 900 + '"a cat"' + "]" * 900)
    good, bad = table(tmp_path, deep, row("a dog"), name="t.jsonl")
    assert (good, bad) == (["a dog"], {1: "column prompt: expected text, found a list"})


def test_the_plan_can_ask_a_table_that_is_none(tmp_path):
    for text in ("a;b\n1;2\n", "", HEADER):
        (tmp_path / "t.csv").write_text(text)
        module = plugins.load("sources", "table")
        assert module.needs_files(module.Config(path=str(tmp_path / "t.csv"))) == [tmp_path / "t.csv"]
