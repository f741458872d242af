"""Stage evaluate@<method>: scores held-out images with every scorer, one row per image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from attune.config import Profile
from attune.hashing import digest
from attune.stages.common import GENERATED, REPORTS, RUNS, stage

AT_ONCE = 32
FEATURES_FROM = "aesthetic"  # whose image features measure diversity and drift; no method trains on it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", required=True, help="a folder of data/generated")
    name = parser.parse_args().method
    with stage(f"evaluate@{name}", "scorers", method=name) as (profile, run):
        frame, protocol = evaluate(name, profile)
        means = {f"score/{column}": float(frame[column].mean()) for column in protocol.scorer_names}
        run.summary(means)
        trained_by = RUNS / name
        if trained_by.exists():  # so that one row of the tracking UI holds beta, learning rate and scores
            run.note(trained_by.read_text().strip() or None, means)


def evaluate(name: str, profile: Profile):
    """Scores data/generated/<name> and writes reports/scores/<name>.parquet and reports/features/<name>.npy."""
    import numpy as np
    import pandas as pd
    import torch
    from PIL import Image
    from tqdm import tqdm

    from attune.assembly import load_scorers
    from attune.evaluation.protocol import Protocol, write_scores

    folder = GENERATED / name
    frame = pd.read_parquet(folder / "index.parquet")
    images = np.stack([np.asarray(Image.open(folder / file).convert("RGB")) for file in frame.file])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    prompts = frame.prompt.tolist()
    scorers = load_scorers(profile)
    for scorer_name, scorer in tqdm(scorers.items(), desc=f"score {name}", unit="scorer"):
        rows = range(0, len(frame), AT_ONCE)
        with torch.no_grad():
            scores = torch.cat([scorer(pixels[i : i + AT_ONCE], prompts[i : i + AT_ONCE]) for i in rows])
        frame[scorer_name] = scores.double().numpy()
        check_range(scorer_name, frame[scorer_name].mean(), getattr(scorer, "range", None))
        if hasattr(scorer, "parts"):
            for part, values in scorer.parts(pixels, prompts).items():
                frame[f"{scorer_name}.{part}"] = values
    protocol = Protocol.from_dict(
        json.loads((folder / "protocol.json").read_text())
        | {"scorers": [identity(name, block) for name, block in profile.scorers.items()]}
    )
    path = REPORTS / "scores" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_scores(path, frame, protocol)
    if FEATURES_FROM in scorers:
        features = [scorers[FEATURES_FROM].features(pixels[i : i + AT_ONCE]) for i in range(0, len(frame), AT_ONCE)]
        (REPORTS / "features").mkdir(parents=True, exist_ok=True)
        np.save(REPORTS / "features" / f"{name}.npy", torch.cat(features).numpy())
    return frame, protocol


def check_range(name: str, mean: float, sane: tuple[float, float] | None) -> None:
    """Fails loudly on a mean that only wrong preprocessing or a wrong activation can give."""
    if sane is not None and not sane[0] <= mean <= sane[1]:
        raise SystemExit(
            f"scorer {name}: mean {mean:.3f} lies outside {sane[0]}..{sane[1]}; "
            "wrong weights, preprocessing or activation (scorers.<name>.expected_mean sets this guard)"
        )


def identity(name: str, block: dict) -> list[str]:
    """(name, revision or hash of the weights, preprocessing) of a scorer, for the protocol."""
    path = Path(str(block.get("path", "")))
    revision = block.get("revision") or (digest(path)[:12] if block.get("path") and path.exists() else "built-in")
    return [name, str(revision), str(block.get("preprocess", "default"))]


if __name__ == "__main__":
    main()
