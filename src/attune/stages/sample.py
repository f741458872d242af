"""Images of any prompt by a run's model, beside those of others from the same noise: `make sample RUN=dpo`.

A model is a run of params.yaml, `base`, or an adapter or denoiser: a file, a folder or owner/name@commit. The sampling
is the report's (`generate.sampling`). It writes one picture, or with --out FOLDER a folder of images for each model.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from attune.config.resolve import Settings, load
from attune.config.schema import ConfigError
from attune.paths import Paths
from attune.stages.common import use_threads
from attune.stages.plan import say
from attune.stop import stoppable
from attune.text import message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs="+", required=True, metavar="MODEL", help="whose images")
    parser.add_argument("--against", nargs="+", default=[], metavar="MODEL", help="models shown beside it, say base")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a list: .txt, .json or .jsonl")
    parser.add_argument("--n", type=int, default=4, help="images of each prompt (4)")
    parser.add_argument("--seed", type=int, help="of the noise; the profile's, if not given")
    parser.add_argument("--out", type=Path, metavar="PLACE", help="a .png, or a folder; reports/<profile>/samples")
    given = parser.parse_args()
    if not 1 <= given.n <= 1000:
        parser.error(f"--n {given.n}: at least 1 and at most 1000")
    if given.seed is not None and not 0 <= given.seed < 2**63:
        parser.error(f"--seed {given.seed}: at least 0 and below 2^63")
    try:
        settings = load()
        use_threads(settings.threads)
        sample(given, settings)
    except (ConfigError, ValueError, OSError, RuntimeError) as error:  # prompts, models, files, memory, images of NaN
        sys.exit(message(f"sample: {error}"))


def sample(given: argparse.Namespace, settings: Settings) -> None:
    """Checks what is asked for, loads the base model, samples and writes."""
    from attune.sharing import sample as sheets
    from attune.sharing.models import find_models

    began = time.monotonic()
    models = find_models([*given.against, *given.run], settings)
    prompts = sheets.read_prompts(given.prompt, given.prompts, say)
    seed = settings.seed if given.seed is None else given.seed
    rows = sheets.image_rows(prompts, given.n)
    samples = Paths(settings.profile).reports / "samples"
    out = given.out or samples / sheets.default_name(models, prompts, given.n, seed)
    as_sheet = out.suffix.lower() == ".png"
    if as_sheet and len(rows) * len(models) > sheets.MOST:
        raise sheets.SampleError(
            f"{len(rows) * len(models):,} images are too many for one picture ({sheets.MOST:,}); say --out FOLDER"
        )
    if not as_sheet:
        sheets.check_folder(out, [model.name for model in models])

    from attune.build import load_backbone

    backbone = load_backbone(settings.model)
    for line in sheets.cut_prompts(backbone, prompts):
        say(line)
    generated = sheets.generate(backbone, models, rows, settings.generate.sampling, seed)
    if as_sheet:
        sheets.write_sheet(out, dict(generated), prompts, given.n)
    else:
        for name, images in generated:
            sheets.write_folder(out / name, images, rows)
    say(f"{out} ({len(rows) * len(models)} images, {time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    with stoppable("sample"):
        main()
