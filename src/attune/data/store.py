"""The prepared data on disk, and how batches are drawn from it.

data/<profile>/prepared/
    prompts.parquet     prompt, split; the prompts of a split lie together
    pairs.parquet       prompt, image_0, image_1 (rows of the latents), label_0, split, and what the source adds;
                        `<scorer>_0`, `<scorer>_1` for each scorer of data.score_with
    images.parquet      of sources of single images: prompt, image (row of the latents), liked, split, and scores
    shards.json       the files below, in the order of their rows
    latents/            latents (n, C, h, w), scaled, in the autoencoder's precision; batches have them in float32
    prompts/            each conditioning tensor (P, ...), a row per row of prompts.parquet
    scores/             by scorer; `prepare` does not ask it again for what is there

The files are mapped, not read: a batch costs its own rows, however large the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attune.data import manifest
from attune.data.batches import GroupBatch, ImageBatch, PairBatch, PromptBatch
from attune.data.mapped import MappedRows
from attune.data.rows import SourceError
from attune.data.splits import VERDICTS, check_splits
from attune.interfaces import Conditioning

IMAGES = "images.parquet"
Consumed = Literal["pairs", "images", "liked images", "prompts", "groups"]
Rows: TypeAlias = Tensor | pd.Series | Sequence[int]


@dataclass(frozen=True)
class PreparedData:
    """One split: prompts with their encoding, and pairs that point into latents; batches go to `device`."""

    prompts: Sequence[str]
    cond: Conditioning  # a row per prompt; its tensors may be `MappedRows`
    pairs: pd.DataFrame
    latents: Tensor | MappedRows
    device: torch.device | str = "cpu"
    images: pd.DataFrame | None = None  # single images; None of a source of pairs

    @staticmethod
    def read(folder: Path, split: str, device: torch.device | str = "cpu", keep_ties: bool = False) -> PreparedData:
        """Opens a split, without ties unless they are kept.

        Raises:
            FileNotFoundError: the prepare stage has not run.
            ValueError: what it wrote is damaged.
        """
        files = manifest.read(folder)
        table = pd.read_parquet(folder / "prompts.parquet")
        pairs = pd.read_parquet(folder / "pairs.parquet")
        odd = pairs[~pairs.label_0.between(0, 1)]  # NaN is not between them either
        if len(odd):
            where = f"{folder / 'pairs.parquet'} is damaged: row {odd.index[0]} has label_0 {odd.label_0.iloc[0]}"
            raise ValueError(f"{where}; run the prepare stage again")
        pairs = pairs[pairs.split == split]
        rows = np.flatnonzero(table.split == split)
        here = slice(rows[0], rows[-1] + 1) if len(rows) else slice(0, 0)
        prompts = table.prompt[here].tolist()
        encoded = {
            name: manifest.rows_of(folder, files["prompts"], name)
            for name in manifest.names_in(folder, files["prompts"])
        }
        # mapped rows stand for a tensor here: all that is done with it is to take rows
        cond = Conditioning({name: cast(Tensor, rows[here]) for name, rows in encoded.items()})
        place = {prompt: row for row, prompt in enumerate(prompts)}
        pairs = pairs.assign(prompt_row=pairs.prompt.map(place).astype("int64"))
        images = None
        if (folder / IMAGES).exists():
            images = pd.read_parquet(folder / IMAGES)
            images = images[images.split == split].reset_index(drop=True)
            images = images.assign(prompt_row=images.prompt.map(place).astype("int64"))
        latents = manifest.rows_of(folder, files["latents"], "latents")
        data = PreparedData(prompts, cond, pairs, latents, device, images)
        return data.with_pairs(pairs, keep_ties)

    def with_pairs(self, pairs: pd.DataFrame, keep_ties: bool = False) -> PreparedData:
        """The same split with other labels. Ties are dropped unless kept: they have no chosen image."""
        pairs = pairs[keep_ties | (pairs.label_0 != 0.5)].reset_index(drop=True)
        return replace(self, pairs=pairs.assign(weight=1 / pairs.groupby("prompt").prompt.transform("size")))

    def rows_for(self, consumes: Consumed, images: int = 4) -> tuple[int, Callable[[Rows], object]]:
        """How many rows a method learns from, and how a batch of some of them is made.

        A method that learns from single images takes each pair as two of them, where the source has pairs.

        Args:
            images: of a prompt, at most, where groups of them are wanted.

        Raises:
            SourceError: single images are wanted, and all of them are disliked, or for `images` all liked; or groups,
                and no prompt has two images with scores.
        """
        if consumes == "prompts":
            return len(self.prompts), self.prompt_batch
        if consumes == "groups":
            table = scored_images(self.pairs if self.images is None else self.images)
            groups = groups_of(table.prompt_row, images)
            return len(groups), lambda rows: self._group_batch([table.iloc[groups[int(row)]] for row in rows])
        if consumes == "pairs":
            return len(self.pairs), self.pair_batch
        if self.images is None and consumes == "images":
            return len(self.pairs), lambda rows: self.pair_batch(rows).images
        if self.images is None:
            return len(self.pairs), lambda rows: self.pair_batch(rows).liked_images
        liked = int(self.images.liked.sum())
        counts = {"liked/train": liked, "disliked/train": len(self.images) - liked}
        check_splits(counts, dict.fromkeys(VERDICTS[consumes], 1))
        table = self.images if consumes == "images" else self.images[self.images.liked]
        return len(table), lambda rows: self._image_batch(table.iloc[list(map(int, rows))])

    def _image_batch(self, chosen: pd.DataFrame) -> ImageBatch:
        return ImageBatch(
            chosen.prompt.tolist(),
            self._cond_of(chosen.prompt_row),
            self._latents_of(chosen.image),
            self._sent(torch.tensor(chosen.liked.to_numpy())),
        )

    def _group_batch(self, groups: Sequence[pd.DataFrame]) -> GroupBatch:
        chosen, first = pd.concat(groups), pd.concat([group[:1] for group in groups])
        names = [name for name in chosen.columns if name not in ("prompt", "prompt_row", "image")]
        return GroupBatch(
            first.prompt.tolist(),
            self._cond_of(first.prompt_row),
            self._latents_of(chosen.image),
            [len(group) for group in groups],
            {name: self._sent(torch.tensor(chosen[name].to_numpy(), dtype=torch.float32)) for name in names},
        )

    def pair_batch(self, rows: Rows) -> PairBatch:
        """Those pairs as a batch."""
        chosen = self.pairs.iloc[list(map(int, rows))]
        return PairBatch(
            chosen.prompt.tolist(),
            self._cond_of(chosen.prompt_row),
            self._latents_of(chosen.image_0),
            self._latents_of(chosen.image_1),
            self._sent(torch.tensor(chosen.label_0.to_numpy(), dtype=torch.float32)),
            self._sent(torch.tensor(chosen.weight.to_numpy(), dtype=torch.float32)),
        )

    def prompt_batch(self, rows: Rows) -> PromptBatch:
        """Those prompts as a batch."""
        return PromptBatch([self.prompts[int(r)] for r in rows], self._cond_of(rows))

    def _cond_of(self, rows: Rows) -> Conditioning:
        tensors = self.cond[torch.tensor(np.asarray(rows))].tensors
        return Conditioning({name: self._sent(value) for name, value in tensors.items()})

    def _latents_of(self, rows: Rows) -> Tensor:
        return self._sent(self.latents[torch.tensor(np.asarray(rows))]).float()

    def _sent(self, values: Tensor) -> Tensor:
        """The values on `device`. A GPU takes them from pinned memory, while this thread and the GPU go on working."""
        if torch.device(self.device).type == "cuda":
            return values.pin_memory().to(self.device, non_blocking=True)
        return values.to(self.device)


def scored_images(table: pd.DataFrame) -> pd.DataFrame:
    """prompt, prompt_row, image and `<scorer>` of each image of a prompt, once: of pairs, or of single images."""
    if "image" not in table:
        scorers = [name[:-2] for name in table.columns if name.endswith("_0") and name not in ("image_0", "label_0")]
        own = ["prompt", "prompt_row"]
        sides = [
            table[[*own, f"image_{i}", *(f"{name}_{i}" for name in scorers)]].set_axis(
                [*own, "image", *scorers], axis=1
            )
            for i in (0, 1)
        ]
        table = pd.concat(sides)
    else:
        table = table.drop(columns=["liked", "split"])
    return table.drop_duplicates(["prompt_row", "image"]).sort_values(["prompt_row", "image"], ignore_index=True)


def groups_of(prompt_row: pd.Series, most: int) -> list[np.ndarray]:
    """Rows of the images of each prompt, of which there are two at least; more than `most` are equal parts.

    Raises:
        SourceError: no prompt has two images.
    """
    of_prompts = [rows for rows in pd.Series(prompt_row).groupby(prompt_row).indices.values() if len(rows) > 1]
    if not of_prompts:
        raise SourceError("data: no prompt has two images with scores, which a method of groups compares")
    return [part for rows in of_prompts for part in np.array_split(rows, -(-len(rows) // most))]
