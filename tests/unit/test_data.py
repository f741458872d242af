"""Images, arrays, quarantine and the writing of prepared data: what is kept, what is not, and why."""

import csv
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from attune.data.arrays import ArrayFile, read_array
from attune.data.images import decode, resize_center_crop
from attune.data.ingest.ingest import Rules
from attune.data.ingest.reader import ImageReader
from attune.data.ingest.write import write_prepared
from attune.data.quarantine import Quarantine, RejectedRow, TooManyBadRows, escape_csv_cell
from attune.data.rows import BadRow, Pair, Prompt, Quota, SourceError
from attune.data.sources._labels import ranked_pairs
from attune.data.splits import SPLITS, check_splits, count_rows, hashed_split, normalize_prompt
from attune.data.store import PreparedData


def pixels(seed: int, width: int = 16, height: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


# --- images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_lossless_images_come_back_to_the_bit(kind, options):
    image = decode(encoded(pixels(0, 20, 12), kind, **options))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels(0, 20, 12))


def test_a_jpeg_comes_back_nearly():
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    assert np.abs(np.asarray(decode(encoded(flat, "JPEG", quality=95))).astype(int) - flat).max() <= 3


def test_rotation_in_exif_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image = decode(encoded(pixels(0, 20, 12), "PNG", exif=exif))
    assert image.size == (12, 20)
    assert np.array_equal(np.asarray(image), np.rot90(pixels(0, 20, 12), -1))


def test_transparency_lies_over_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.paste((0, 0, 255, 128), (0, 0, 2, 4))
    shown = np.asarray(decode(encoded(half)))
    assert (shown[:, 2:] == 255).all()  # not the red that lies under full transparency
    assert np.abs(shown[:, :2].astype(int) - (127, 127, 255)).max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(1, (0, 0, 2, 4))
    shown = np.asarray(decode(encoded(palette, transparency=0)))
    assert (shown[0, 0] == (0, 0, 255)).all()
    assert (shown[0, 3] == 255).all()


def test_other_colours_become_rgb():
    grey = np.asarray(decode(encoded(Image.new("L", (4, 4), 77))))
    assert (grey == 77).all()
    deep = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    assert (np.asarray(decode(encoded(deep))) == 127).all()  # `convert` alone would clip it to white
    cmyk = np.asarray(decode(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")))
    assert (cmyk == (255, 0, 0)).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 8, 7])
    assert (np.asarray(decode(encoded(palette))) == (9, 8, 7)).all()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "undecodable"),
        (b"not an image", "undecodable"),
        (encoded(pixels(0, 64, 64))[:-2000], "undecodable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable"),  # a format that runs a program
        (bomb(), "too_large"),
    ],
    ids=["empty", "text", "cut off", "postscript", "bomb"],
)
def test_what_is_no_image_has_a_reason(data, reason):
    with pytest.raises(RejectedRow, match=f"^{reason}$"):
        decode(data)


def test_a_square_keeps_the_centre_and_stretches_nothing():
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 255  # the middle third is white
    assert (resize_center_crop(Image.fromarray(wide), 16) == 255).all()
    tall = resize_center_crop(Image.fromarray(wide.transpose(1, 0, 2)), 8)
    assert tall.shape == (8, 8, 3)
    assert (tall[1:-1] > 240).all()
    assert np.array_equal(resize_center_crop(Image.fromarray(pixels(1)), 16), pixels(1))


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize_center_crop(Image.fromarray(stripes), 16).astype(int)[:, 1:-1] - 127).max() < 3


@pytest.mark.parametrize("size", [(16, 17), (33, 16), (1, 90), (7, 7)])
def test_any_size_becomes_the_square(size):
    assert resize_center_crop(Image.fromarray(pixels(0, *size)), 16).shape == (16, 16, 3)


def test_an_image_is_decoded_again_only_where_its_pixels_are_needed(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(pixels(0, 20, 12)))
    reader = ImageReader(min_side=8)
    first = reader.read(tmp_path / "a.png", lambda digest: False)
    assert (first.size, first.image.size) == ((20, 12), (20, 12))  # new, so decoded whatever is needed
    same = reader.read(encoded(pixels(0, 20, 12)), lambda digest: False)
    assert (same.digest, same.size, same.image) == (first.digest, (20, 12), None)
    assert reader.read(tmp_path / "a.png", lambda digest: digest == first.digest).image is not None
    for _ in range(2):
        with pytest.raises(RejectedRow, match=r"^too_small$"):
            reader.read(encoded(pixels(1, 20, 7)), lambda digest: True)


# --- arrays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_array_grows_and_is_read_through_a_map(tmp_path, dtype):
    parts = [torch.randn(n, 3, 2).to(dtype) for n in (4, 1, 7)]
    with ArrayFile(tmp_path / "a.npy") as file:
        for part in parts:
            file.append(part)
    whole = torch.cat(parts)
    mapped = read_array(tmp_path / "a.npy")
    assert mapped.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert torch.equal(mapped, whole.to(mapped.dtype))
    rows = torch.tensor([11, 0, 5, 5])
    assert torch.equal(mapped[rows], whole[rows].to(mapped.dtype))
    assert np.array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), mapped.numpy())


def test_a_mapped_array_cannot_change_the_file(tmp_path):
    with ArrayFile(tmp_path / "a.npy") as file:
        file.append(torch.ones(3, 2))
    read_array(tmp_path / "a.npy").zero_()
    assert (read_array(tmp_path / "a.npy") == 1).all()


def test_rows_of_another_shape_are_refused(tmp_path):
    with ArrayFile(tmp_path / "a.npy") as file:
        file.append(torch.ones(3, 2))
        with pytest.raises(ValueError, match=r"a\.npy: rows of .* among rows of"):
            file.append(torch.ones(3, 4))


def test_an_array_may_have_no_rows(tmp_path):
    with ArrayFile(tmp_path / "a.npy") as file:
        file.append(torch.zeros(0, 4, 8, 8))
    assert read_array(tmp_path / "a.npy").shape == (0, 4, 8, 8)


# --- prompts, labels, splits ------------------------------------------------------------------------------


def test_the_split_of_a_prompt_is_its_own():
    prompts = [f"prompt {i}" for i in range(4000)]
    splits = pd.Series([hashed_split(p, 0.1, 0.2) for p in prompts])
    shares = splits.value_counts(normalize=True)
    assert shares["test"] == pytest.approx(0.2, abs=0.02)
    assert shares["validation"] == pytest.approx(0.1, abs=0.02)
    assert [hashed_split(p.upper() + "  ", 0.1, 0.2) for p in prompts] == splits.tolist()
    assert {hashed_split(p, 0, 0) for p in prompts} == {"train"}
    # a larger test share only adds to the test split
    assert all(hashed_split(p, 0.1, 0.3) == "test" for p, s in zip(prompts, splits, strict=True) if s == "test")


def test_ranks_make_every_pair_once():
    assert ranked_pairs([2, 1, 2]) == [(0, 1, 0.0), (0, 2, 0.5), (1, 2, 1.0)]
    assert normalize_prompt("  A   Cat ") == normalize_prompt("a cat")


def test_too_few_of_a_split_name_what_asks_and_what_to_set():
    counts = {"prompts/test": 12, "prompts/validation": 3, "pairs/train": 0}
    check_splits(counts, {"prompts/test": 12, "prompts/validation": 3})
    check_splits(counts, {"prompts/train": 1000})  # not known yet
    with pytest.raises(SourceError) as error:
        check_splits(counts, {"prompts/test": 240, "prompts/validation": 3, "pairs/train": 1})
    first, second = str(error.value).split("; ")
    assert first.startswith("data: 12 test prompts, but 240 are needed by generate.prompts: set data.test_list, ")
    assert "data.test_share" in first
    assert "lower generate.prompts" in first
    assert second.startswith("data: 0 train pairs, but 1 are needed by the runs that learn from pairs: choose a data.s")


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
        quarantine.add("no_label", "=cmd.csv", 3, prompt)
        quarantine.add("empty_prompt", "f", "7:0-1", None)
        assert len(rows_of(tmp_path / "q.csv")) == 2  # on disk at once: a run that dies leaves them
    first, second = rows_of(tmp_path / "q.csv")
    assert first == {
        "source": "table",
        "file": "'=cmd.csv",
        "row": "3",
        "prompt": 'a, "quoted"\nprompt \\udc80  <b>',
        "reason": "no_label",
    }
    assert second["row"] == "7:0-1"
    assert second["prompt"] == ""


def test_an_empty_quarantine_is_a_header(tmp_path):
    with Quarantine(tmp_path / "q.csv", "world"):
        pass
    assert (tmp_path / "q.csv").read_text() == "source,file,row,prompt,reason\n"


# --- writing ----------------------------------------------------------------------------------------------


@pytest.fixture
def backbone(new_policy):
    return new_policy(adapter=False).backbone


@pytest.fixture
def write(tmp_path, backbone):
    """Writes rows to tmp_path/prepared; returns the counts and the reasons by row."""

    def run(rows, scorers=None, **rules):
        rules = Rules(**({"max_bad_share": 1.0} | rules))
        with Quarantine(tmp_path / "quarantine.csv", "test") as quarantine:
            counts = write_prepared(tmp_path / "prepared", rows, backbone, scorers or {}, quarantine, rules)
        return counts, {row["row"]: row["reason"] for row in rows_of(tmp_path / "quarantine.csv")}

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
    assert torch.equal(data.latents, latents)
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
    assert torch.equal(held_out.cond.tensors["prompt_embeds"], known.tensors["prompt_embeds"][5:])


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
    data = PreparedData.read(tmp_path / "prepared", "train")
    assert len(data.latents) == 5  # an image of a bad pair is not encoded


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
    assert len(read) == 1000


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
    monkeypatch.setattr("attune.data.ingest.write.write_prompts", None)
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
    assert set(counted) == {f"{kind}/{split}" for kind in ("prompts", "pairs") for split in SPLITS}


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
