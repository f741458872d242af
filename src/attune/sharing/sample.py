"""Pictures of any prompts by any models: the report's sampling, and for every model the same noise.

Settings and prompts are checked before a model is loaded; the base model is loaded once.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from attune.config.settings import Sampling
from attune.data.rows import BadRow
from attune.data.sources._files import prompt_list
from attune.diffusion.generate import generate_images
from attune.diffusion.lora import unload_lora
from attune.diffusion.policy import Policy
from attune.evaluation.report.grid import image_grid
from attune.files import replaced_file, replaced_folder, values_sha
from attune.sharing.models import NamedModel

if TYPE_CHECKING:
    from attune.interfaces import Backbone

INDEX = "index.parquet"
MOST = 1000  # images on one sheet: 100 million pixels


class SampleError(ValueError):
    """Prompts cannot be generated as asked; the message says why and what to do."""


def read_prompts(given: Sequence[str], file: Path | None, tell: Callable[[str], None]) -> list[str]:
    """Prompts of the command line and of a list (.txt, .json, .jsonl), each once.

    Raises:
        SampleError: there is none, one is empty or no UTF-8, or the list cannot be read.
        SourceError: the list is not there or no list.
    """
    rows = [] if file is None else list(prompt_list(str(file), "test"))
    for bad in (row for row in rows if isinstance(row, BadRow)):
        raise SampleError(f"{file}: row {bad.row}: {bad.reason} {bad.detail}".strip() + "; mend or remove it")
    listed = [row.prompt for row in rows if not isinstance(row, BadRow) and row.prompt]
    prompts = [*given, *listed]
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise SampleError(f"prompt {number} is empty; say --prompt 'a red cat'")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise SampleError(f"prompt {number} is not UTF-8: {prompt!r:.80}") from None
    if not prompts:
        raise SampleError(
            f"{file} holds no prompt" if file else "no prompt: say --prompt 'a red cat' or --prompts FILE"
        )
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < len(prompts):
        tell(f"{len(prompts) - len(distinct)} prompts are repetitions and generated once")
    return distinct


def image_rows(prompts: Sequence[str], n: int) -> pd.DataFrame:
    """A row per image, as `generate` writes them: prompt, ordinal, file."""
    rows = [(prompt, ordinal) for prompt in prompts for ordinal in range(n)]
    frame = pd.DataFrame(rows, columns=["prompt", "ordinal"])
    frame["file"] = [f"{row:05d}.png" for row in range(len(frame))]
    return frame


def generate(
    backbone: Backbone, models: Sequence[NamedModel], rows: pd.DataFrame, sampling: Sampling, seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and images, uint8 (n, H, W, 3), of one model after the other.

    Raises:
        ValueError, FileNotFoundError, HubError: a model cannot be loaded, see `Policy.load`.
    """
    uncond = backbone.encode_prompts([""])
    for model in models:
        policy = Policy(copy.copy(backbone), uncond)
        if model.source is not None:
            policy.load(model.source, may_be_zero=model.own)
        try:
            prompts, ordinals = rows.prompt.tolist(), rows.ordinal.tolist()
            yield model.name, generate_images(policy, prompts, ordinals, sampling, seed, f"generate {model.name}")
        finally:
            unload_lora(backbone.denoiser)


def cut_prompts(backbone: Backbone, prompts: Sequence[str]) -> list[str]:
    """A line for each prompt of which the text encoder does not read the end."""
    cut = [prompt for prompt in prompts if backbone.is_cut(prompt)]
    return [f"longer than the text encoder reads, its end is cut off: {prompt!r:.100}" for prompt in cut]


def write_sheet(file: Path, images: Mapping[str, np.ndarray], prompts: Sequence[str], n: int) -> None:
    """Writes one PNG: rows are prompts, columns the images of a prompt, model beside model."""
    with replaced_file(file) as beside, beside.open("wb") as opened:
        image_grid(images, prompts, per_prompt=n).save(opened, "PNG")


def check_folder(folder: Path, names: Sequence[str]) -> None:
    """Raises SampleError if a folder that is to be written holds something other than generated images."""
    for place in (folder / name for name in names):
        if place.exists() and not (place / INDEX).is_file() and not (place.is_dir() and not any(place.iterdir())):
            raise SampleError(f"{place} is there and holds no {INDEX}, so it is not replaced; say another --out")


def write_folder(folder: Path, images: np.ndarray, rows: pd.DataFrame) -> None:
    """Writes PNGs and index.parquet, in the layout of data/<profile>/generated/<run>, whole or not at all."""
    with replaced_folder(folder) as beside:
        for name, image in zip(rows.file, images, strict=True):
            Image.fromarray(image).save(beside / name)
        rows.to_parquet(beside / INDEX, index=False)


def default_name(models: Sequence[NamedModel], prompts: Sequence[str], n: int, seed: int) -> str:
    """A file name that tells models and first prompt, and is another one for other pictures."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompts[0].lower()))[:40].strip("-")
    names = "-".join(model.name for model in models)[:60]
    sha = values_sha([[(m.name, m.source) for m in models], list(prompts), n, seed])[:6]
    return f"{names}-{words}-{sha}.png".replace("--", "-")
