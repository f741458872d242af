"""Runs `dvc repro` with the words given, then prints how the runs compare and where the report is."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from attune.config.resolve import load
from attune.config.schema import ConfigError
from attune.paths import Paths
from attune.text import printable

LARGEST_NAME = 20  # characters of a run's name in the table
WIDTH = 99  # characters of a line


def main() -> None:
    code = subprocess.call([sys.executable, "-m", "dvc", "repro", *sys.argv[1:]])
    if code:
        sys.exit(code)
    try:
        reports = Paths(load().profile).reports
    except ConfigError as error:
        sys.exit(str(error))
    summary, report = reports / "summary.json", reports / "report.html"
    if summary.exists() and report.exists():
        sys.stdout.write(f"{table(summary.read_text(encoding='utf-8'))}report: {report}\n")


def table(text: str) -> str:
    """The report's first sentence, then a line for each run: mean, difference to the base, and whether it is hacked.

    Args:
        text: of summary.json.
    """
    from attune.evaluation.report.metrics import hacking_word
    from attune.evaluation.report.sentence import first_sentence
    from attune.evaluation.summary import Summary

    summary = Summary.from_json(text)
    headline = summary.headline
    lines = ["", *textwrap.wrap(printable(first_sentence(summary)), WIDTH), ""]
    lines += [f"{'run':{LARGEST_NAME}}  {headline:>10}  to {summary.base}, 95 % interval"]
    for name, method in summary.methods.items():
        entry = method.vs_base.get(headline)
        compared = ""
        if entry is not None:
            low, high = entry.difference_ci95
            word = hacking_word(method)
            hacking = f"; hacking: {word}" if word else ""
            compared = f"{entry.difference:+.4g} [{low:+.4g}, {high:+.4g}]  {entry.evidence}{hacking}"
        lines.append(f"{name:{LARGEST_NAME}.{LARGEST_NAME}}  {method.scores[headline].mean:10.4g}  {compared}".rstrip())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
