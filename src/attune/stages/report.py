"""Stage report: the comparison, as JSON for tools, Markdown for git and HTML for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attune.config.profile import Profile
from attune.paths import GENERATED, MODELS, REPORTS
from attune.stages.common import BASE, stage

GRID_PROMPTS = 10


def main() -> None:
    with stage("report", "generate", "scorers") as (profile, run):
        from attune.config.check import read_params

        params = read_params()
        names = [BASE, *params["run_methods"], *params["evaluate"]["extra"]]
        summary = report(names, profile)
        for name, entry in summary["methods"].items():
            run.summary({f"{name}/{scorer}": values["mean"] for scorer, values in entry["scores"].items()})
        run.artifact(REPORTS / "report.md")
        run.artifact(REPORTS / "figures")


def report(names: list[str], profile: Profile) -> Mapping:
    """Compares all models under one protocol and writes reports/."""
    from attune.evaluation.protocol import read_comparable
    from attune.evaluation.report.verdict import summarise, write_report

    tables, protocol = read_comparable({name: REPORTS / "scores" / f"{name}.parquet" for name in names})
    summary = summarise(
        tables,
        protocol,
        base=BASE,
        trained_on=trained_on(names),
        extras=extras(names, tables),
        seed=profile.seed,
    )
    write_report(REPORTS, summary, figures(names, summary, tables))
    return summary


def trained_on(names: list[str]) -> dict[str, list[str]]:
    """Which scorers each model has seen in training, itself or where it started: its gains there are not held out."""
    import json

    records = {name: path for name in names if (path := REPORTS / "train" / f"{name}.json").exists()}
    facts = {name: json.loads(path.read_text()) for name, path in records.items()}

    def seen(name: str) -> list[str]:
        own, start = facts[name].get("trained_on", []), Path(facts[name].get("start") or "")
        before = seen(start.name) if start.parent == MODELS and start.name in facts else []
        return [*before, *(scorer for scorer in own if scorer not in before)]

    return {name: seen(name) for name in facts}


def read_images(name: str, files):
    """The generated images of a model, uint8 (n, H, W, 3)."""
    import numpy as np
    from PIL import Image

    return np.stack([np.asarray(Image.open(GENERATED / name / file).convert("RGB")) for file in files])


def extras(names, tables) -> dict:
    """Signs of reward hacking: diversity, image indices and drift from base."""
    import numpy as np

    from attune.evaluation.diversity import cmmd, diversity

    features = {n: np.load(p) for n in names if (p := REPORTS / "features" / f"{n}.npy").exists()}
    result: dict[str, dict] = {name: {"indices": mean_indices(name, tables[name].file)} for name in names}
    for name, rows in features.items():
        if not rows.shape[1]:  # no scorer of the profile offers features
            continue
        result[name]["diversity"] = diversity(rows, tables[name].prompt.tolist())
        if name != BASE:
            result[name]["drift"] = {"cmmd": cmmd(rows, features[BASE])}
    return result


def mean_indices(name: str, files) -> dict[str, float]:
    """Mean image indices of a model, image by image: thousands of large ones do not fit in memory."""
    import pandas as pd

    from attune.evaluation.diversity import image_indices

    rows = [image_indices(read_images(name, [file]) / 255.0) for file in files]
    return pd.DataFrame(rows).mean().to_dict()


def figures(names, summary, tables) -> list:
    """All pictures of the report, written to reports/figures."""
    import json

    import numpy as np
    import pandas as pd

    from attune.evaluation.report import figures as draw
    from attune.evaluation.report.document import Picture

    rows = np.linspace(0, len(tables[BASE]) - 1, GRID_PROMPTS).astype(int)
    prompts = tables[BASE].prompt.iloc[rows].tolist()
    headline = summary_scorer(tables)
    shown = {name: read_images(name, tables[name].file.iloc[rows]) for name in names}
    scores = {name: tables[name][headline].iloc[rows].tolist() for name in names}
    curves = {n: pd.read_csv(p) for n in names if (p := REPORTS / "train" / f"{n}.csv").exists()}
    drawn = {
        "samples": ("The same prompts and noise, every model", draw.image_grid(shown, prompts, scores)),
        "win_rate": ("Win rate against base", draw.win_rate_plot(summary)),
        "difference": ("Score difference to base", draw.score_difference_plot(summary)),
        "curves": ("Training curves", draw.training_curves(curves)),
    }
    preference = REPORTS / "train" / "preference.json"
    accuracy = json.loads(preference.read_text())["accuracy_by_t"] if preference.exists() else {}
    if accuracy:
        drawn["accuracy_by_t"] = ("Preference accuracy by timestep", draw.accuracy_by_t_plot(accuracy))
    folder = REPORTS / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, (title, picture) in drawn.items():
        picture.save(folder / f"{name}.png")
        pictures.append(Picture(title, f"figures/{name}.png", (folder / f"{name}.png").read_bytes()))
    return pictures


def summary_scorer(tables) -> str:
    """The first scorer column: the headline."""
    from attune.evaluation.protocol import score_columns

    return score_columns(tables[BASE])[0]


if __name__ == "__main__":
    main()
