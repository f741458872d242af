"""Stage align@<run>: fine-tunes an adapter, or the whole denoiser, with one method."""

from __future__ import annotations

import argparse

from attune.paths import MODELS, REPORTS, project_root
from attune.stages.common import is_first, launch, remember_run, stage
from attune.stages.history import write_history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", required=True, help="a file of attune/methods")
    parser.add_argument("--run", help="what the result is called, and its block of settings; the method, if left out")
    given = parser.parse_args()
    name = given.run or given.method
    launch("attune.stages.align")
    with stage(f"align@{name}", "model", f"methods.{name}", method=name, uses=given.method) as (profile, run):
        from attune.finetune import align

        history, facts = align(name, given.method, profile, run, MODELS / name, checkpoints=project_root())
        if not is_first():
            return
        write_history(REPORTS / "train" / name, history, facts)
        remember_run(name, run.run_id)
        run.artifact(MODELS / name)


if __name__ == "__main__":
    main()
