"""The report from the files of finished stages: JSON for tools, Markdown, the page, and a grid of samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from attune.evaluation.images import read_images
from attune.evaluation.people import read_people
from attune.evaluation.protocol import read_comparable, read_made_with
from attune.evaluation.report import metrics
from attune.evaluation.report.accuracy import accuracy
from attune.evaluation.report.concord import concord
from attune.evaluation.report.curves import training
from attune.evaluation.report.document import Picture
from attune.evaluation.report.dots import panels
from attune.evaluation.report.forest import by_gain
from attune.evaluation.report.grid import image_grid
from attune.evaluation.report.page import Extras, to_html
from attune.evaluation.report.pictures import pictures
from attune.evaluation.report.plots import write_plots
from attune.evaluation.report.render import to_markdown
from attune.evaluation.seeds import read_seeds
from attune.evaluation.signs import measure_signs
from attune.evaluation.summarise import summarise
from attune.evaluation.summary import Summary
from attune.files import write_atomically

GRID_PROMPTS = 10
PREFERENCE = "preference"  # the training of the preference model


def make_report(
    runs: Sequence[str],
    reports: Path,
    generated: Path,
    *,
    trained_on: Mapping[str, Sequence[str]],
    selected_by: Mapping[str, Sequence[str]],
    seed: int,
    settings: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Summary:
    """Compares runs under one protocol, and writes what `write_report` does, plots/ and figures/ into `reports`.

    Args:
        runs: names, the base first.
        reports: folder with scores/<run>.parquet; and, where there are any, features/<run>.npy, train/<run>.csv,
            train/preference.json, data.json and people/<run>-vs-<run>.csv.
        generated: folder of the runs' folders of images.
        trained_on: run -> scorers it optimised, itself or where it started.
        selected_by: run -> scorers that early stopping or a search chose it by.
        seed: of the bootstrap.
        settings: identifies those of the stages before (`planning.seeds.settings_sha`); seeds of others are left out.
        about: fields of `page.Extras` that no file has.

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
        signs=measure_signs(tables, generated, reports / "features", base, seed),
        seed=seed,
    )
    made_with = {name: read_made_with(reports / "scores" / f"{name}.parquet") for name in runs}
    people = read_people(reports / "people", tables, generated, seed)
    summary = replace(summary, made_with=made_with, people=people)
    figures = reports / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    _sample_grid(summary, tables, generated).save(figures / "samples.png")
    seeds = read_seeds(reports / "seeds", summary, settings)
    extras = replace(extras_of(summary, tables, reports, generated), seeds=seeds, **(about or {}))
    write_plots(reports / "plots", summary, reports / "train")
    write_report(reports, summary, extras, [Picture("The same prompts and noise, every model", "figures/samples.png")])
    return summary


def write_report(
    directory: str | Path, summary: Summary, extras: Extras | None = None, pictures: Sequence[Picture] = ()
) -> None:
    """Writes summary.json, metrics.json, report.md and report.html into `directory`, each atomically."""
    files = {
        "summary.json": summary.to_json(),
        "metrics.json": metrics.to_json(summary),
        "report.md": to_markdown(summary, pictures),
        "report.html": to_html(summary, extras),
    }
    for name, text in files.items():
        write_atomically(Path(directory) / name, text.encode())


def extras_of(summary: Summary, tables: Mapping[str, pd.DataFrame], reports: Path, generated: Path) -> Extras:
    """What the page shows besides the summary, from the files of the stages."""
    runs, base, scorer = by_gain(summary), summary.base, summary.headline
    logged = {name: pd.read_csv(path) for name in runs if (path := reports / "train" / f"{name}.csv").exists()}
    preference = _json(reports / "train" / f"{PREFERENCE}.json")
    return Extras(
        pictures=pictures(tables, generated, runs, base, scorer),
        panels=panels(tables, runs, base, scorer),
        concord=concord(tables, runs, base, summary.scorers),
        trainings=[found for name, frame in logged.items() if (found := training(name, frame))],
        accuracy=accuracy(preference.get("accuracy_by_t") or {}),
        data=_json(reports / "data.json"),
        steps={name: len(frame) for name, frame in logged.items()},
    )


def _sample_grid(summary: Summary, tables: Mapping[str, pd.DataFrame], generated: Path) -> Image.Image:
    """A few prompts, evenly spread over the table, with each run's first image and its headline score."""
    prompts = tables[summary.base]["prompt"].drop_duplicates().tolist()
    places = np.unique(np.linspace(0, len(prompts) - 1, GRID_PROMPTS).astype(int))
    prompts = [prompts[place] for place in places]
    first = {name: table.sort_values("ordinal").drop_duplicates("prompt") for name, table in tables.items()}
    rows = {name: table.set_index("prompt").loc[prompts] for name, table in first.items()}
    shown = {name: read_images(generated / name, table["file"].tolist()) for name, table in rows.items()}
    return image_grid(shown, prompts, {name: table[summary.headline].tolist() for name, table in rows.items()})


def _json(path: Path) -> dict[str, Any]:
    """What a file says; nothing where it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
