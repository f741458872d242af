"""The report of `speed.py`: rows measured at different times in one file, and its table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attune.files import write_atomically

HEADS = [
    *("row", "reference in the order of", "reference / attune, seconds", "pairs", "the same, processor time"),
    *("reference, s", "attune, s", "reference, GiB", "attune, GiB", "largest difference", "measured"),
]
ABOUT = """# attune beside the order of operations of what it replaces

Written by `benchmarks/speed.py`. "Reference" is a plain loop in the order of operations of another code, written for
this benchmark, on the same weights. Above 1, a ratio says that attune is faster; below 1 (**bold**), that it is slower.
It is the median of pairs of calls made in turn in one process; in brackets are the lowest and the highest pair.
`tiny` is the embedded model in float32; `sd15` has the shapes of Stable Diffusion 1.5 and random weights in bfloat16.
Differences are relative, in float32 on the embedded model: of losses, scores, latents or images, and behind the comma
of what a call changes in the weights. Memory is that of a process of its own for each side: on a CPU all of it,
libraries (0.6 GiB) and the reading of weights included; on a GPU what torch allocated."""


def read(file: Path) -> dict[str, Any]:
    """Rows by name, of a report written before; empty if there is none."""
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else {}


def write(rows: Mapping[str, Any], out: Path, order: Sequence[str]) -> None:
    """Writes `<out>.json` and `<out>.md`; rows that `order` does not know come last."""
    known = {name: i for i, name in enumerate(order)}
    ordered = {name: rows[name] for name in sorted(rows, key=lambda name: (known.get(name, len(known)), name))}
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"rows": ordered}, indent=1) + "\n"
    write_atomically(out.with_suffix(".json"), text.encode())
    write_atomically(out.with_suffix(".md"), as_markdown(ordered).encode())


def as_markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The report as a page."""
    lines = [HEADS, ["---"] * len(HEADS), *(cells(name, row) for name, row in rows.items())]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    slower = [name for name, row in rows.items() if is_slower(row)]
    said = f"attune is slower in {len(slower)} of {len(rows)} rows: {'; '.join(slower)}." if slower else ""
    machines = sorted({", ".join(f"{key} {value}" for key, value in row["machine"].items()) for row in rows.values()})
    return "\n\n".join([ABOUT, *filter(None, [said]), table, "Machines: " + "; ".join(machines)]) + "\n"


def is_slower(row: Mapping[str, Any]) -> bool:
    """Whether attune is, by the clock or by processor time."""
    return any(row[kind]["median"] < 1 for kind in ("ratio", "ratio_processor") if kind in row)


def cells(name: str, row: Mapping[str, Any]) -> list[str]:
    """One line of the table; an error is its content."""
    measured = f"{row['date']}, {row['commit']}, {row['device']}"
    if "error" in row:
        return [name, row["reference_is"], escaped(row["error"]), *[""] * (len(HEADS) - 4), measured]
    memory = [f"{row[key]:.2f}" if key in row else "" for key in ("reference_GiB", "ours_GiB")]
    seconds = [f"{row[key]:.3g}" for key in ("reference_s", "ours_s")]
    processor = ratio(row["ratio_processor"]) if "ratio_processor" in row else ""
    found = [ratio(row["ratio"]), str(row["n"]), processor, *seconds, *memory, difference(row["differences"]), measured]
    return [name, row["reference_is"], *found]


def ratio(found: Mapping[str, float]) -> str:
    middle = f"{found['median']:.2f}"
    return f"{f'**{middle}**' if found['median'] < 1 else middle} [{found['min']:.2f}, {found['max']:.2f}]"


def difference(found: Mapping[str, float]) -> str:
    """The largest of outputs, and that of weights if there is one."""
    outputs = max(value for name, value in found.items() if name != "changes of weights")
    numbers = [outputs, *([found["changes of weights"]] if "changes of weights" in found else [])]
    return ", ".join(f"{value:.0e}" if value else "0" for value in numbers)


def escaped(text: str) -> str:
    """For a cell of a Markdown table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")[:300]
