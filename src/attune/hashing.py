"""Identities: of values, of files and of folders."""

from __future__ import annotations

import hashlib
import json
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
