"""Times attune's steps beside the same work in the order of operations of what they replace, for reports/speed.md.

    PYTHONPATH=src python benchmarks/speed.py --short --threads 2
    PYTHONPATH=src python benchmarks/speed.py --rows "tiny SPO" "sd15 DPO"
    PYTHONPATH=src python benchmarks/speed.py --device cuda --rows sd15

Of each row, both sides are first shown to compute the same, in float32 on the embedded model; then they are called in
turn in one process; then each is called in a process of its own, which tells its peak of memory (of the embedded model
only with --memory, as libraries are most of it). `--short` takes ten minutes on two idle cores. Rows are added to the
report as they are measured, each with its date and commit, so they can be measured one at a time. Nothing is
downloaded. `speed_rows.py` lists the rows; `speed_<topic>.py` say whose order of operations the reference keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from shapes import write_pipeline
from speed_report import as_markdown, read, write
from speed_rows import ROWS, WORKS, Row, alternated, differences, peak, with_resolution
from speed_sides import BASE, ROOT

REPEATS = {"tiny": 5, "sd15": 2}  # pairs of calls that are timed
SHORT = {"tiny": 3, "sd15": 2}


# ---------------------------------------------------------------- one row


def measured(what: str, row: Row, folder: Path, device: torch.device, repeats: int) -> dict[str, Any]:
    """What a process finds out about a row.

    Args:
        what: "time", equality and seconds of both sides, or the side whose peak of memory is wanted.
    """
    work, place = WORKS[row.work], row.place(folder, device)
    if what == "time":
        return {"differences": differences(work, row.small(device))} | alternated(work, place, repeats)
    return {f"{what}_GiB": peak({"reference": work.reference, "ours": work.ours}[what], place)}


def measured_here(row: Row, folder: Path, args: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Equality and seconds, in this process; what went wrong, if something did."""
    try:
        return measured("time", row, folder, torch.device(args.device), repeats)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def in_a_process(words: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """What this program says when it is run with `words`; what went wrong, if something did."""
    command = [sys.executable, __file__, *words, "--device", args.device, "--threads", str(args.threads)]
    own = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    own |= {"DIFFUSERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": lines[-1] if lines else f"ended with {done.returncode}"}


# ---------------------------------------------------------------- the command


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What is measured on."""
    if args.device == "cuda":
        return {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = models[0] if models else platform.processor() or "CPU"
    return {"device": name, "cores": os.cpu_count(), "threads": args.threads, "torch": torch.__version__}


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def commit() -> str:
    """The commit that is measured, with a + if sources differ from it; "unknown" where only the files are."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "benchmarks")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measured_row(row: Row, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A line of the report, from two or three processes."""
    began = time.monotonic()
    repeats = args.repeats or (SHORT if args.short else REPEATS)[row.base]
    words = ["--row", row.name, "--folder", str(folder), "--repeats", str(repeats)]
    words += ["--resolution", str(row.resolution)] if row.base == "sd15" else []
    memory = args.memory or (row.base == "sd15" and not args.no_memory)
    found: dict[str, Any] = {"reference_is": WORKS[row.work].reference_is, "device": args.device}
    for side in ("time", "reference", "ours") if memory else ("time",):
        found |= in_a_process(["--side", side, *words], args)
        if "error" in found:
            break
    when = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": machine(args)}
    return found | when | {"row_s": round(time.monotonic() - began, 1)}


def chosen(args: argparse.Namespace) -> list[Row]:
    """The rows that are measured. Exits if `--rows` names none."""
    rows = [row for row in ROWS if row.short] if args.short else list(ROWS)
    rows = [with_resolution(row, args.resolution) for row in rows]
    rows = [row for row in rows if any(word.lower() in row.name.lower() for word in args.rows or [""])]
    if not rows:
        sys.exit(f"--rows: no row's name has {' or '.join(map(repr, args.rows))} in it; see benchmarks/speed_rows.py")
    return list({row.name: row for row in rows}.values())


def run(args: argparse.Namespace) -> list[str]:
    """Measures and reports; returns the rows that failed."""
    rows, report, failed = chosen(args), read(args.out.with_suffix(".json")), []
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        if any(row.base == "sd15" for row in rows):
            in_a_process(["--side", "write", "--folder", folder], args)
        for row in rows:
            report[row.name] = measured_row(row, BASE if row.base == "tiny" else Path(folder), args)
            failed += [row.name] if "error" in report[row.name] else []
            write(report, args.out, [each.name for each in ROWS])
            sys.stderr.write(f"{row.name}: {json.dumps(report[row.name])}\n")
    sys.stdout.write(as_markdown({row.name: report[row.name] for row in rows}))
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", help="only rows whose name has one of these words")
    parser.add_argument(
        "--short", action="store_true", help="all rows of the embedded model and the main ones of SD 1.5"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--resolution", type=int, help="pixels of all rows of SD 1.5")
    parser.add_argument("--repeats", type=int, help="pairs of calls; default 5 of the embedded model, 2 of SD 1.5")
    parser.add_argument("--memory", action="store_true", help="memory of the embedded model's rows, too")
    parser.add_argument("--no-memory", action="store_true", help="no memory")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/speed", help="file, without ending")
    for hidden in ("--side", "--row", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU: --device cpu")
    torch.set_num_threads(args.threads)
    os.environ["ATTUNE_DEVICE"] = args.device
    if args.side == "write":
        write_pipeline("sd15", Path(args.folder), torch.bfloat16)
        sys.stdout.write("{}\n")
    elif args.side:
        row = next(row for each in ROWS if (row := with_resolution(each, args.resolution)).name == args.row)
        found = measured(args.side, row, Path(args.folder), torch.device(args.device), args.repeats)
        sys.stdout.write(json.dumps(found) + "\n")
    elif failed := run(args):
        sys.exit(f"not measured: {'; '.join(failed)}; {args.out.with_suffix('.md')} says why")


if __name__ == "__main__":
    main()
