"""What prepare counts, refuses and says of rows that are no use to a training, though each can be read."""

import io
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import tiny
from attune.config.settings import AIFeedback
from attune.data.batches import PairBatch
from attune.data.ingest.encoder import MAX_PIXELS, is_full
from attune.data.ingest.rules import Rules, check_rows
from attune.data.labels import with_ai_feedback
from attune.data.quarantine import Quarantine, TooManyBadRows
from attune.data.rows import BadRow, Pair, Prompt, SourceError
from attune.data.store import PreparedData
from attune.diffusion.path import VP
from attune.interfaces import Conditioning
from raw_data import encoded, pixels


def pair(row=0, prompt="a cat", images=None, label_0=1.0, split="train") -> Pair:
    images = images or (encoded(pixels(2 * row)), encoded(pixels(2 * row + 1)))
    label_1 = None if label_0 is None else 1 - label_0
    return Pair(prompt, *images, label_0, label_1, split, "f", row)


def test_identical_images_are_counted_whatever_files_they_are_in(write, caplog):
    packed, bmp = encoded(pixels(0)), encoded(pixels(0), "BMP")
    rows = [
        pair(0, images=(packed, packed)),
        pair(1, images=(packed, bmp)),
        pair(2, images=(pixels(0), bmp)),
        pair(3, images=(packed, encoded(pixels(1)))),
        pair(4, images=(encoded(pixels(5, 8, 4)), encoded(pixels(5, 8, 4).reshape(8, 4, 3)))),  # the same bytes
    ]
    counts, bad = write(rows)
    assert (counts["identical_images"], counts["pairs"], bad) == (3, 5, {})
    assert "3 pairs show the same image twice" in caplog.text


def test_prompts_that_the_encoder_cuts_are_counted(write, backbone, caplog):
    limit = backbone.tokenizer.model_max_length
    fits = "a " * (limit - 2)  # the first and the last token are the encoder's own
    prompts = [fits, fits + "a", "a cat " * 400, "x" * 1_000_000, "a cat"]
    assert len(backbone.tokenizer(fits).input_ids) == limit
    counts, bad = write([Prompt(prompt, "train", "f", i) for i, prompt in enumerate(prompts)])
    assert (counts["cut_prompts"], counts["prompts"], bad) == (3, 5, {})
    assert "3 prompts are longer than the text encoder reads" in caplog.text


def test_nothing_is_warned_of_where_nothing_is_wrong(write, caplog):
    rows = [pair(0), Prompt("a dog", "test"), Prompt("bees", "validation")]
    counts, _ = write(rows)
    assert (counts["identical_images"], counts["cut_prompts"], counts["choices/train"]) == (0, 0, 1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_latents_and_scores_that_are_not_finite_cost_their_pairs(write, tmp_path, backbone, monkeypatch):
    """An autoencoder in half precision overflows for some images."""
    encode = backbone.encode_images

    def overflow(images):
        dark = images.mean((1, 2, 3)) < 0.1
        return torch.where(dark[:, None, None, None], torch.inf, encode(images))

    def score(images, prompts):
        return torch.tensor([float("nan") if "owl" in prompt else 0.5 for prompt in prompts])

    monkeypatch.setattr(backbone, "encode_images", overflow)
    black = encoded(np.zeros((16, 16, 3), np.uint8))
    rows = [pair(0), pair(1, "a dog", (encoded(pixels(9)), black)), pair(2, "an owl"), pair(3, "bees")]
    counts, bad = write(rows, {"mine": score})
    assert {row: (each["reason"], each["detail"]) for row, each in bad.items()} == {
        "1": ("not_finite", "the latents of image 1"),
        "2": ("not_finite", "the score by mine of image 0; the score by mine of image 1"),
    }
    assert counts["pairs"] == 2
    assert torch.isfinite(PreparedData.read(tmp_path / "prepared", "train").latents.tensor()).all()


def test_a_prompt_whose_embedding_is_not_finite_is_named(write, backbone, monkeypatch):
    encode = backbone.encode_prompts

    def overflow(prompts):
        bad = torch.tensor(["owl" in prompt for prompt in prompts])[:, None, None]
        return Conditioning({k: torch.where(bad, torch.nan, v) for k, v in encode(prompts).tensors.items()})

    monkeypatch.setattr(backbone, "encode_prompts", overflow)
    with pytest.raises(SourceError, match=r"prompt_embeds of the prompt 'an owl' is not finite; remove the prompt, or"):
        write([Prompt("a cat", "train"), Prompt("an owl", "train")])


def test_photographs_are_scored_by_their_pixels(write):
    """Each has more pixels than a batch may, so that memory does not grow with their number."""
    sizes = []

    def score(images, prompts):
        sizes.append(tuple(images.shape))
        return torch.zeros(len(images))

    def photograph(shade: int) -> bytes:
        with io.BytesIO() as file:
            Image.new("RGB", (2000, 1500), (shade, 0, 0)).save(file, "JPEG")
            return file.getvalue()

    small = [pair(i) for i in range(40)]
    large = [pair(100 + i, "a dog", (photograph(40 * i), photograph(40 * i + 20))) for i in range(3)]
    write([*small, *large], {"mine": score})
    assert [size for size in sizes if size[2:] == (1500, 2000)] == [(1, 3, 1500, 2000)] * 6
    assert sorted(size[0] for size in sizes if size[2:] == (16, 16)) == [16, 64]
    assert is_full(2, MAX_PIXELS + 1)
    assert not is_full(1, 10 * MAX_PIXELS)
    assert not is_full(64, MAX_PIXELS)
    assert is_full(65, 1)


# --- too bad, too little ----------------------------------------------------------------------------------


def test_what_is_there_twice_or_in_a_later_split_is_not_bad(write):
    rows = [pair(0), *(pair(0) for _ in range(5)), pair(1, "a dog"), Prompt("a dog", "test"), BadRow("unused_file")]
    counts, _ = write(rows, max_bad_share=0.0)
    assert (counts["quarantined/duplicate_pair"], counts["quarantined/prompt_in_later_split"]) == (5, 1)
    with pytest.raises(
        TooManyBadRows, match=r"1 of 10 rows are bad, .* 0\.0: no_label 1; see .* first is 'f row 9: no_la"
    ):
        write([*rows, pair(9, label_0=None)], max_bad_share=0.0)


def checked(tmp_path, rows, **rules) -> None:
    with Quarantine(tmp_path / "q.csv", "test") as quarantine:
        check_rows(rows, quarantine, Rules(**rules))


def test_labels_and_prompts_are_judged_without_an_image(tmp_path):
    lost = (tmp_path / "none.png", None)
    rows = [
        pair(0, images=lost),
        pair(1, images=lost, label_0=float("nan")),
        pair(2, "", lost),
        BadRow("malformed_row"),
    ]
    checked(tmp_path, rows, max_bad_share=0.75)
    with pytest.raises(TooManyBadRows, match=r"3 of 4 rows are bad, .*no_label 1, empty_prompt 1, malformed_row 1"):
        checked(tmp_path, rows, max_bad_share=0.7)
    assert len((tmp_path / "q.csv").read_text().splitlines()) == 4


WANTED = {"prompts/train": 1, "pairs/train": 1, "choices/train": 1}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([pair(i, label_0=0.5) for i in range(6)], r"0 train pairs that are no ties, .* 6 train pairs, 6 of them ties"),
        ([pair(0, "a", split="test"), Prompt("b", "train")], r"0 train pairs, .* 0 train pairs.* 1 test pairs, and in"),
        ([pair(0, label_0=None), Prompt("b", "train")], r"0 train pairs, .* in the quarantine 1 no_label$"),
        ([pair(0, label_0=None)], r"no usable row; there are .* in the quarantine 1 no_label$"),
        ([], r"no usable row; there are .* in the quarantine no row$"),
    ],
    ids=["ties", "in test", "unlabelled", "nothing good", "nothing"],
)
def test_no_usable_pair_is_an_error_that_says_why(tmp_path, write, rows, says):
    with pytest.raises(SourceError, match=says):
        write(rows, wanted=WANTED)
    with pytest.raises(SourceError, match=says):
        checked(tmp_path, rows, max_bad_share=1.0, wanted=WANTED)


def test_prompts_alone_are_enough_where_no_run_asks_for_pairs(tmp_path, write):
    write([Prompt("a cat", "train")], wanted={"prompts/train": 1})
    checked(tmp_path, [Prompt("a cat", "train")], wanted={"prompts/train": 1})


@pytest.mark.parametrize("label_0", [float("nan"), -1.0, 2.0])
def test_a_label_that_is_none_is_not_read_from_prepared_data(write, tmp_path, label_0):
    write([pair(0), pair(1, "a dog")])
    file = tmp_path / "prepared/pairs.parquet"
    pd.read_parquet(file).assign(label_0=[1.0, label_0]).to_parquet(file, index=False)
    with pytest.raises(ValueError, match=rf"pairs\.parquet is damaged: row 1 has label_0 {label_0}; run the prepare"):
        PreparedData.read(tmp_path / "prepared", "train")


# --- labels and batches -----------------------------------------------------------------------------------


def test_a_threshold_of_zero_makes_hard_labels():
    pairs = pd.DataFrame({"label_0": [0.0, 0.0, 1.0], "s_0": [0.2, 0.1, 0.1], "s_1": [0.1, 0.1, 0.2]})
    hard = with_ai_feedback(pairs, AIFeedback(scorer="s", threshold=0.0))
    assert hard.label_0.tolist() == [1.0, 0.5, 0.0]


def test_every_timestep_can_be_drawn():
    latents = torch.zeros(500, 1, 1, 1)
    batch = PairBatch(["a"] * 500, Conditioning({}), latents, latents, torch.ones(500), torch.ones(500))
    t, _ = batch.draw_noise(VP(torch.zeros(4)), tiny.draws(500))
    assert set(t.tolist()) == {0, 1, 2, 3}
