"""What the large scorers cost: random files in the released layouts and sizes, loaded and asked for one score.

    PYTHONPATH=src python benchmarks/true_shapes_scorers.py FOLDER_WITH_CLIPS_TOKENIZER [--scratch /tmp]

Each is loaded in a process of its own by the real loading code; peak memory is that process's. Needs 8 GB of memory and
4 GB of disk.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPModel

from attune.build import load_scorer
from attune.clip.model import load_tokenizer
from attune.clip.open_clip import VIT_H_14, clip_config, to_open_clip
from attune.config.plan import Plugin


def random_model(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The module with small random weights, never in memory in another type."""
    with torch.device("meta"):
        model = build().to(dtype)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    return model


def write_hpsv2(folder: Path, tokenizer: str) -> None:
    """HPS_v2.1_compressed.pt: float16, open_clip's names."""
    model = random_model(lambda: CLIPModel(clip_config(VIT_H_14, load_tokenizer(tokenizer))), torch.float16)
    torch.save({"state_dict": to_open_clip(model)}, folder / "hps.pt")


def write_pickscore(folder: Path, tokenizer: str) -> None:
    """PickScore_v1: a transformers folder, float32 safetensors."""
    model = random_model(lambda: CLIPModel(clip_config(VIT_H_14, load_tokenizer(tokenizer))), torch.float32)
    model.save_pretrained(folder)


def scorers(folder: Path, tokenizer: str) -> dict[str, Plugin]:
    """The two scorers with the files that are written to a folder."""
    hpsv2 = {"version": "2.1", "path": str(folder / "hps.pt"), "tokenizer": tokenizer}
    return {
        "hpsv2": Plugin(kind="rewards", name="hpsv2", settings=hpsv2),
        "pickscore": Plugin(kind="rewards", name="pickscore", settings={"path": str(folder), "tokenizer": tokenizer}),
    }


def measure(scorer: Plugin, folder: Path) -> str:
    """Seconds to load and to score one 512 px image, and peak memory, as a line."""
    size = sum(file.stat().st_size for file in folder.iterdir())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    reward = load_scorer(scorer)
    loaded = time.perf_counter()
    with torch.no_grad():
        score = reward(torch.rand(1, 3, 512, 512), ["a cat with two horns on its head"]).item()
    done, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = f"load {loaded - start:.1f} s, one image and prompt {done - loaded:.1f} s"
    memory = f"peak {peak / 1e6:.2f} GB, {before / 1e6:.2f} of them before"
    return f"({size / 1e9:.2f} GB): {times}, {memory}, score {score:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="folder")
    parser.add_argument("--scratch", help="where the files of weights are written and removed again")
    options, spawn = parser.parse_args(), get_context("spawn")
    for name, write in (("hpsv2", write_hpsv2), ("pickscore", write_pickscore)):
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            with ProcessPoolExecutor(1, spawn) as writer:
                writer.submit(write, Path(folder), options.tokenizer).result()
            with ProcessPoolExecutor(1, spawn) as reader:
                scorer = scorers(Path(folder), options.tokenizer)[name]
                sys.stdout.write(f"{name} {reader.submit(measure, scorer, Path(folder)).result()}\n")


if __name__ == "__main__":
    main()
