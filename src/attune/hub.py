"""Weights: where they are, and how they are fetched. `attune.weights` reads them.

Notation: a local file or folder, or `owner/name[/file/in/repository]@commit` on the Hugging Face Hub. The commit is
written in full (40 hex digits), because a branch or a tag can be moved and a score could then not be repeated.

Settings are parsed with this module, so the Hub's libraries are imported in the functions that need them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attune.files import digest

NOTATION = "owner/name[/file]@<commit, 40 hex digits>"
_HUB = re.compile(r"(?P<place>[\w.-]+/[\w.-]+)(?P<inner>(/[^/@]+)*)(@(?P<commit>.*))?")


class HubError(OSError):
    """The Hub could not give what was asked of it; the message names the source and the remedy."""


@dataclass(frozen=True)
class Source:
    """Where weights are: `place` is a local path, or with a `commit` a Hub repository, of which `inner` is meant."""

    place: str
    inner: str = ""
    commit: str | None = None

    @property
    def stem(self) -> str:
        """The last part of its name, without ending."""
        return Path(self.inner or self.place).stem

    def __truediv__(self, name: str) -> Source:
        """A file or folder inside this folder."""
        if self.commit is None:
            return replace(self, place=str(Path(self.place) / name))
        return replace(self, inner=f"{self.inner}/{name}".strip("/"))

    def __str__(self) -> str:
        return self.place if self.commit is None else f"{self.place}{self.inner and '/'}{self.inner}@{self.commit}"


def parse(text: str | Path) -> Source:
    """Reads the notation. What exists here is local, whatever it looks like.

    Raises:
        ValueError: it is empty, or is not here and looks like a Hub address without its full commit.
    """
    text = str(text)
    if not text.strip():
        raise ValueError(f"an empty path; write a local one, or {NOTATION}")
    found = _HUB.fullmatch(text)
    if Path(text).exists() or found is None or text.startswith("."):
        return Source(text)
    place, inner, commit = found["place"], found["inner"].strip("/"), found["commit"]
    if commit is not None and re.fullmatch("[0-9a-f]{40}", commit):
        return Source(place, inner, commit)
    if commit is not None:
        raise ValueError(f"{text}: {commit!r} is no full commit (40 hex digits); a branch or a tag can move")
    if inner and Path(text.split("/")[0]).is_dir():
        return Source(text)  # a local file that is not here yet: its first folder is
    raise ValueError(f"{text} is not here, and on the Hub it needs its full commit: {text}@<40 hex digits>")


# ---------------------------------------------------------------- fetching


def fetch_file(source: Source, sha256: str | None = None, repo_type: str = "model") -> Path:
    """The file, downloaded once if it is on the Hub.

    Args:
        sha256: what it must hash to, 64 hex digits; None accepts any file.
        repo_type: "model" or "dataset".

    Raises:
        FileNotFoundError: no such local file.
        HubError: it could not be downloaded.
        ValueError: the source is a whole repository, or the file has another hash.
    """
    if source.commit is None:
        file = Path(source.place)
        if not file.is_file():
            raise FileNotFoundError(f"no file {source}; one on the Hub is written {NOTATION}")
    elif not source.inner:
        raise ValueError(f"{source}: which file of the repository? It is written {NOTATION}")
    else:
        from huggingface_hub import hf_hub_download

        with _hub_errors(source):
            file = Path(hf_hub_download(source.place, source.inner, repo_type=repo_type, revision=source.commit))
    if sha256 is not None:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(f"{source} has sha256 {found}, not {sha256}; it was not loaded")
    return Path(file)


def fetch_folder(source: Source, patterns: Sequence[str]) -> Path:
    """The folder; if it is on the Hub, with all its files that match a pattern, each downloaded once.

    Raises:
        FileNotFoundError: no such folder.
        HubError: it could not be downloaded.
    """
    folder = Path(source.place)
    if source.commit is not None:
        folder = Path(_snapshot(source, patterns)) / source.inner
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {source}; one on the Hub is written {NOTATION}")
    return folder


def download_size(source: Source, patterns: Sequence[str]) -> int:
    """Bytes that `fetch_folder` would still download. Raises HubError if the Hub cannot be asked."""
    if source.commit is None:
        return 0
    return sum(file.file_size for file in _snapshot(source, patterns, dry_run=True) if file.will_download)


def list_files(source: Source, repo_type: str = "model") -> dict[str, int]:
    """Files of a Hub repository, or below its folder `inner`: path in the repository -> bytes. Raises HubError."""
    from huggingface_hub import HfApi

    with _hub_errors(source):
        tree = HfApi().list_repo_tree(source.place, repo_type=repo_type, revision=source.commit, recursive=True)
        files = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
    inside = f"{source.inner}/" if source.inner else ""
    return {path: size for path, size in files.items() if path == source.inner or path.startswith(inside)}


def is_here(source: Source) -> bool:
    """Whether the source is local, or the cache has the file or something of the repository; asks no network."""
    if source.commit is None:
        return True
    from huggingface_hub import constants

    folders = [f"{kind}s--{source.place.replace('/', '--')}" for kind in ("model", "dataset")]
    snapshots = [Path(constants.HF_HUB_CACHE, folder, "snapshots", source.commit) for folder in folders]
    return any((snapshot / source.inner).exists() for snapshot in snapshots)


def _snapshot(source: Source, patterns: Sequence[str], **options: Any) -> Any:
    from huggingface_hub import snapshot_download

    allowed = [f"{source.inner}/{pattern}".lstrip("/") for pattern in patterns]
    with _hub_errors(source):
        return snapshot_download(source.place, revision=source.commit, allow_patterns=allowed, **options)


@contextmanager
def _hub_errors(source: Source) -> Iterator[None]:
    """Turns the many errors of huggingface_hub and its network library into one line and a remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:  # gated ones as well
        raise HubError(f"{source}: no such repository, or no access: check the name, or `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{source}: the repository has no such commit") from error
    except errors.RemoteEntryNotFoundError as error:
        raise HubError(f"{source}: the repository has no such file at this commit") from error
    except Exception as error:  # no network, a proxy, a full disk: the message says which
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = "once it was fetched where there is a network, the cache (HF_HOME) serves without"
        raise HubError(f"{source} is not in the cache and could not be fetched ({reason}); {remedy}") from error


def identity(source: Source) -> str:
    """What tells these weights from any others, for a protocol or a cache key.

    On the Hub the commit (12 hex digits) and the file; here the digest of the folder, or of the file and of the layout
    beside it (`.json` of the same stem). Where local weights lie does not count.

    Raises:
        FileNotFoundError: local weights are not there.
    """
    if source.commit is not None:
        return f"{source.commit[:12]}{source.inner and '/'}{source.inner}"
    path = Path(source.place)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {source}")
    layout = path.with_suffix(".json")
    beside = [layout] if path.is_file() and layout != path and layout.exists() else []
    return "+".join(digest(file)[:12] for file in (path, *beside))
