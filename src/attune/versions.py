"""Versions of what computes: they stand beside numbers, because another version may move their last digits."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "pillow", "numpy")


@cache
def versions() -> dict[str, str]:
    """Name -> version, of Python and of the libraries that a training, an image or a score depends on."""
    found = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    with suppress(PackageNotFoundError):
        found["bitsandbytes"] = version("bitsandbytes")  # computes with quantised weights, where it is installed
    return found


def commit() -> str | None:
    """The checked-out commit, with `+` behind it where src has uncommitted changes; None without git."""
    with suppress(OSError, subprocess.SubprocessError):
        return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "--", "src") else "")
    return None


def _git(*words: str) -> str:
    command = ["git", "--no-optional-locks", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
