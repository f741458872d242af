"""Labels and splits of the published data sets: what their flags mean, and whose test prompts they are."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from attune.data.ingest.rules import label
from attune.data.quarantine import RejectedRow
from attune.data.rows import Pair
from attune.data.splits import hashed_split
from raw_data import image, pixels, rows_from

NOTHING = {"label_0": None, "label_1": None}
FLAGS = [
    ({"label_0": 1.0, "label_1": 0.0}, (1.0, 0.0)),
    ({"label_0": 0.0, "label_1": 1.0}, (0.0, 1.0)),
    ({"label_0": 1.0, "label_1": 0.0, "are_different": False}, (0.5, 0.5)),
    ({"label_0": 1.0, "label_1": 0.0, "has_label": False}, (None, None)),
    ({"label_0": 1.0, "label_1": 0.0, "has_label": False, "are_different": False}, (None, None)),
    (NOTHING | {"are_different": False}, (None, None)),  # nobody was asked, so it is no tie
    (NOTHING, (None, None)),
]


@pytest.mark.parametrize(("columns", "labels"), FLAGS, ids=str)
def test_what_the_flags_of_pickapic_mean(tmp_path, columns, labels):
    row = {"caption": "a cat", "jpg_0": image(0), "jpg_1": image(1), "has_label": True, "are_different": True}
    kinds = pa.schema([("label_0", pa.float64()), ("label_1", pa.float64())])
    table = pa.Table.from_pylist([row | columns])
    for field in kinds:
        table = table.set_column(table.column_names.index(field.name), field, table[field.name].cast(field.type))
    pq.write_table(table, tmp_path / "a.parquet")
    (pair,) = rows_from("pickapic", path=str(tmp_path))
    assert (pair.label_0, pair.label_1) == labels
    if labels[0] is None:
        with pytest.raises(RejectedRow, match="no_label"):
            label(pair)
    else:
        assert label(pair) == labels[0]


@pytest.mark.parametrize(("limit", "shards"), [(None, 3), (1.0, 3), (25e-6, 2), (15e-6, 1)])
def test_max_gb_ends_the_reading_of_shards(tmp_path, limit, shards):
    """Three shards of 10 kB or a little more: 25 kB are two of them, 15 kB one."""
    for i in range(3):
        rows = [{"caption": f"p{i}", "jpg_0": noise(2 * i), "jpg_1": noise(2 * i + 1), "label_0": 1.0}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{i}.parquet", compression="none")
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert all(10_000 < size < 12_400 for size in sizes)
    found = rows_from("pickapic", path=str(tmp_path), max_gb=limit)
    assert [row.prompt for row in found] == [f"p{i}" for i in range(shards)]


def noise(seed):
    """A PNG of 40 x 40 random pixels, about 4.9 kB."""
    with io.BytesIO() as file:
        Image.fromarray(pixels(seed, 40, 40)).save(file, "PNG")
        return file.getvalue()


@pytest.fixture
def hpdv2(tmp_path):
    """Thirty prompts to train on, and a test file of one."""
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    for i in range(2):
        (tmp_path / f"train/{i}.jpg").write_bytes(image(i, "JPEG"))
        (tmp_path / f"test/{i}.jpg").write_bytes(image(i, "JPEG"))
    names = ["0.jpg", "1.jpg"]
    train = [{"prompt": f"prompt {i}", "file_path": names, "human_preference": [1, 0]} for i in range(30)]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "test.json").write_text(json.dumps([{"prompt": "owls", "image_path": names, "rank": [1, 2]}]))
    return tmp_path


def test_a_data_set_with_test_prompts_of_its_own_takes_none_from_train(hpdv2):
    """Of thirty prompts at a share of 0.4 about twelve would be tested, if there were no test.json."""
    rows = [row for row in rows_from("hpdv2", path=str(hpdv2), validation_share=0.2, test_share=0.4)]
    pairs = [row for row in rows if isinstance(row, Pair)]
    assert {row.prompt for row in pairs if row.split == "test"} == {"owls"}
    own = [row for row in pairs if row.file == "train.json"]
    assert [row.split for row in own] == [hashed_split(row.prompt, 0.2, 0.0) for row in own]
    assert {row.split for row in own} == {"train", "validation"}
    (hpdv2 / "test.json").unlink()
    rows = rows_from("hpdv2", path=str(hpdv2), validation_share=0.2, test_share=0.4)
    assert [row.split for row in rows] == [hashed_split(row.prompt, 0.2, 0.4) for row in rows]
    assert "test" in {row.split for row in rows}
