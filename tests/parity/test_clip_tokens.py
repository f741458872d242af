"""Token ids against open_clip's and OpenAI's code: case 16b, on the real vocabulary, which is not in here."""

import json
import os

import pytest
from golden.reading import HERE

from attune.clip.model import load_tokenizer, tokenise
from attune.rewards.hpsv2 import clean_text

FOLDER = os.environ.get("ATTUNE_CLIP_TOKENIZER")
CASES = json.loads((HERE / "16b_clip_tokens.json").read_text())
pytestmark = [
    pytest.mark.parity,
    pytest.mark.weights,
    pytest.mark.skipif(not FOLDER, reason="ATTUNE_CLIP_TOKENIZER names no folder with CLIP's vocabulary"),
]


@pytest.fixture(scope="module")
def tokenizer():
    found = load_tokenizer(FOLDER)
    assert len(found) == 49408
    assert len(CASES) == 40
    return found


def test_hpsv2_reads_prompts_as_open_clip_does(tokenizer):
    for case in CASES:
        assert tokenise(tokenizer, [clean_text(case["prompt"])], 77)[0].tolist() == case["open_clip"], case["prompt"]


def test_pickscore_reads_prompts_as_transformers_does(tokenizer):
    """Not cleaned: curly quotes, ligatures and wide letters stay what they are, as when PickScore was trained."""
    for case in CASES:
        fast = case.get("fast", case["open_clip"])
        assert tokenise(tokenizer, [case["prompt"]], 77)[0].tolist() == fast, case["prompt"]


def test_a_batch_pads_behind_the_end_token(tokenizer):
    rows = tokenise(tokenizer, [case["prompt"] for case in CASES], 77).tolist()
    assert {len(row) for row in rows} == {77}
    for row, case in zip(rows, CASES, strict=True):
        ids = case.get("fast", case["open_clip"])
        assert row[: len(ids)] == ids
        assert set(row[len(ids) :]) <= {49407}
