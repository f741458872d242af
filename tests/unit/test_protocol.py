"""The protocol: its identity, the noise it fixes, and the tables it guards."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from attune.evaluation.protocol import (
    Protocol,
    assert_comparable,
    check_scores,
    hash_prompts,
    read_comparable,
    read_scores,
    write_scores,
)

PROMPTS = ["a red circle", "two blue squares"]
PROTOCOL = Protocol(
    prompt_set_sha=hash_prompts(PROMPTS),
    n_prompts=2,
    images_per_prompt=2,
    sampler="ddim",
    steps=20,
    eta=1.0,
    guidance_scale=5.0,
    resolution=32,
    dtype="float32",
    seed=0,
    scorers=(("pickscore", "a4e4367c6dfa", "bicubic 224"), ("oracle", "3f2a", "pixels")),
    autoencoder="0123456789ab float32",
)
OTHER = {
    "prompt_set_sha": "0" * 12,
    "n_prompts": 3,
    "images_per_prompt": 1,
    "sampler": "dpm",
    "steps": 21,
    "eta": 0.0,
    "guidance_scale": 7.5,
    "resolution": 64,
    "dtype": "float16",
    "seed": 1,
    "scorers": (("oracle", "3f2a", "pixels"), ("pickscore", "other", "bicubic 224")),
    "autoencoder": "0123456789ab float16",
}


def table() -> pd.DataFrame:
    rows = [(p, k, f"{i}{k}.png", 0.1 * i + k, 20.0 + k, 0.5) for i, p in enumerate(PROMPTS) for k in range(2)]
    return pd.DataFrame(rows, columns=["prompt", "ordinal", "file", "oracle", "pickscore", "oracle.appeal"])


@pytest.mark.parametrize("field", [field.name for field in fields(Protocol)])
def test_every_field_changes_the_sha_and_forbids_comparison(field):
    changed = replace(PROTOCOL, **{field: OTHER[field]})
    assert changed.sha != PROTOCOL.sha
    with pytest.raises(ValueError, match=rf"base and spo .*\({field}: ") as error:
        assert_comparable({"base": PROTOCOL, "dpo": PROTOCOL, "spo": changed})
    assert "dpo" not in str(error.value)


def test_equal_protocols_are_comparable_however_written():
    same = replace(PROTOCOL, eta=1, guidance_scale=5, scorers=[list(s) for s in PROTOCOL.scorers[::-1]])
    assert same == PROTOCOL
    assert same.sha == PROTOCOL.sha
    assert_comparable({"base": PROTOCOL, "spo": same})


def test_sha_is_stable():
    """Stored beside published numbers: a change here orphans every score made so far."""
    assert len(PROTOCOL.sha) == 12
    canonical = json.dumps(PROTOCOL.to_dict(), sort_keys=True, separators=(",", ":"))
    assert '"eta":1.0' in canonical
    assert PROTOCOL.sha == "22b684ee663d"


def test_dict_round_trip_through_json_and_its_errors():
    values = json.loads(json.dumps(PROTOCOL.to_dict()))
    assert Protocol.from_dict(values) == PROTOCOL
    with pytest.raises(ValueError, match="colour, steps"):
        Protocol.from_dict({k: v for k, v in values.items() if k != "steps"} | {"colour": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "positive"),
        ({"scorers": (("a", "1", "x"), ("a", "2", "x"))}, "twice"),
        ({"scorers": (("a", "1"),)}, "revision"),
        ({"scorers": (("hps.v2", "1", "x"),)}, r"a letter first; found \['hps\.v2'\]"),
        ({"scorers": (("2.1", "1", "x"),)}, "a letter first"),
        ({"scorers": (("", "1", "x"),)}, "a letter first"),
    ],
)
def test_impossible_protocols_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PROTOCOL, **change)


def test_description_is_one_line_that_says_it_all():
    line = PROTOCOL.describe()
    assert "\n" not in line
    for part in (PROTOCOL.sha, "2 prompts", "x 2 images", "ddim 20 steps", "eta 1", "guidance 5", "32 px"):
        assert part in line
    assert "pickscore@a4e4367c6dfa (bicubic 224)" in line


def test_prompt_hash_is_of_the_set():
    assert hash_prompts(PROMPTS) == hash_prompts([*PROMPTS[::-1], PROMPTS[0]])
    assert hash_prompts(PROMPTS) != hash_prompts([" ".join(PROMPTS)])


def test_scores_round_trip_with_their_protocol(tmp_path):
    path = tmp_path / "scores" / "spo.parquet"
    write_scores(path, table()[["oracle", "file", "prompt", "ordinal", "pickscore", "oracle.appeal"]], PROTOCOL)
    frame, protocol = read_scores(path)
    assert protocol == PROTOCOL
    pd.testing.assert_frame_equal(frame, table(), check_dtype=False)
    assert [p.name for p in path.parent.iterdir()] == ["spo.parquet"]


def test_a_failed_write_keeps_the_old_table(tmp_path):
    path = tmp_path / "spo.parquet"
    write_scores(path, table(), PROTOCOL)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="finite"):
        write_scores(path, table().assign(oracle=np.nan), PROTOCOL)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.drop(columns="pickscore"), "lacks columns: pickscore"),
        (lambda f: f.drop(columns="ordinal"), "lacks columns: ordinal"),
        (lambda f: f.assign(hps=1.0), "no scorer of the protocol: hps"),
        (lambda f: f.assign(ordinal=0), "share prompt and ordinal"),
        (lambda f: f.iloc[:3], "3 images of 2 prompts"),
        (lambda f: f.assign(pickscore=[20, np.inf, 20, 20]), "1 of 4 pickscore scores are not finite"),
    ],
)
def test_a_table_that_breaks_its_protocol_is_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        check_scores(spoil(table()), PROTOCOL)


def test_mixing_protocols_on_disk_raises_and_names_the_field(tmp_path):
    write_scores(tmp_path / "base", table(), PROTOCOL)
    write_scores(tmp_path / "spo", table(), replace(PROTOCOL, guidance_scale=7.5))
    with pytest.raises(ValueError, match=r"guidance_scale: 5.0 != 7.5"):
        read_comparable({"base": tmp_path / "base", "spo": tmp_path / "spo"})
    tables, protocol = read_comparable({"base": tmp_path / "base", "again": tmp_path / "base"})
    assert list(tables) == ["base", "again"]
    assert protocol == PROTOCOL
    with pytest.raises(ValueError, match="no score tables"):
        read_comparable({})


def test_scores_without_a_protocol_are_refused(tmp_path):
    table().to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(ValueError, match="carries no protocol"):
        read_scores(tmp_path / "bare.parquet")
    assert pq.read_table(tmp_path / "bare.parquet").num_rows == 4
