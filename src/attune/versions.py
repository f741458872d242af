"""Versions of what computes: recorded beside numbers, because another version may move their last digits."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "pillow", "numpy")


@cache
def versions() -> dict[str, str]:
    """Name -> version, of Python and of the libraries that a training, an image or a score depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
