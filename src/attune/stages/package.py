"""Writes a run's model for others to use: `make package RUN=dpo`.

The package holds a LoRA as diffusers writes it and as ComfyUI reads it (of UNets also A1111), a card with the scores,
and a picture. Each file is loaded into diffusers and sampled with before the package is called done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attune.config.resolve import Settings, load
from attune.config.schema import ConfigError
from attune.files import replaced_folder
from attune.paths import Paths
from attune.stages.common import use_threads
from attune.stages.plan import say
from attune.stop import stoppable
from attune.text import message
from attune.versions import commit

CARD_PROMPTS = 4
NO_PROMPTS = ("a portrait photo of an old fisherman", "a small house by a lake in autumn, oil painting")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="RUN", help="a run of params.yaml with a method")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="packages/<profile>/<run>, if not given")
    given = parser.parse_args()
    try:
        settings = load()
        use_threads(settings.threads)
        package(given.run, settings, given.out or package_folder(given.run, settings))
    except (
        ConfigError,
        ValueError,
        OSError,
        RuntimeError,
    ) as error:  # settings, files, and a layout that is read wrong
        sys.exit(message(f"package: {error}"))


def package_folder(run: str, settings: Settings) -> Path:
    """Where the package of a run is, if nothing else is said."""
    return Path("packages", settings.profile, run)


def package(run: str, settings: Settings, out: Path) -> None:
    """Writes the package, whole or not at all, and says what was checked."""
    from attune.sharing.models import trained_folder

    folder = trained_folder(run, settings)
    if out.exists() and not (out / "run.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out {out}: is there and is no package, so it is not replaced; name another folder")

    from attune.build import load_backbone
    from attune.sharing.card import Evidence
    from attune.sharing.package import read_trained, scores_of, write_package

    model = read_trained(folder, data_of(settings))
    summary, missing = scores_of(model, Paths(settings.profile).reports)
    sampling = settings.generate.sampling
    evidence = Evidence(summary, missing, commit(), sampling.model_dump())
    with replaced_folder(out) as beside:
        checks = write_package(beside, model, evidence, _prompts(settings), sampling, load_backbone)
    for check in checks:
        say(str(check))
    if not model.is_lora:
        say(f"no file for ComfyUI and A1111: kohya's layout holds LoRA alone; {run} trained all weights (lora: null)")
    if missing:
        say(missing)
    say(str(out))


def data_of(settings: Settings) -> Mapping[str, Any]:
    """The source of the data and its settings, for the card."""
    return {"source": settings.source, **settings.data.model_dump(mode="json")}


def _prompts(settings: Settings) -> list[str]:
    """Test prompts for the picture; some of our own where none are prepared."""
    import pandas as pd

    file = Paths(settings.profile).prepared / "test_prompts.parquet"
    if not file.is_file():
        return list(NO_PROMPTS)
    return pd.read_parquet(file).prompt.head(CARD_PROMPTS).tolist()


if __name__ == "__main__":
    with stoppable("package"):
        main()
