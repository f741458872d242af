"""MLflow's database in a file: made whole or not at all, wherever the checkout is."""

from __future__ import annotations

import glob
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from attune.files import sqlite_url


def prepare_database(file: Path, root: Path) -> None:
    """Makes MLflow's tables in a new database, which takes seconds, and gives it its name when it is whole.

    A process that is killed on the way, or a full disk, leaves a draft that the next one removes.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    drafts = f".{file.name}.draft"
    for left in file.parent.glob(f"{glob.escape(drafts)}*"):
        left.unlink()
    if not file.exists() or file.stat().st_size == 0:
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        draft = file.with_name(drafts)
        try:
            SqlAlchemyStore(sqlite_url(draft), artifact_location(root / "mlruns")).engine.dispose()
            os.replace(draft, file)
        finally:
            for left in file.parent.glob(f"{glob.escape(drafts)}*"):
                left.unlink()
    with closing(sqlite3.connect(file, timeout=5)) as connection:
        connection.execute("pragma journal_mode=wal")  # four writers: 15 ms a call instead of 60


def artifact_location(folder: Path) -> str:
    """A folder for artifacts, as a URI where its name has signs that MLflow would take for parts of one."""
    return folder.as_uri() if set("%?#") & set(str(folder)) else str(folder)
