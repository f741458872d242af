"""Scores of made-up methods, on prompts that contain markup and control characters."""

from __future__ import annotations

import numpy as np
import pandas as pd

from attune.evaluation.protocol import Protocol, hash_prompts

HOSTILE = [
    "a | b",
    "`code` ``` fence",
    "<script>alert(1)</script>",
    "line one\nline two\r\n\n# heading",
    "[click](javascript:alert(1)) ![x](http://evil.example/p.png)",
    "https://evil.example www.evil.example a@evil.example",
    "**bold** _it_ ~~no~~ \\ back \\| slash",
    "- item",
    "1. item",
    "---",
    "=== under",
    "&lt;b&gt; &amp; <!-- hidden",
    '" onmouseover="alert(1)',
    "$x^2$ # @user",
    "\x00\x1b[31m\u202egnp.exe",
]
SCORERS = ["oracle", "pickscore"]


def protocol_for(prompts: list[str]) -> Protocol:
    scorers = tuple((name, "rev", "raw") for name in SCORERS)
    n = len(prompts)
    return Protocol(hash_prompts(prompts), n, 2, "ddim", 20, 1, 5, 32, "float32", 0, scorers, "v float32")


def table(prompts: list[str], shift: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Two images per prompt; scores leave the base's by `shift` and noise drawn from `seed` (0: none)."""
    level = np.random.default_rng(99).normal(size=len(prompts))
    noise = np.random.default_rng(seed).normal(scale=0.1 if seed else 0, size=(len(prompts), 2))
    rows = [
        (prompt, k, f"{i}_{k}.png", level[i] + shift + noise[i, k], 20 + level[i] + noise[i, k], level[i])
        for i, prompt in enumerate(prompts)
        for k in range(2)
    ]
    return pd.DataFrame(rows, columns=["prompt", "ordinal", "file", *SCORERS, "oracle.appeal"])
