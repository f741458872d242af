"""Artifacts by reference: of a large output that DVC keeps, the store gets a note of where it is and how to get it.

A copy would be the third and fourth of it, beside the file and DVC's cache: one in the outbox, one in the store.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COPIED_BYTES = 100_000_000  # outputs of DVC up to this size are copied all the same: they can be seen in the UI
ENDING = ".reference.json"


@dataclass(frozen=True)
class Reference:
    """An output of a DVC stage, by its content."""

    path: str  # of the file or folder, from the repository's root
    md5: str  # as dvc.lock has it; ends with .dir for a folder
    bytes: int

    @property
    def ways(self) -> dict[str, str]:
        """What a person may want -> the command for it."""
        return {
            "in a checkout of a commit that has it": f"dvc checkout {self.path}",
            "which commits those are": f"git log --all --oneline -S {self.md5} -- dvc.lock",
            "without a checkout": f"dvc get <address of the repository> {self.path} --rev <commit>",
        }

    def __str__(self) -> str:
        return f"{self.path}, {self.bytes / 1e6:,.0f} MB, md5 {self.md5}; dvc checkout {self.path}"

    def to_json(self) -> str:
        """What a person reads in the UI."""
        about = {"kept by": "DVC; too large to be copied here", **vars(self), "how to get it": self.ways}
        return json.dumps(about, indent=1) + "\n"

    @property
    def tags(self) -> dict[str, str]:
        """What a version in the model registry says of it; `of_tags` reads them."""
        return {f"dvc.{name}": str(value) for name, value in vars(self).items()}

    @staticmethod
    def of_tags(tags: Mapping[str, str]) -> Reference | None:
        """None of a version whose model was copied."""
        if "dvc.md5" not in tags:
            return None
        return Reference(tags["dvc.path"], tags["dvc.md5"], int(tags["dvc.bytes"]))


def large_output(path: Path) -> Reference | None:
    """A reference to an output of DVC below the working directory; None if it is small enough to be copied.

    Raises:
        FileNotFoundError: it does not exist.
    """
    size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in _files(path).values())
    if size <= COPIED_BYTES:
        return None
    return Reference(Path(os.path.relpath(path)).as_posix(), dvc_md5(path), size)


def dvc_md5(path: Path) -> str:
    """What DVC 3 writes as md5 of a file or folder; of a folder it is that of a list of its files' md5.

    Raises:
        FileNotFoundError: it does not exist.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, _md5).hexdigest()
    listing = [{"md5": dvc_md5(file), "relpath": name} for name, file in sorted(_files(path).items())]
    return _md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def _files(folder: Path) -> dict[str, Path]:
    """The files of a folder by their paths in it. Raises FileNotFoundError if there is no such folder."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist")
    return {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}


def _md5(content: bytes = b"") -> hashlib._Hash:
    return hashlib.md5(content, usedforsecurity=False)
