"""Uploads a run's package to the Hugging Face Hub: `make push RUN=dpo REPO=owner/name`.

It goes nowhere else than --repo says. The token is the one of `hf auth login`, or HF_TOKEN; it is never printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from attune.config.resolve import load
from attune.config.schema import ConfigError
from attune.hub_upload import check_repo, upload
from attune.stages.package import package_folder
from attune.stages.plan import say
from attune.stop import stoppable
from attune.text import message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="RUN", help="whose package is uploaded")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="where to; created if it is not there")
    parser.add_argument("--package", type=Path, metavar="FOLDER", help="packages/<profile>/<run>, if not given")
    parser.add_argument("--private", action="store_true", help="a new repository is for its owner alone")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, and ask nobody")
    given = parser.parse_args()
    try:
        check_repo(given.repo)
        settings = load()
        folder = given.package or package_folder(given.run, settings)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if not (folder / "run.json").is_file() or not (folder / "README.md").is_file():
            raise ValueError(f"{folder} is no package: `make package RUN={given.run}`")
        for file in files:
            say(f"{file.relative_to(folder)}  {file.stat().st_size:,} bytes")
        if given.dry_run:
            say(f"would go to {given.repo}; nothing was sent")
            return
        say(upload(folder, given.repo, f"{given.run} of profile {settings.profile}, by attune", given.private))
    except (ConfigError, ValueError, OSError) as error:
        sys.exit(message(f"push: {error}"))


if __name__ == "__main__":
    with stoppable("push"):
        main()
