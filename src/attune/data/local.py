"""Files here that a data set names. Names and files are untrusted: only regular files inside its folder are opened."""

from __future__ import annotations

import os
import re
import stat
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from attune.data.quarantine import RejectedRow

MAX_IMAGE_BYTES = 2**28  # of an encoded image: 268 MB, an uncompressed one of 89 million pixels
MAX_TEXT_BYTES = 2**20  # of a prompt, label or flag that is a file of its own
MAX_NAME_BYTES = 255  # of a file or a folder, on all common file systems
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx")  # in lower case
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def read_regular(path: Path, limit: int = MAX_IMAGE_BYTES) -> bytes:
    """The bytes of a regular file; nothing else is opened, for a FIFO or a device may never end.

    Raises:
        RejectedRow: `missing_image`, or `too_large` for more than `limit` bytes.
    """
    try:
        _check_regular(path, os.stat(path))
        # not blocking, in case that the file has been replaced by a FIFO since
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            state = os.fstat(file.fileno())
            _check_regular(path, state)
            if state.st_size > limit:
                raise RejectedRow("too_large", f"{path} has {state.st_size} bytes; {limit} are read at most")
            return file.read(limit)
    except (OSError, ValueError) as error:
        if isinstance(error, RejectedRow):
            raise
        raise RejectedRow("missing_image", f"{path}: {getattr(error, 'strerror', None) or error}") from None


def read_regular_start(path: Path, size: int = 4096) -> bytes:
    """The first bytes of a regular file. Raises RejectedRow, `missing_image`, for anything else."""
    try:
        _check_regular(path, os.stat(path))
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            _check_regular(path, os.fstat(file.fileno()))
            return file.read(size)
    except OSError as error:
        raise RejectedRow("missing_image", f"{path}: {error.strerror or error}") from None


def _check_regular(path: Path, state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        kind = KINDS.get(stat.S_IFMT(state.st_mode), "a device")
        raise RejectedRow("missing_image", f"{path} is {kind}; expected a file")


def is_utf_16(beginning: bytes) -> bool:
    """Whether a text file that begins so is UTF-16, as spreadsheets save it: half of its bytes are zeros."""
    return beginning.startswith((b"\xff\xfe", b"\xfe\xff")) or beginning.count(0) > len(beginning) // 4


def inside(root: Path, name: Any) -> Path:
    """The path of that name in a folder, whether there is a file or not. Links must not lead out of the folder.

    Raises:
        RejectedRow: `missing_image`: it is no name, or it leads out.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise RejectedRow("missing_image", "expected the name of an image file, and there is none")
    if any(len(part.encode(errors="replace")) > MAX_NAME_BYTES for part in re.split(r"[\\/]", name)):
        raise RejectedRow("missing_image", f"{name[:40]!r}... is longer than a file's name, {MAX_NAME_BYTES} bytes")
    parts = PurePosixPath(name.replace("\\", "/"))
    path = root / parts
    if parts.is_absolute() or ".." in parts.parts or not _is_below(path, root):
        raise RejectedRow("missing_image", f"{name!r} leads out of {root}; copy the file into the folder")
    return path


def _is_below(path: Path, root: Path) -> bool:
    """Whether a path lies in a folder once all links are followed."""
    try:
        return _real(path.parent).is_relative_to(_real(root)) and (
            not path.is_symlink() or path.resolve().is_relative_to(_real(root))
        )
    except (OSError, RuntimeError):  # a name too long, or links in a circle
        return False


@lru_cache(maxsize=4096)  # one per folder: images of a folder share it
def _real(folder: Path) -> Path:
    return folder.resolve()


def is_hidden(relative: PurePosixPath | Path) -> bool:
    """Whether a system keeps the file for itself: `._x.png` and `.DS_Store` of macOS, `Thumbs.db` of Windows."""
    return any(part.startswith(".") or part.lower() in SYSTEM_FILES for part in relative.parts)
