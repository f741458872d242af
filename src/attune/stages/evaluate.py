"""Stage evaluate@<method>: scores held-out images with every scorer, one row per image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attune.config.plugins import plugin_config
from attune.config.profile import Profile
from attune.paths import GENERATED, REPORTS, RUNS
from attune.stages.common import stage

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from attune.evaluation.protocol import Protocol
    from attune.interfaces import Reward

AT_ONCE = 32  # images; 1024 px ones take 0.4 GB as float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", required=True, help="a folder of data/generated")
    name = parser.parse_args().method
    with stage(f"evaluate@{name}", "scorers", method=name) as (profile, run):
        frame, protocol = evaluate(name, profile)
        means = {column: float(frame[column].mean()) for column in protocol.scorer_names}
        run.summary(means)
        trained_by = RUNS / name
        if trained_by.exists():  # so that one row of the tracking UI holds beta, learning rate and scores
            run.note(trained_by.read_text().strip() or None, means)


def evaluate(name: str, profile: Profile) -> tuple[pd.DataFrame, Protocol]:
    """Scores data/generated/<name> and writes reports/scores/<name>.parquet and reports/features/<name>.npy.

    Scorers are loaded one after the other, and images a batch at a time: memory holds one scorer and one batch.
    Diversity and drift are measured by the image features of the first scorer, in the profile's order, that
    offers them; if none does, the features are (n, 0) and the report leaves both out.
    """
    import numpy as np
    import pandas as pd

    from attune.build import load_scorer
    from attune.evaluation.protocol import write_scores

    folder = GENERATED / name
    frame = pd.read_parquet(folder / "index.parquet")
    protocol = scored_under(folder, profile)
    features = None
    for scorer_name in profile.scorers:
        scorer = load_scorer(scorer_name, profile)
        wanted = features is None and hasattr(scorer, "features")
        columns, found = score(scorer_name, scorer, folder, frame, wanted)
        features = found if wanted else features
        check_mean(scorer_name, columns[scorer_name].mean(), getattr(scorer, "expected_range", None))
        frame = frame.assign(**columns)
    write_scores(REPORTS / "scores" / f"{name}.parquet", frame, protocol)
    (REPORTS / "features").mkdir(parents=True, exist_ok=True)
    none = np.empty((len(frame), 0), np.float32)
    np.save(REPORTS / "features" / f"{name}.npy", none if features is None else features)
    return frame, protocol


def scored_under(folder: Path, profile: Profile) -> Protocol:
    """How the images were made, and how this profile scores them."""
    from attune.evaluation.protocol import Protocol, scorer_identity

    configs = {n: plugin_config("rewards", n, block, f"scorers.{n}") for n, block in profile.scorers.items()}
    made = json.loads((folder / "protocol.json").read_text())
    return Protocol.from_dict(made | {"scorers": [scorer_identity(n, config) for n, config in configs.items()]})


def score(
    name: str, scorer: Reward, folder: Path, frame: pd.DataFrame, with_features: bool
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """One pass of a scorer over the images: its columns `name` and `name.part`, and features (n, D) if wanted."""
    import numpy as np
    import torch
    from tqdm import tqdm

    parts: dict[str, list[Any]] = {}
    features = []
    for start in tqdm(range(0, len(frame), AT_ONCE), desc=f"{folder.name}: {name}", unit="batch"):
        rows = frame.iloc[start : start + AT_ONCE]
        pixels, prompts = read_pixels(folder, rows.file), rows.prompt.tolist()
        with torch.no_grad():
            found = {name: scorer(pixels, prompts).double().numpy()}
        if hasattr(scorer, "parts"):
            found |= {f"{name}.{part}": values for part, values in scorer.parts(pixels, prompts).items()}
        for column, values in found.items():
            parts.setdefault(column, []).append(values)
        if with_features:
            features.append(scorer.features(pixels).numpy())
    columns = {column: np.concatenate(values) for column, values in parts.items()}
    return columns, np.concatenate(features) if with_features else None


def read_pixels(folder: Path, files: pd.Series):
    """Images (B, 3, H, W) in [0, 1]; an alpha channel is dropped, as no scorer knows what to do with one."""
    import numpy as np
    import torch
    from PIL import Image

    arrays = [np.asarray(Image.open(folder / file).convert("RGB")) for file in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def check_mean(name: str, mean: float, sane: tuple[float, float] | None) -> None:
    """Fails loudly on a mean that only wrong preprocessing or a wrong activation can give."""
    if sane is not None and not sane[0] <= mean <= sane[1]:
        raise SystemExit(
            f"scorer {name}: mean {mean:.3f} lies outside {sane[0]:g} to {sane[1]:g}. Check, in this order: that the "
            f"weights are the ones you mean, that hidden_act is theirs, that preprocess is as published, and that the "
            f"images are images. If all is right, scorers.{name}.expected_range sets another interval."
        )


if __name__ == "__main__":
    main()
