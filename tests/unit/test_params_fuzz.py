"""A sample of benchmarks/params_fuzz.py, which has nine hundred wrong parameter files."""

from __future__ import annotations

import importlib
import sys
from itertools import islice
from pathlib import Path

EVERY = 9
ROOT = Path(__file__).parents[2]


def test_a_wrong_file_is_answered_briefly_and_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", [])
    fuzz = importlib.import_module("params_fuzz")
    some = list(islice(fuzz.variants(), 0, None, EVERY))
    monkeypatch.setattr(fuzz, "variants", lambda: iter(some))
    n, wrong, seconds, slowest = fuzz.run(tmp_path)
    assert n == len(some) >= 100
    assert not wrong
    assert seconds < 20, slowest
