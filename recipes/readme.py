"""Writes README's table of results and its picture, from the report of the default profile.

    PYTHONPATH=src:. python -m recipes.readme

The numbers are those of reports/tiny/summary.json and reports/tiny/seeds; the picture is the first screen of
reports/tiny/report.html, taken by Chromium at 1280 x 800.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from attune.evaluation.seeds import AcrossSeeds, read_seeds
from attune.evaluation.summary import Summary

README, REPORTS, PICTURE = Path("README.md"), Path("reports/tiny"), Path("docs/report.png")
PLAN = Path("plan/report.json")
START, END = "<!-- table -->\n", "<!-- /table -->"
NAMES = {"oracle": "oracle (ground truth)", "pickscore": "PickScore", "hpsv2": "HPSv2"}
DIGITS = {"pickscore": 2}  # decimals of the base's mean; 3 of all others


def main() -> None:
    summary = Summary.from_json((REPORTS / "summary.json").read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    settings = json.loads(PLAN.read_text(encoding="utf-8"))["settings"]
    seeds = read_seeds(REPORTS / "seeds", summary, settings)
    README.write_text(with_table(text, table(summary, seeds)), encoding="utf-8")
    if chromium := shutil.which("chromium"):
        screenshot(REPORTS / "report.html", chromium)


def with_table(text: str, lines: str) -> str:
    """README's text with the table between its marks."""
    head, rest = text.split(START)
    return f"{head}{START}{lines}{END}{rest.split(END)[1]}"


def table(summary: Summary, seeds: AcrossSeeds | None) -> str:
    """Markdown: mean of the base, then paired differences with their intervals; the headline over seeds in the end."""
    last = [f"{summary.headline}, {len(seeds.seeds)} seeds"] if seeds else []
    header = ["", *(NAMES.get(scorer, scorer) for scorer in summary.scorers), *last]
    rows = [header, ["---"] * len(header)]
    base = summary.methods[summary.base]
    rows.append(
        [summary.base, *(f"{base.scores[s].mean:.{DIGITS.get(s, 3)}f}" for s in summary.scorers), *[""] * len(last)]
    )
    for name, method in summary.tuned.items():
        row = [name, *(_change(e.difference, e.difference_ci95) for s in summary.scorers for e in (method.vs_base[s],))]
        if seeds:
            found = seeds.runs[name][summary.headline]
            row.append(_change(found.mean, found.ci95))
        rows.append(row)
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows)


def _change(value: float, interval: tuple[float, float]) -> str:
    return f"{value:+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]"


def screenshot(page: Path, chromium: str) -> None:
    """The first screen of the page, as a PNG."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        tab.goto(page.resolve().as_uri())
        tab.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main()
