"""The report from the files of finished stages: summary.json, report.md, report.html and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from attune.evaluation.diagnostics import diagnostics
from attune.evaluation.images import read_images
from attune.evaluation.people import read_people
from attune.evaluation.protocol import read_comparable, read_made_with
from attune.evaluation.report import figures, metrics
from attune.evaluation.report.document import Picture
from attune.evaluation.report.plots import write_plots
from attune.evaluation.report.render import to_html, to_markdown
from attune.evaluation.summarise import summarise
from attune.evaluation.summary import Summary
from attune.files import write_atomically

GRID_PROMPTS = 10


def make_report(
    runs: Sequence[str],
    reports: Path,
    generated: Path,
    *,
    trained_on: Mapping[str, Sequence[str]],
    selected_by: Mapping[str, Sequence[str]],
    seed: int,
) -> Summary:
    """Compares runs under one protocol, and writes summary.json, report.md, report.html and figures/ into `reports`.

    Args:
        runs: names, the base first.
        reports: folder with scores/<run>.parquet; and, where there are any, features/<run>.npy, train/<run>.csv,
            train/preference.json and people/<run>-vs-<run>.csv.
        generated: folder of the runs' folders of images.
        trained_on: run -> scorers it optimised, itself or where it started.
        selected_by: run -> scorers that early stopping or a search chose it by.
        seed: of the bootstrap.

    Raises:
        ValueError: the runs cannot be compared, see `protocol.read_comparable` and `summarise`, or a file of
            people's answers cannot be read.
    """
    base = runs[0]
    tables, protocol = read_comparable({name: reports / "scores" / f"{name}.parquet" for name in runs})
    summary = summarise(
        tables,
        protocol,
        base=base,
        trained_on=trained_on,
        selected_by=selected_by,
        diagnostics=diagnostics(tables, generated, reports / "features", base),
        seed=seed,
    )
    made_with = {name: read_made_with(reports / "scores" / f"{name}.parquet") for name in runs}
    people = read_people(reports / "people", tables, generated, seed)
    summary = replace(summary, made_with=made_with, people=people)
    plots = {"samples": ("The same prompts and noise, every model", _sample_grid(summary, tables, generated))}
    if summary.tuned:
        plots["win_rate"] = ("Win rate against base", figures.win_rate_plot(summary))
        plots["difference"] = ("Score difference to base", figures.score_difference_plot(summary))
    plots |= _training_figures(runs, reports / "train")
    write_report(reports, summary, _save(plots, reports / "figures"))
    write_plots(reports / "plots", summary, reports / "train")
    return summary


def write_report(directory: str | Path, summary: Summary, pictures: Sequence[Picture] = ()) -> None:
    """Writes summary.json, report.md and report.html into `directory`, each atomically."""
    files = {
        "summary.json": summary.to_json(),
        "metrics.json": metrics.to_json(summary),
        "report.md": to_markdown(summary, pictures),
        "report.html": to_html(summary, pictures),
    }
    for name, text in files.items():
        write_atomically(Path(directory) / name, text.encode())


def _sample_grid(summary: Summary, tables: Mapping[str, pd.DataFrame], generated: Path) -> Image.Image:
    """A few prompts, evenly spread over the table, with each run's image and its headline score."""
    base = tables[summary.base]
    rows = np.linspace(0, len(base) - 1, GRID_PROMPTS).astype(int)
    shown = {name: read_images(generated / name, table["file"].iloc[rows]) for name, table in tables.items()}
    scores = {name: table[summary.headline].iloc[rows].tolist() for name, table in tables.items()}
    return figures.image_grid(shown, base["prompt"].iloc[rows].tolist(), scores)


def _training_figures(runs: Sequence[str], train: Path) -> dict[str, tuple[str, Image.Image]]:
    """What the trainings here logged, if there were any: the runs' curves, and the preference model's accuracy."""
    plots = {}
    logged = {name: pd.read_csv(path) for name in runs if (path := train / f"{name}.csv").exists()}
    if curves := {name: frame for name, frame in logged.items() if len(frame)}:  # a run without training has no rows
        plots["curves"] = ("Training curves", figures.training_curves(curves))
    preference = train / "preference.json"
    if preference.exists() and (accuracy := json.loads(preference.read_text())["accuracy_by_t"]):
        plots["accuracy_by_t"] = ("Preference accuracy by timestep", figures.accuracy_by_t_plot(accuracy))
    return plots


def _save(plots: Mapping[str, tuple[str, Image.Image]], folder: Path) -> list[Picture]:
    """Writes name -> (title, picture) as <name>.png."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, (title, picture) in plots.items():
        picture.save(folder / f"{name}.png")
        pictures.append(Picture(title, f"{folder.name}/{name}.png", (folder / f"{name}.png").read_bytes()))
    return pictures
