"""What identifies local files that a stage reads, fast enough to be asked at every start.

A file is hashed once; the digest is kept in .checkpoints/digests.json and used again while size, time of change and
inode stay what they were.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from attune.files import write_atomically

SHOW_PROGRESS = 1_000_000_000  # bytes to hash, from which on a bar is shown
NOTHING = "absent"


class Digests:
    """Digests of local files and folders, remembered between runs in `cache`."""

    def __init__(self, cache: Path):
        self._cache = cache
        self._known: dict[str, list] = _read(cache)
        self._used: dict[str, list] = {}

    def of(self, paths: Iterable[str | Path]) -> dict[str, str]:
        """Path -> first 16 hex digits of the SHA-256 of a file, or of a folder's names and files; `absent` if none."""
        return {str(path): self._digest(Path(path)) for path in sorted(set(map(str, paths)))}

    def save(self) -> None:
        """Writes what was learnt, with what was known before."""
        if self._used:
            merged = {**self._known, **self._used}
            write_atomically(self._cache, json.dumps(merged).encode())

    def _digest(self, path: Path) -> str:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
            self._hash(files)
            listing = "\n".join(f"{file.relative_to(path).as_posix()} {self._one(file)}" for file in files)
            return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()[:16]
        return self._one(path) if path.is_file() else NOTHING

    def _one(self, file: Path) -> str:
        self._hash([file])
        return self._used[str(file.resolve())][1]

    def _hash(self, files: list[Path]) -> None:
        """Hashes those that are new or have changed, with a bar if that takes long."""
        wanted = [file for file in files if not self._is_known(file)]
        total = sum(file.stat().st_size for file in wanted)
        with tqdm(total=total, unit="B", unit_scale=True, desc="hash files", disable=total < SHOW_PROGRESS) as bar:
            for file in wanted:
                state = _state(file)
                with file.open("rb") as opened:
                    digest = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
                self._used[str(file.resolve())] = [state, digest]
                bar.update(state[0])

    def _is_known(self, file: Path) -> bool:
        key = str(file.resolve())
        entry = self._used.get(key) or self._known.get(key)
        if entry is None or entry[0] != _state(file):
            return False
        self._used[key] = entry
        return True


def _state(file: Path) -> list[int]:
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _read(cache: Path) -> dict[str, list]:
    try:
        return json.loads(cache.read_text())
    except (OSError, ValueError):  # nothing known yet, or a file that broke off: everything is hashed again
        return {}
