"""Reads the golden vectors, and writes the tiny models out in the layouts that are published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
TOKENIZER, T5_TOKENIZER = HERE / "tokenizer", HERE / "tokenizer_t5"
VOCABULARY = 1002
PROMPTS: dict[str, list[str]] = json.loads((HERE / "prompts.json").read_text())


def tensors(name: str) -> dict[str, Tensor]:
    """A file's tensors, thinned embeddings filled up with zeros."""
    found = load_file(HERE / f"{name}.safetensors")
    for key in [key for key in found if key.endswith(".rows")]:
        rows, full = found.pop(key), key.removesuffix(".rows")
        found[full] = torch.zeros(VOCABULARY, found[full].shape[1]).index_copy(0, rows, found[full])
    return found


def largest_errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest error, and the same relative to the largest expected value."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).abs().max())
    return error, error / max(float(expected.abs().max()), 1e-30)


def assert_close(actual: Tensor, expected: Tensor, rel: float = 1e-5, absolute: float = 0.0) -> None:
    """Largest error at most `rel` times the largest expected value, or at most `absolute`."""
    error, relative = largest_errors(actual, expected)
    print(f"error {error:.1e}, relative {relative:.1e}, allowed {rel:.0e} / {absolute:.0e}")
    assert relative <= rel or error <= absolute


def write_spm(file: Path, **extra: Tensor) -> Path:
    """The preference model as released: a pickled dict of tensors."""
    torch.save(tensors("tiny_spm") | extra, file)
    return file


def write_clip(folder: Path) -> Path:
    """The CLIP of cases 7 and 16a as a transformers folder."""
    shutil.copytree(TOKENIZER, folder)
    shutil.copyfile(HERE / "tiny_clip.json", folder / "config.json")
    own = {name.removeprefix("model."): value for name, value in tensors("tiny_spm").items()}
    added = ("adaLN_modulation", "t_embedder")
    plain = {name: value for name, value in own.items() if not any(part in name for part in added)}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_hps(folder: Path, size: int) -> Path:
    """An open_clip checkpoint, and its layout beside it."""
    file = folder / f"hps{size}.pt"
    torch.save({"state_dict": tensors(f"tiny_hps{size}")}, file)
    shutil.copyfile(HERE / f"tiny_hps{size}.json", file.with_suffix(".json"))
    return file
