"""The command `attune`: a subcommand for each thing that can be done in a checkout.

It starts the checkout's own code, wherever `attune` itself is installed, so what runs is what git and DVC know.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ALWAYS = {"plan": ["--show"], "sweep": ["--dvc"]}  # options of a person's call; DVC's stages come without them
COMMANDS = {
    "init": "a profile for pictures of your own: counts them, chooses runs and settings",
    "plan": "what a run will do and need, and all that would stop it",
    "inspect": "look at the data before training: reports/<profile>/data.html",
    "label": "a page to choose between images, to train on or to judge two models blindly",
    "repro": "run the whole pipeline, what has changed of it, and print the result",
    "seeds": "run the whole pipeline for several seeds and compare them",
    "sample": "images of any prompt by any run, next to the base's",
    "package": "an adapter with its card, for diffusers, ComfyUI and A1111",
    "push": "upload a package to the Hugging Face Hub",
    "sweep": "search the settings of a run",
    "champion": "register the best run of the report, if it beats the champion",
    "replay": "send what a tracking store that was away has not got yet",
    "clean-checkpoints": "remove what stopped trainings saved and nothing will resume",
}
"""Name -> what it does. Each is a module of attune/stages, which says its own options: `attune plan --help`."""


def main() -> None:
    listed = "\n".join(f"  {name:18} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="attune",
        description=f"Tune text-to-image diffusion models to human taste.\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        usage="attune <command> [options]",
    )
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    given, options = parser.parse_known_args(sys.argv[1:2])[0], sys.argv[2:]
    if given.command not in COMMANDS:
        asked = given.command is None or given.command.startswith("-")
        parser.print_help(sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else f"\nattune: there is no command {given.command!r}")
    run([f"attune.stages.{given.command.replace('-', '_')}", *ALWAYS.get(given.command, []), *options])


def run(words: list[str]) -> None:
    """Becomes a module of the checkout that the working directory is in, with the same Python and its programs."""
    root = checkout(Path.cwd())
    if root is None:
        sys.exit(
            "attune: works in a checkout of its repository (params.yaml, dvc.yaml), and neither this folder nor one "
            "above it is one; git clone the repository and call attune there"
        )
    os.chdir(root)
    os.environ["PYTHONPATH"] = "src"
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", *words]
    if os.name == "nt":  # where exec does not wait for what it starts
        sys.exit(subprocess.call(command))
    os.execv(sys.executable, command)


def checkout(folder: Path) -> Path | None:
    """The checkout that holds a folder."""
    marks = ("params.yaml", "dvc.yaml", "src/attune")
    return next((each for each in (folder, *folder.parents) if all((each / mark).exists() for mark in marks)), None)


if __name__ == "__main__":
    main()
