"""The prepared data on disk, and how batches are drawn from it.

data/prepared/
    prompts.parquet     prompt, split
    pairs.parquet       prompt, image_0, image_1 (rows of the images), label_0, split, and what the source adds
    images.safetensors  uint8 (n, 3, H, W)
    cache.safetensors   latents (n, C, h, w), scaled; `prompt.<name>` (P, ...) for each conditioning tensor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from attune.data.batches import PairBatch, PromptBatch
from attune.interfaces import Backbone, Conditioning
from attune.sources import Prepared

_ENCODE_AT_ONCE = 64


def write_prepared(folder: Path, prepared: Prepared, backbone: Backbone) -> None:
    """Writes the tables and images, and caches what the frozen encoders make of them."""
    folder.mkdir(parents=True, exist_ok=True)
    prepared.prompts.to_parquet(folder / "prompts.parquet", index=False)
    prepared.pairs.to_parquet(folder / "pairs.parquet", index=False)
    images = torch.from_numpy(np.ascontiguousarray(prepared.images.transpose(0, 3, 1, 2)))
    save_file({"images": images}, folder / "images.safetensors")
    chunks = images.split(_ENCODE_AT_ONCE)
    latents = [backbone.encode_images(c.float() / 255) for c in tqdm(chunks, desc="encode images", unit="batch")]
    prompts = prepared.prompts.prompt.tolist()
    parts = [prompts[i : i + _ENCODE_AT_ONCE] for i in range(0, len(prompts), _ENCODE_AT_ONCE)]
    cond = Conditioning.cat([backbone.encode_prompts(p) for p in tqdm(parts, desc="encode prompts", unit="batch")])
    cache = {"latents": torch.cat(latents), **{f"prompt.{name}": v for name, v in cond.tensors.items()}}
    save_file({name: value.contiguous() for name, value in cache.items()}, folder / "cache.safetensors")


def read_images(folder: Path) -> Tensor:
    """The pictures of all pairs, uint8 (n, 3, H, W)."""
    return load_file(folder / "images.safetensors")["images"]


@dataclass(frozen=True)
class PreparedData:
    """One split, in memory: prompts with their encoding, and pairs that point into latents."""

    prompts: list[str]
    cond: Conditioning  # a row per prompt
    pairs: pd.DataFrame
    latents: Tensor

    @staticmethod
    def read(folder: Path, split: str, device: torch.device | str = "cpu", keep_ties: bool = False) -> PreparedData:
        """Reads a split onto a device. Ties are dropped unless kept: they have no chosen image.

        Raises:
            FileNotFoundError: the prepare stage has not run.
        """
        if not (folder / "cache.safetensors").exists():
            raise FileNotFoundError(f"{folder} holds no prepared data; run the prepare stage first")
        tensors = load_file(folder / "cache.safetensors")
        table = pd.read_parquet(folder / "prompts.parquet")
        pairs = pd.read_parquet(folder / "pairs.parquet")
        pairs = pairs[(pairs.split == split) & (keep_ties | (pairs.label_0 != 0.5))].reset_index(drop=True)
        rows = torch.from_numpy(np.flatnonzero(table.split == split))
        cond = {name.removeprefix("prompt."): v[rows] for name, v in tensors.items() if name.startswith("prompt.")}
        prompts = table.prompt[table.split == split].tolist()
        place = {prompt: row for row, prompt in enumerate(prompts)}
        pairs["prompt_row"] = pairs.prompt.map(place)
        pairs["weight"] = 1 / pairs.groupby("prompt").prompt.transform("size")
        return PreparedData(prompts, Conditioning(cond).to(device), pairs, tensors["latents"].to(device))

    def pair_batch(self, rows: Tensor | Sequence[int]) -> PairBatch:
        """Those pairs as a batch."""
        chosen = self.pairs.iloc[list(map(int, rows))]
        return PairBatch(
            chosen.prompt.tolist(),
            self.cond[torch.tensor(chosen.prompt_row.to_numpy())],
            self.latents[torch.tensor(chosen.image_0.to_numpy())],
            self.latents[torch.tensor(chosen.image_1.to_numpy())],
            torch.tensor(chosen.label_0.to_numpy(), dtype=torch.float32, device=self.latents.device),
            torch.tensor(chosen.weight.to_numpy(), dtype=torch.float32, device=self.latents.device),
        )

    def prompt_batch(self, rows: Tensor | Sequence[int]) -> PromptBatch:
        """Those prompts as a batch."""
        rows = torch.as_tensor(rows)
        return PromptBatch([self.prompts[int(r)] for r in rows], self.cond[rows])
