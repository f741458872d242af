"""What prepare and a training cost with many pairs: seconds, peak memory and bytes, of two sizes and their ratio.

Pairs of small random images in parquet files, as Pick-a-Pic has them, and a base model of the tests:
what is measured is the way of the data and not a network. Each stage is a process of its own, as DVC starts it.

    PYTHONPATH=src:tests python benchmarks/scale.py --pairs 20000 200000 --out reports/scale.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import params
import tiny
from attune.copies import copy_checkout

ROOT = Path(__file__).resolve().parents[1]
PER_FILE, PAIRS_PER_PROMPT, SIDE, BATCHES = 10_000, 4, 16, 1000
FIRST = re.compile(rf"[1-9]\d*/{BATCHES} ")  # in the progress bar: a batch is done


def write_pairs(folder: Path, pairs: int) -> int:
    """Pairs of random PNGs; returns their bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for start in range(0, pairs, PER_FILE):
        rows = [row(i, rng) for i in range(start, min(start + PER_FILE, pairs))]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{start // PER_FILE:04d}.parquet")
    return bytes_in(folder)


def row(i: int, rng: np.random.Generator) -> dict[str, Any]:
    label = float(rng.integers(2))
    images = {f"jpg_{side}": png(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for side in range(2)}
    return {"caption": f"prompt number {i // PAIRS_PER_PROMPT}", "label_0": label, "label_1": 1 - label, **images}


def png(pixels: np.ndarray) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        return file.getvalue()


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def set_up(home: Path, pairs: int) -> None:
    """A copy of the checkout whose profile learns from these pairs."""
    given, profile = params.shipped("short")
    runs = {"base": {"after": "data"}, "dpo": {"method": "dpo", "after": "data"}}
    data = {"source": "pickapic", "path": str(home.parent / f"raw{pairs}"), "held_out_pairs": 100}
    model = {"backbone": "sd", "path": tiny.write_pipeline(home.parent / "sd")}
    changes = {"model": model, "data": data, "search": {}, "generate__prompts": 4, "methods__dpo__batches": BATCHES}
    changes["scorers"] = {"pickscore": profile["scorers"]["pickscore"]}
    copy_checkout(ROOT, home, {}, given | {"runs": runs, "tracking": None})
    params.write(home, given | {"runs": runs, "tracking": None}, params.changed(profile, **changes))
    stage(home, "plan", 1)


def stage(home: Path, name: str, processes: int, *words: str) -> dict[str, float]:
    """Runs a stage; returns its seconds, those before the first batch of a training, and its peak of memory in GB."""
    env = os.environ | {"PYTHONPATH": "src", "ATTUNE_PROCESSES": str(processes), "TQDM_MININTERVAL": "0"}
    command, began, first = [sys.executable, "-m", f"attune.stages.{name}", *words], time.monotonic(), 0.0
    said = bytearray()
    with subprocess.Popen(command, cwd=home, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while part := os.read(process.stderr.fileno(), 65536):
            said = said[-200:] + part
            if not first and FIRST.search(said.decode(errors="replace")):
                first = time.monotonic() - began
    if process.returncode:
        sys.exit(f"{name} ended with {process.returncode}: {said.decode(errors='replace')}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return {"seconds": time.monotonic() - began, "before_first_batch": first, "largest_process_so_far_gb": peak}


def measure(pairs: int, processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        home = Path(folder, "copy")
        found: dict[str, Any] = {"pairs": pairs, "processes": processes}
        found["source_bytes"] = write_pairs(home.parent / f"raw{pairs}", pairs)
        set_up(home, pairs)
        found["prepare"] = stage(home, "prepare", processes)
        prepared = home / "data/short/prepared"
        found["prepared_bytes"] = bytes_in(prepared)
        found["files"] = sum(1 for file in prepared.rglob("*") if file.is_file())
        found["align"] = stage(home, "align", 1, "--run", "dpo")
        return found


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "ATTUNE_TRACKING": "off"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.one:  # in a process of its own: the peak of its children is never given back
        sys.stdout.write(json.dumps(measure(given.pairs[0], given.processes)) + "\n")
        return
    results = []
    for pairs in given.pairs:
        words = ["--pairs", str(pairs), "--processes", str(given.processes), "--one"]
        said = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(said.stdout.splitlines()[-1]))
        print(json.dumps(results[-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
