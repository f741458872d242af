"""The run of a whole pipeline in the store: the parent of its stages, which no process owns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from filelock import FileLock

if TYPE_CHECKING:
    from attune.tracking.store import Store

DESCRIPTION = "mlflow.note.content"  # of a run and of an experiment: Markdown
# The UI hides tags of these names. Of an experiment, the time in ms of the record that its description is from; of a
# pipeline, the name that it began with.
DESCRIBED, NAME = "mlflow.attune.described", "mlflow.attune.name"


def find_or_create(store: Store, pipeline: Mapping[str, Any]) -> str:
    """The id of the run that groups the stages of one repro or experiment.

    Args:
        pipeline: as `labels.pipeline_run` gives it.
    """
    with FileLock(store.root / ".mlflow-init.lock", timeout=120):  # or two stages would create one each
        where = f"tags.`pipeline.id` = '{pipeline['id']}'"
        found = store.client.search_runs([store.experiment], where, max_results=1)
        if not found:
            about = {"start_time": pipeline.get("start"), "tags": pipeline["tags"], "run_name": pipeline["name"]}
            found = [store.client.create_run(store.experiment, **about)]  # starts before the stage that asks for it
            # no process knows which stage is the last one: it has ended, and each stage's end moves its end on
            store.client.set_terminated(found[0].info.run_id, end_time=pipeline.get("start"))
    return found[0].info.run_id


def extend(store: Store, run_id: str) -> None:
    """Where a run that has ended belongs to a pipeline, that ends no earlier, and as the last of its stages has.

    A stage that ran beside one that failed does not make up for it.
    """
    stage = store.client.get_run(run_id)
    parent = stage.data.tags.get("mlflow.parentRunId")
    if parent is None:
        return
    pipeline = store.client.get_run(parent)
    is_pipeline = pipeline.data.tags.get("kind") == "pipeline" and pipeline.info.lifecycle_stage == "active"
    if is_pipeline and stage.info.end_time > (pipeline.info.end_time or 0):
        was_beside = stage.info.start_time < (pipeline.info.end_time or 0)
        status = pipeline.info.status if was_beside and pipeline.info.status != "FINISHED" else stage.info.status
        store.client.set_terminated(parent, status, end_time=stage.info.end_time)


def describe(store: Store, run_id: str, record: Mapping[str, Any]) -> None:
    """Sets a run's description; a pipeline's headline also stands before its name and in the experiment's description.

    Those are what the UI's start page and its table of runs show without a click. A description that somebody has
    written for the experiment stays, and so does one of a later pipeline.
    """
    client, headline = store.client, record["headline"]
    client.set_tag(run_id, DESCRIPTION, record["text"])
    run = client.get_run(run_id)
    if run.data.tags.get("kind") != "pipeline":
        return
    name = run.data.tags.get(NAME, run.info.run_name)
    if "dvc.exp" not in run.data.tags:  # an experiment keeps the name that DVC knows it by
        client.set_tag(run_id, NAME, name)
        client.set_tag(run_id, "mlflow.runName", f"{headline} ({name})")  # of which the table shows the beginning
    tags = client.get_experiment(store.experiment).tags
    is_ours = DESCRIBED in tags or not tags.get(DESCRIPTION)
    if is_ours and int(tags.get(DESCRIBED, 0)) <= record["time"]:
        client.set_experiment_tag(store.experiment, DESCRIPTION, f"{headline} ({name})")
        client.set_experiment_tag(store.experiment, DESCRIBED, str(record["time"]))
