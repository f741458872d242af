"""Encodes prompts in shards, whose ends depend on the prompts there, as those of chunks of rows do."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from attune.data.ingest.compute import Work
from attune.data.quarantine import TEXT_CHARS
from attune.data.rows import SourceError
from attune.distributed import Shard
from attune.interfaces import Backbone
from attune.shards import Content, Shards, compute_missing, shard_name

PROMPTS_PER_BATCH = 64
FEWEST_PROMPTS, MOST_PROMPTS = 256, 2048  # of a shard


def encode_prompts(prompts: Sequence[str], work: Work, shards: Shards, shard: Shard) -> list[str]:
    """The names of the shards that hold the conditioning tensors of the prompts, in their order."""
    tasks = {
        f"prompts/{shard_name(work.ids['prompts'], some)}": partial(_encoded, some, work) for some in _cut(prompts)
    }
    compute_missing(tasks, shards, shard, "encode prompts")
    return list(tasks)


def _cut(prompts: Sequence[str]) -> Iterator[list[str]]:
    """The prompts in parts, whose ends depend on the prompts there, as those of chunks of rows do."""
    some: list[str] = []
    for prompt in prompts:
        some.append(prompt)
        says_so = len(some) >= FEWEST_PROMPTS and zlib.crc32(prompt.encode()) % FEWEST_PROMPTS == 0
        if says_so or len(some) == MOST_PROMPTS:
            yield some
            some = []
    if some:
        yield some


def _encoded(prompts: Sequence[str], work: Work) -> Content:
    """Conditioning tensors (P, ...) in the dtype that the text encoder gives, and how many prompts it cut."""
    backbone = work.backbone()
    starts = range(0, len(prompts), PROMPTS_PER_BATCH)
    parts = [encode_finite(prompts[start : start + PROMPTS_PER_BATCH], backbone) for start in starts]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return tensors, {"cut": sum(map(backbone.is_cut, prompts))}


def encode_finite(prompts: Sequence[str], backbone: Backbone) -> dict[str, Tensor]:
    """Conditioning tensors on the CPU.

    Raises:
        SourceError: embeddings are not finite, so that no run could learn from the prompt.
    """
    tensors = {name: value.cpu() for name, value in backbone.encode_prompts(prompts).tensors.items()}
    for name, rows in tensors.items():
        bad = (~torch.isfinite(rows).flatten(1).all(1)).nonzero()
        if len(bad):
            prompt = prompts[int(bad[0])][:TEXT_CHARS]
            raise SourceError(
                f"{name} of the prompt {prompt!r} is not finite; remove the prompt, or set model.dtype float32"
            )
    return tensors
