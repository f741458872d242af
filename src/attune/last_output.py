"""The files of a stage's last output, where DVC keeps them.

DVC removes the outputs of a stage before it runs it. What the last run made lies in DVC's cache by then, and a stage
that finds a part of its work there need not do it again.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from attune.config.resolve import read_yaml
from attune.copies import dvc_cache
from attune.paths import project_root

LOG = logging.getLogger("attune.last_output")
LOCK = "dvc.lock"


def last_output(folder: Path) -> dict[str, Path]:
    """Path relative to an output folder -> the file in DVC's cache; {} where there is none, or no DVC.

    Args:
        folder: as dvc.yaml names it.
    """
    try:
        outs = [out for stage in read_yaml(LOCK)["stages"].values() for out in stage.get("outs", ())]
        digest = next(out["md5"] for out in outs if out["path"] == folder.as_posix())
        usual = project_root() / ".dvc" / "cache"
        objects = (usual if usual.exists() else dvc_cache(project_root())) / "files" / "md5"
        listing = json.loads(_object(objects, digest).read_text())
        found = {each["relpath"]: _object(objects, each["md5"]) for each in listing}
    except Exception as error:  # a cache of another form, or none: all is computed again
        LOG.debug("no last output of %s: %s", folder, error)
        return {}
    return {name: file for name, file in found.items() if file.is_file()}


def _object(objects: Path, digest: str) -> Path:
    return objects / digest[:2] / digest[2:]
