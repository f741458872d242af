"""Quarantine and the writing of prepared data: what is kept, what is not, and why."""

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from attune.data.quarantine import Quarantine, TooManyBadRows, escape_csv_cell
from attune.data.rows import BadRow, Pair, Prompt, Quota, SourceError
from attune.data.splits import SPLITS, count_rows
from attune.data.store import PreparedData
from raw_data import bomb, encoded, pixels

# --- quarantine -------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =1", "\n=1"])
def test_no_cell_is_a_formula(text):
    assert escape_csv_cell(text) == "'" + text


def test_quarantine_survives_any_text(tmp_path):
    prompt = 'a, "quoted"\nprompt \udc80 \0 <b>'
    with Quarantine(tmp_path / "q.csv", "table") as quarantine:
        quarantine.add("no_label", "=cmd.csv", 3, prompt, "=expected")
        quarantine.add("empty_prompt", "f", "7:0-1", None)
        assert len(rows_of(tmp_path / "q.csv")) == 2  # on disk at once: a run that dies leaves them
    first, second = rows_of(tmp_path / "q.csv")
    assert first == {
        "source": "table",
        "file": "'=cmd.csv",
        "row": "3",
        "prompt": 'a, "quoted"\nprompt \\udc80  <b>',
        "reason": "no_label",
        "detail": "'=expected",
    }
    assert second["row"] == "7:0-1"
    assert second["prompt"] == ""


def test_an_empty_quarantine_is_a_header(tmp_path):
    with Quarantine(tmp_path / "q.csv", "world"):
        pass
    assert (tmp_path / "q.csv").read_text() == "source,file,row,prompt,reason,detail\n"


# --- writing ----------------------------------------------------------------------------------------------


@pytest.fixture
def write(write):
    """As everywhere, but of the quarantine's rows the reasons alone."""

    def run(rows, scorers=None, **rules):
        counts, found = write(rows, scorers, **rules)
        return counts, {number: row["reason"] for number, row in found.items()}

    return run


def pair(row=0, prompt="a cat", images=None, label_0=1.0, label_1=None, split="train", **more) -> Pair:
    images = images or (encoded(pixels(2 * row)), encoded(pixels(2 * row + 1)))
    label_1 = 1 - label_0 if label_1 is None and label_0 is not None else label_1
    return Pair(prompt, *images, label_0, label_1, split, "f", row, **more)


def test_a_mapped_split_equals_one_in_memory(write, tmp_path, backbone):
    prompts = ["a cat", "a dog", "two owls"]
    rows = [pair(i, prompts[i % 3], label_0=float(i % 2), split="train") for i in range(70)]
    rows += [Prompt("no hen", "test"), pair(70, "bees", split="validation"), Prompt("a cow", "train")]
    counts, bad = write(rows)
    assert not bad
    assert counts["pairs"] == 71
    images = torch.from_numpy(np.stack([pixels(i) for i in range(142)])).permute(0, 3, 1, 2).contiguous()
    latents = torch.cat([backbone.encode_images(part.float() / 255) for part in images.split(64)])
    data = PreparedData.read(tmp_path / "prepared", "train")
    assert data.prompts == [*prompts, "a cow"]
    assert torch.equal(data.latents.tensor(), latents)
    known = backbone.encode_prompts([*prompts, "a cow", "bees", "no hen"])
    batch = data.pair_batch([5, 0, 69])
    assert batch.prompts == ["two owls", "a cat", "a cat"]
    assert torch.equal(batch.latents_0, latents[[10, 0, 138]])
    assert torch.equal(batch.latents_1, latents[[11, 1, 139]])
    assert batch.label_0.tolist() == [1, 0, 1]
    for name, value in known.tensors.items():
        assert torch.equal(batch.cond.tensors[name], value[[2, 0, 0]])
        assert torch.equal(data.prompt_batch([3, 1]).cond.tensors[name], value[[3, 1]])
    held_out = PreparedData.read(tmp_path / "prepared", "test")
    assert (held_out.prompts, len(held_out.pairs)) == (["no hen"], 0)
    assert torch.equal(held_out.cond.tensors["prompt_embeds"].tensor(), known.tensors["prompt_embeds"][5:])


def test_prompts_alone_are_data_too(write, tmp_path, backbone, caplog):
    counts, _ = write([Prompt("a cat", "train"), Prompt("a dog", "test"), Prompt("a cat", "train")])
    assert (counts["prompts"], counts["pairs"], counts["tie_share"]) == (2, 0, 0.0)
    data = PreparedData.read(tmp_path / "prepared", "train")
    assert data.prompt_batch([0]).prompts == ["a cat"]
    assert data.latents.shape == (0, *backbone.latent_shape)
    assert data.pairs.empty
    assert [record.message.partition(":")[0] for record in caplog.records] == ["no validation prompts"]


def test_an_image_that_several_pairs_share_is_encoded_once(write, tmp_path):
    a, b, c = (encoded(pixels(i)) for i in range(3))
    (tmp_path / "a.png").write_bytes(a)
    write([pair(0, images=(a, b)), pair(1, images=(c, a)), pair(2, images=(tmp_path / "a.png", c), label_0=0.5)])
    data = PreparedData.read(tmp_path / "prepared", "train", keep_ties=True)
    assert len(data.latents) == 3
    assert data.pairs[["image_0", "image_1"]].to_numpy().tolist() == [[0, 1], [2, 0], [0, 2]]
    assert len(PreparedData.read(tmp_path / "prepared", "train").pairs) == 2  # without the tie


def test_every_rule_has_its_reason(write, tmp_path):
    good = encoded(pixels(90)), encoded(pixels(91))
    (tmp_path / "folder.png").mkdir()
    rows = [
        pair(1),
        pair(2, "  ", good),
        pair(3, None, good),
        pair(4, "\udc80", good),
        pair(5, "a dog", good, label_0=None),
        pair(6, "a dog", good, label_0=float("nan"), label_1=1.0),
        pair(7, "a dog", good, label_0=1.0, label_1=1.0),
        pair(8, "a dog", good, label_0=0.7),
        pair(9, "a dog", (good[0], None)),
        pair(10, "a dog", (tmp_path / "none.png", good[1])),
        pair(11, "a dog", (tmp_path / "folder.png", good[1])),
        pair(12, "a dog", (b"\xff\xd8 no jpeg", good[1])),
        pair(13, "a dog", (good[0], bomb())),
        pair(14, "a dog", (encoded(pixels(92, 40, 7)), good[1])),
        BadRow("malformed_row", "f", 15),
        pair(16, "a dog", good),
        pair(17, "a dog", good),
        pair(18, "a dog", good[::-1], label_0=0.0),  # the same choice told the other way round
        pair(19, "a dog", good, label_0=0.0),  # another choice: people disagree
        pair(20, "a dog", (good[0], encoded(pixels(93, 30, 20)))),
        Prompt("", "train", "f", 21),
    ]
    counts, bad = write(rows, min_side=8)
    reasons = {
        "empty_prompt": ("2", "3", "21"),
        "malformed_row": ("4", "15"),
        "no_label": ("5", "6"),
        "label_sum": ("7",),
        "label_value": ("8",),
        "missing_image": ("9", "10", "11"),
        "undecodable": ("12",),
        "too_large": ("13",),
        "too_small": ("14",),
        "duplicate_pair": ("17", "18"),
    }
    assert bad == {row: reason for reason, rows in reasons.items() for row in rows}
    assert counts["quarantined"] == len(bad)
    assert {k.partition("/")[2]: v for k, v in counts.items() if k.startswith("quarantined/")} == {
        reason: len(rows) for reason, rows in reasons.items()
    }
    assert counts["pairs"] == 4
    assert counts["mixed_sizes"] == 1


def test_a_prompt_stays_in_its_last_split(write, tmp_path):
    rows = [
        pair(1, "a cat", split="train"),
        pair(2, "A  Cat", split="validation"),
        pair(3, "a dog", split="validation"),
        pair(4, "a dog", split="train"),
        pair(5, "bees", split="train"),
        Prompt("a cat", "test", "list", 6),
        Prompt("a dog", "train", "list", 7),
    ]
    counts, bad = write(rows)
    assert bad == dict.fromkeys("1247", "prompt_in_later_split")
    table = pd.read_parquet(tmp_path / "prepared/prompts.parquet")
    assert table.to_numpy().tolist() == [["bees", "train"], ["a dog", "validation"], ["a cat", "test"]]
    assert counts["pairs"] == 2


def test_enough_is_enough(write):
    quota = Quota({"train": 2, "validation": 1})
    rows = [pair(i, f"prompt {i}", split=("train", "validation", "test")[i % 3]) for i in range(12)]
    rows[0] = pair(0, "", split="train")  # a bad row does not count
    counts, bad = write(rows, quota=quota)
    assert bad == {"0": "empty_prompt"}
    assert {s: counts[f"pairs/{s}"] for s in ("train", "validation", "test")} == {
        "train": 2,
        "validation": 1,
        "test": 4,
    }
    read = []
    rows = (read.append(i) or pair(i) for i in range(12))
    quota = Quota({"train": 3})
    for _ in quota.take_until_full(rows, "train"):
        quota.taken["train"] += 1
    assert read == [0, 1, 2]


def test_too_many_bad_rows_stop_the_stage_and_leave_the_quarantine(write, tmp_path):
    rows = [pair(i, label_0=None) for i in range(3)] + [pair(3, prompt="")] + [pair(i) for i in range(4, 10)]
    with pytest.raises(TooManyBadRows, match=r"4 of 10 rows are bad, more than data\.max_bad_share 0\.3: no_label 3, "):
        write(iter(rows), max_bad_share=0.3)
    assert len(rows_of(tmp_path / "quarantine.csv")) == 4
    assert not (tmp_path / "prepared").exists()
    write(iter(rows), max_bad_share=0.4)


def test_a_hopeless_source_is_not_read_to_its_end(write):
    read = []
    endless = (read.append(i) or BadRow("malformed_row", "f", i) for i in range(10**6))
    with pytest.raises(TooManyBadRows):
        write(endless, max_bad_share=0.5)
    assert len(read) == 1024  # rows are judged a chunk at a time


def test_no_row_at_all_is_an_error_and_old_data_stays_until_new_is_whole(write, tmp_path):
    write([pair(0)])
    with pytest.raises(SourceError, match="no usable row"):
        write([])
    assert len(PreparedData.read(tmp_path / "prepared", "train").pairs) == 1
    write([pair(1, "a dog")])
    assert PreparedData.read(tmp_path / "prepared", "train").prompts == ["a dog"]
    assert not (tmp_path / "prepared.part").exists()


def test_too_few_of_what_is_wanted_stop_before_prompts_are_encoded_and_old_data_stays(write, tmp_path, monkeypatch):
    write([pair(0)])
    monkeypatch.setattr("attune.data.ingest.write.encode_prompts", None)
    with pytest.raises(SourceError, match=r"1 test prompts, but 2 are needed by generate\.prompts"):
        write([pair(1, "a dog"), Prompt("a cat", "test")], wanted={"prompts/train": 1, "prompts/test": 2})
    assert PreparedData.read(tmp_path / "prepared", "train").prompts == ["a cat"]


def test_prompts_do_not_change_when_only_pairs_do(write, tmp_path):
    """Images are generated from prompts.parquet; no other label, image, score, column or pair may touch it."""

    def rows(shift, label_0, **more):
        splits = {"a cat": "train", "a dog": "test", "bees": "train", "A  Dog": "train", "a hen": "validation"}
        for i, (prompt, split) in enumerate(splits.items()):
            yield pair(i + shift, prompt, label_0=label_0, split=split, **more)
        yield Prompt("an owl", "test")

    def written(rows, scorers=None):
        write(rows, scorers)
        folder = tmp_path / "prepared"
        return (folder / "prompts.parquet").read_bytes(), pd.read_parquet(folder / "pairs.parquet")

    prompts, pairs = written(rows(0, 1.0))
    more_pairs = [*rows(40, 0.5, extra={"utility_0": 1.0}), *(pair(90 + i, "bees") for i in range(3))]
    changed, other_pairs = written(more_pairs, {"score": lambda images, prompts: images.mean((1, 2, 3))})
    assert changed == prompts
    assert len(other_pairs) == len(pairs) + 3
    assert {"utility_0", "score_0"} <= {*other_pairs} - {*pairs}


def test_rows_are_counted_as_they_will_be_written(write):
    """As long as all are good: spellings, leaks into later splits, and quotas count as they do in the tables."""
    rows = [pair(i, f"prompt {i % 7}", split=SPLITS[i % 3]) for i in range(20)]
    rows += [Prompt("PROMPT  0", "train"), Prompt(" new ", "train"), Prompt("new", "train"), Prompt("New", "train")]
    limits = {"train": 5, "validation": 4}
    counts, _ = write(rows, quota=Quota(limits))
    counted = count_rows([*rows, BadRow("malformed_row"), Prompt(" ", "test")], Quota(limits))
    assert counted == {name: counts[name] for name in counted}
    kinds = {f"{kind}/{split}" for kind in ("prompts", "pairs") for split in SPLITS}
    assert set(counted) == kinds | {"choices/train"}


def test_scorers_see_the_image_at_its_own_size(write, tmp_path):
    """Brightness and width tell from the scores which image was shown, and how large."""
    seen = []

    def brightness(images, prompts):
        seen.append((tuple(images.shape), tuple(prompts)))
        assert not torch.is_grad_enabled()
        return images.mean((1, 2, 3))

    def width(images, prompts):
        return torch.full((len(images),), float(images.shape[3]))

    sizes = [(20, 12), (16, 16), (20, 12), (9, 31)]
    rows = [
        pair(i, f"prompt {i % 2}", (encoded(pixels(0, *sizes[0])), encoded(pixels(i + 1, *sizes[i])))) for i in range(4)
    ]
    write(rows, {"brightness": brightness, "width": width})
    pairs = pd.read_parquet(tmp_path / "prepared/pairs.parquet")
    shared = pixels(0, 20, 12).mean() / 255
    assert pairs.brightness_0.tolist() == pytest.approx([shared] * 4, abs=1e-6)
    assert pairs.brightness_1.tolist() == pytest.approx(
        [pixels(i + 1, *sizes[i]).mean() / 255 for i in range(4)], abs=1e-6
    )
    assert pairs.width_1.tolist() == [20, 16, 20, 9]
    assert sum(shape[0] for shape, _ in seen) == 6  # four images of one prompt each, and the shared one for two


def test_data_that_is_not_prepared_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the prepare stage first"):
        PreparedData.read(tmp_path, "train")
