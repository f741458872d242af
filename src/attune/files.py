"""Files: what identifies their content, and how they are replaced whole."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any


def values_sha(values: Any) -> str:
    """First 12 hex digits of the SHA-256 of the values' canonical JSON; key order does not count."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file, or of a folder's listing with its files' digests."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listing = "\n".join(f"{file.relative_to(path)} {digest(file)}" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replaces `path` by `data` in one step; a reader, or a crash, sees the old bytes or the new ones."""
    path = Path(os.path.realpath(path))  # of a link, what it leads to
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside the target: a rename is atomic only within one file system
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's 0600 would lock out whoever serves the report
        os.chmod(temporary, path.stat().st_mode & 0o7777 if path.exists() else 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sqlite_url(file: Path) -> str:
    """The address of a SQLite database, wherever it is."""
    return f"sqlite:///{_without_signs(file.parent) / file.name}"


@cache
def _without_signs(folder: Path) -> Path:
    """The folder, or a link to it where its name has signs that mean something in an address.

    Quoting does not help: SQLAlchemy takes the quotes away, but MLflow makes a folder of the quoted name.
    """
    if not set("%?#") & set(str(folder)):
        return folder
    holder = Path(tempfile.mkdtemp(prefix="attune-"))
    atexit.register(shutil.rmtree, holder, ignore_errors=True)
    (holder / "root").symlink_to(folder, target_is_directory=True)
    return holder / "root"
