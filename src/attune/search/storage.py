"""What is wrong with a study's storage, and the way out, as one line."""

from __future__ import annotations

import json
import shlex
from json import JSONDecodeError
from pathlib import Path

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError

from attune.text import redact

FAULTS = (StorageInternalError, OperationalError, InterfaceError, DatabaseError, ValueError, LookupError, OSError)
SCHEMES = ("sqlite:///", "postgresql+psycopg://")


def fault(storage: str, error: BaseException) -> str | None:
    """Why an error is the storage's fault, and what to do; None where it is not.

    Args:
        storage: its address or, of a journal, its file. A password in it is not told.
    """
    if isinstance(error, JSONDecodeError | UnicodeDecodeError | LookupError) and not storage.startswith(SCHEMES):
        return _journal_fault(Path(storage))
    if isinstance(error, OSError) and not storage.startswith(SCHEMES) and not Path(storage).exists():
        return f"{storage}: the study's journal is gone; the same command begins a new one"
    if not isinstance(error, StorageInternalError | DatabaseError | InterfaceError):
        return None
    reason = redact(" ".join(str(error.__cause__ or error).split()))[:200]
    return f"{redact(storage)}: the study's database is away, locked or gone; the same command goes on ({reason})"


def _journal_fault(file: Path) -> str | None:
    """The first line of a journal that is no record: a disk was full, or the machine went down while it was written.

    Later records may refer to it, so what comes before it is all that can be kept.
    """
    if not file.exists():
        return f"{file}: the study's journal is gone; the same command begins a new one"
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if line and not _is_record(line):
            name = shlex.quote(str(file))
            return (
                f"{file}: line {number} of the study's journal is broken. To keep the trials before it: "
                f"head -n {number - 1} {name} > {name}.kept && mv {name}.kept {name}; for a fresh start: rm {name}"
            )
    return None


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
