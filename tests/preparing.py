"""Prepared data of rows, written without a stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from attune.data import manifest
from attune.data.ingest.compute import Work
from attune.data.ingest.rules import Rules
from attune.data.ingest.write import write_prepared
from attune.data.quarantine import Quarantine
from attune.data.rows import Row
from attune.data.store import PreparedData
from attune.interfaces import Backbone, Reward
from attune.shards import Shards


def work(backbone: Backbone, scorers: Mapping[str, Reward] | None = None, threads: int = 1) -> Work:
    """What computes the shards of a small model."""
    scorers = scorers or {}
    ids = {"latents": "l", "prompts": "p", **{f"scores/{name}": name for name in scorers}}
    loaders = {name: (lambda scorer=scorer: scorer) for name, scorer in scorers.items()}
    return Work(torch.device("cpu"), lambda: backbone, loaders, ids, threads)


def prepare(
    folder: Path, rows: Iterable[Row], backbone: Backbone, scorers: Any, quarantine: Quarantine, rules: Rules
) -> dict[str, float]:
    """Writes `folder`; the shards are kept beside it."""
    shards = Shards(folder.with_name("kept"))
    return write_prepared(folder, rows, work(backbone, scorers), shards, quarantine, rules)


def write_split(folder: Path, data: PreparedData, pairs: pd.DataFrame, split: str) -> None:
    """The files that the prepare stage leaves, of data in memory and other pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = Shards(folder)
    shards.write("latents/all", {"latents": data.latents}, {})
    shards.write("prompts/all", dict(data.cond.tensors), {})
    manifest.write(folder, {"latents": ["latents/all.safetensors"], "prompts": ["prompts/all.safetensors"]})
    pd.DataFrame({"prompt": data.prompts, "split": split}).to_parquet(folder / "prompts.parquet")
    pairs.drop(columns=["prompt_row", "weight"]).assign(split=split).to_parquet(folder / "pairs.parquet")
