"""Files: what identifies their content, and how they are replaced whole."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

MANIFEST = "shards.json"


def values_sha(values: Any) -> str:
    """First 12 hex digits of the SHA-256 of the values' canonical JSON; key order does not count."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file, or of a folder's listing with its files' digests.

    Of a folder with a manifest, which has the hashes of all that lies below, only the files in the folder itself count.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    inside = path.glob("*") if (path / MANIFEST).is_file() else path.rglob("*")
    files = sorted(file for file in inside if file.is_file())
    listing = "\n".join(f"{file.relative_to(path)} {digest(file)}" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replaces `path` by `data` in one step; a reader, or a crash, sees the old bytes or the new ones."""
    with replaced_file(path) as beside:
        beside.write_bytes(data)


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """A file beside `path` for the block to write; it takes the place of `path` once the block has ended well.

    It has the mode of the file it replaces; a new one has the mode that the umask gives, whatever wrote it.
    """
    path = Path(os.path.realpath(path))  # of a link, what it leads to
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside the target: a rename is atomic only within one file system
    beside = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}")
    beside.touch(0o666, exist_ok=False)
    mode = stat.S_IMODE((path if path.exists() else beside).stat().st_mode)
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(beside, mode)  # safetensors renames a file of mode 0600 to the name that it is given
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` for the block to fill; it takes the place of `path` once the block has ended well.

    If it did not end well, nothing is left of it, and what was at `path` stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.{word}") for word in ("new", "old"))
    beside.mkdir()
    try:
        yield beside
        let_umask_decide(beside)
        if path.exists():
            path.rename(old)
        beside.rename(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def let_umask_decide(folder: Path) -> None:
    """Gives each file below a folder the mode that the umask gives new files; safetensors leaves them at 0600."""
    probe = folder / f".{secrets.token_hex(4)}"  # the umask itself can only be read by changing it, for all threads
    probe.touch(0o666, exist_ok=False)
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


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
    Finalize(None, shutil.rmtree, (holder,), {"ignore_errors": True}, exitpriority=0)  # also at the end of a fork
    (holder / "root").symlink_to(folder, target_is_directory=True)
    return holder / "root"
