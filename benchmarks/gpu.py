"""What attune does on a GPU, in one command of at most eight minutes that downloads nothing: reports/gpu.md and .json.

    PYTHONPATH=src python benchmarks/gpu.py
    PYTHONPATH=src python benchmarks/gpu.py --rows "DPO LoRA" --row-seconds 30 --compile
    PYTHONPATH=src python benchmarks/gpu.py --device cpu --tiny --out /tmp/gpu

Random weights in the shapes of SD 1.5 (512 px), SDXL, SD 3.5 Medium, FLUX.1-dev, Z-Image (1024 px) and ViT-H/14, in
bfloat16, through the real methods and the real training step. First the machine's speed at a large matrix product and
the losses and gradients of every method against the CPU's, then a table of works and switches, then the contract tests
and the profile `short`. What fails is a line that says why, and the rest goes on; what time does not allow is listed.
Written anew after every row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from gpu_checks import ROOT, Check, contract_tests, escaped, parity, short_profile
from gpu_rows import ROWS, Place, Row, prepared
from measuring import Measured, matmul_flops, measure, release_memory

TOLERANCE = 5e-3  # of the relative difference of a loss or gradient in float32; sums are in another order
TINY_TEST = "its_loss_starts and dpo"  # the contract test that the tiny form runs


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on, in words and numbers."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "device": platform.processor() or "CPU"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory_GiB": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def reason(error: BaseException) -> str:
    """An error in one line."""
    return escaped(f"{type(error).__name__}: {error}")[:300]


def checked_parity(device: str) -> Iterator[dict[str, Any]]:
    """A line per method; an error ends them, and is the last."""
    try:
        for name, loss, gradient in parity(device):
            yield {"method": name, "loss": loss, "gradient": gradient, "equal": max(loss, gradient) < TOLERANCE}
    except Exception as error:
        yield {"method": "not finished", "error": reason(error), "equal": False}


def line_of(row: Row) -> dict[str, Any]:
    """What a line starts with."""
    return {"row": str(row), **asdict(row)}


def measured_row(row: Row, place: Place, budget_s: float, ceiling: float) -> dict[str, Any]:
    """One line of the table; an error (out of memory, most often) is its content."""
    line = line_of(row)
    began = time.monotonic()
    try:
        work = prepared(row, place)
        release_memory(place.device)  # making a quantised network takes more than having one
        found: Measured = measure(
            work.step, place.device, budget_s, count=not {"compile", "quantize"} & row.switches.keys()
        )
    except Exception as error:
        return line | {"error": reason(error)}
    rate, share = work.per_step / found.step_s, found.flops / found.step_s / ceiling
    line |= {**asdict(found), "rate": rate, "unit": f"{work.unit}/s", "share": share if found.flops else None}
    return line | {"row_s": time.monotonic() - began}


def measured_rows(rows: Iterable[Row], place: Place, budget_s: float, ceiling: float) -> Iterator[dict[str, Any]]:
    """A line per row, from a process that is another one after an error: some of CUDA's leave nothing that works."""
    worker = None
    for row in rows:
        worker = worker or ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            line = worker.submit(measured_row, row, place, budget_s, ceiling).result()
        except BrokenProcessPool as error:  # its process has ended
            line = line_of(row) | {"error": reason(error)}
        if "error" in line:
            worker.shutdown()
            worker = None
        yield line
    if worker is not None:
        worker.shutdown()


# ---------------------------------------------------------------- the report


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(line: dict[str, Any]) -> list[str]:
    switches = ", ".join(f"{key} {value}" for key, value in line["switches"].items())
    start = [line["base"], line["work"], switches, str(line["batch"])]
    if "error" in line:
        return [*start, line["error"], "", "", ""]
    share = "" if line["share"] is None else f"{line['share']:.0%}"
    rate = f"{line['rate']:.3g} {line['unit']}"
    peak = "" if line["peak_GiB"] is None else f"{line['peak_GiB']:.1f}"
    return [*start, rate, f"{line['step_s']:.3f} ({line['steps']})", peak, share]


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    on = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    parts = ["# Measured by benchmarks/gpu.py", on]
    parts += [report["note"]] if "note" in report else []
    parts.append(f"A large bfloat16 matrix product: {report['ceiling'] / 1e12:.3g} TFLOP/s; shares below are of this.")
    if report["parity"]:
        rows = [
            [
                line["method"],
                *([line["error"], ""] if "error" in line else [f"{line[k]:.1e}" for k in ("loss", "gradient")]),
            ]
            for line in report["parity"]
        ]
        parts += [
            "## Against the CPU",
            "Relative differences on the embedded model, float32.",
            table(["method", "loss", "gradient"], rows),
        ]
    heads = ["model", "work", "switches", "batch", "rate", "s per call (calls)", "peak, GiB", "share"]
    parts += ["## Rates", table(heads, [cells(line) for line in report["rows"]])]
    if report["not_reached"]:
        parts.append("Not reached in time: " + "; ".join(report["not_reached"]) + ".")
    checks = [
        [c["name"], "passed" if c["passed"] else "FAILED", f"{c['seconds']:.0f} s", escaped(c["says"])]
        for c in report["checks"]
    ]
    parts += ["## Checks", table(["check", "", "took", "says"], checks)] if checks else []
    return "\n\n".join(parts) + "\n"


def write(report: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")


# ---------------------------------------------------------------- the command


def chosen_rows(args: argparse.Namespace) -> list[Row]:
    """What is measured: all, or those that are named; of the tiny form each work once, in small batches."""
    rows = [row for row in ROWS if args.compile or "compile" not in row.switches]
    rows = [row for row in rows if any(word in str(row) for word in args.rows or [""])]
    if not args.tiny:
        return rows
    plain = [row for row in reversed(rows) if "quantize" not in row.switches]
    once = {row.work: row for row in plain} | {row.base: row for row in plain if row.base not in ("sd15", "vit-h")}
    sizes = ("resolution",)  # of full size
    return [
        replace(r, batch=1, switches={k: v for k, v in r.switches.items() if k not in sizes}) for r in once.values()
    ]


def checked(args: argparse.Namespace, timeout_s: float) -> list[Check]:
    """Those that are not skipped, side by side in processes of their own."""
    checks = {
        "short": lambda: short_profile(args.device, timeout_s, args.tiny),
        "contract": lambda: contract_tests(args.device, timeout_s, TINY_TEST if args.tiny else ""),
    }
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda check: check(), (checks[name] for name in checks if name not in args.skip)))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All sections, in the order of what matters; returns the report, which is also written after each."""
    began, device = time.monotonic(), torch.device(args.device)
    left = lambda: args.minutes * 60 - (time.monotonic() - began)  # noqa: E731
    place, rows = Place(device, args.tiny), chosen_rows(args)
    report: dict[str, Any] = {"machine": machine(device), "parity": [], "rows": [], "not_reached": [], "checks": []}
    report["ceiling"] = matmul_flops(device, side=512 if args.tiny else 8192)
    for line in checked_parity(args.device) if "parity" not in args.skip else ():
        report["parity"].append(line)
        write(report, args.out)
    for_checks = 0 if args.tiny or {"contract", "short"} <= set(args.skip) else 150

    def in_time() -> Iterator[Row]:
        for row in rows:
            if left() > for_checks + args.row_seconds:
                yield row
            else:
                report["not_reached"].append(str(row))

    for line in measured_rows(in_time(), place, args.row_seconds, report["ceiling"]):
        report["rows"].append(line)
        sys.stderr.write(f"{' | '.join(cells(line))}\n")
        write(report, args.out)
    report["checks"] = [asdict(check) for check in checked(args, max(60, left() - 10))]
    write(report, args.out)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small models: proves that this runs, measures nothing")
    parser.add_argument("--minutes", type=float, default=8, help="for all of it")
    parser.add_argument("--row-seconds", type=float, default=6, help="for a row, besides making its models")
    parser.add_argument("--rows", nargs="*", help="only rows whose name has one of these words")
    parser.add_argument("--skip", nargs="*", default=[], choices=["parity", "short", "contract"])
    parser.add_argument("--compile", action="store_true", help="also the row with torch.compile, which takes minutes")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/gpu", help="file, without ending")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU: --device cpu --tiny tries the benchmark itself")
    os.environ["ATTUNE_DEVICE"] = args.device
    report = run(args)
    errors = [line["row"] for line in report["rows"] if "error" in line]
    failed = [check["name"] for check in report["checks"] if not check["passed"]]
    failed += [line["method"] for line in report["parity"] if not line["equal"]]
    sys.stdout.write(as_markdown(report))
    if failed or errors:
        sys.exit(f"not as it should be: {', '.join([*failed, *errors])}; {args.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
