"""The model registry: which adapter is the champion, and the score table that a new one is compared with.

Unlike the logging of runs, a registration is an explicit request and must not fail in silence: all functions raise,
RegistryError where the store is away or refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from attune.tracking import store as stores
from attune.tracking.labels import redact
from attune.tracking.reference import ENDING, Reference, dvc_md5, large_output

P = ParamSpec("P")
R = TypeVar("R")
CHAMPION, CHALLENGER = "champion", "challenger"
LIBRARIES = ("diffusers", "transformers", "torch", "peft", "safetensors", "accelerate")


class RegistryError(RuntimeError):
    """The registry is away, or refuses the request."""


def _raises_registry_error(ask: Callable[P, R]) -> Callable[P, R]:
    """Makes a function raise RegistryError, in one line, where MLflow raises its own error."""

    @wraps(ask)
    def asked(*args: P.args, **options: P.kwargs) -> R:
        stores.prepare()
        from mlflow.exceptions import MlflowException

        try:
            return ask(*args, **options)
        except (MlflowException, stores.DeletedError) as error:
            raise RegistryError(redact(error)) from None  # its cause may quote an address with a password

    return asked


@dataclass(frozen=True)
class Version:
    """A registered model: its number in the registry, the run it was logged in, and its tags."""

    number: str
    run_id: str
    tags: Mapping[str, str]


@_raises_registry_error
def get_by_alias(name: str, alias: str, uri: str, root: Path) -> Version | None:
    """The version that holds an alias; None if none does."""
    from mlflow.exceptions import MlflowException

    try:
        found = _client(uri, root).get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in stores.REFUSALS:
            return None
        raise
    return Version(str(found.version), found.run_id, found.tags)


@_raises_registry_error
def download_scores(model: Version, folder: Path, uri: str, root: Path) -> Path:
    """Fetches a version's score table into a folder."""
    return Path(_client(uri, root).download_artifacts(model.run_id, model.tags["scores"], str(folder)))


@_raises_registry_error
def register(
    name: str, adapter: Path, base_model: str, scores: Path, tags: Mapping[str, str], place: tuple[str, Path]
) -> Version:
    """Logs an adapter as an MLflow model with its score table, and registers it as a new version without alias.

    Of a large adapter the version has a reference to DVC's output instead of a copy (`tracking.reference`).

    Args:
        adapter: folder of a LoRA, as `Policy.save` writes it.
        base_model: what it was trained on: a hub id, or a folder, whose absolute path is baked in.
        place: uri and root of the store, as `tracking.run` takes them.
    """
    import mlflow

    client, large = _client(*place), large_output(adapter)
    tags = {**tags, "scores": scores.name} | (large.tags if large else {})
    store = stores.connect(stores.resolve_uri(place[0]), place[1])
    run = client.create_run(store.experiment, run_name=f"{name}/{tags['run']}", tags={"kind": "model", **tags})
    try:
        client.log_artifact(run.info.run_id, str(scores))
        if large is None:
            with _fluent(client.tracking_uri), mlflow.start_run(run_id=run.info.run_id):
                number = _log_adapter(name, adapter, base_model)
        else:
            number = _log_reference(client, name, run.info.run_id, large)
            client.set_terminated(run.info.run_id)
    except BaseException:
        client.set_terminated(run.info.run_id, "FAILED")
        raise
    for key, value in tags.items():
        client.set_model_version_tag(name, number, key, value)
    return Version(number, run.info.run_id, tags)


def _log_adapter(name: str, adapter: Path, base_model: str) -> str:
    """Copies an adapter into the active run, and registers it; the number of the version."""
    import mlflow

    info = mlflow.diffusers.log_model(
        adapter_path=str(adapter),
        base_model=_found(base_model),
        name="adapter",
        registered_model_name=name,
        pip_requirements=[f"{library}=={version(library)}" for library in LIBRARIES],
    )
    return str(info.registered_model_version)


def _log_reference(client: Any, name: str, run_id: str, large: Reference) -> str:
    """Registers what a note in a run says where to find; the number of the version."""
    from mlflow.exceptions import MlflowException

    note = f"adapter{ENDING}"
    client.log_text(run_id, large.to_json(), note)
    with suppress(MlflowException):  # it exists; where the store refuses for another reason, the next line says so
        client.create_registered_model(name)
    return str(client.create_model_version(name, f"runs:/{run_id}/{note}", run_id, description=str(large)).version)


def _found(base_model: str) -> str:
    """A base model as others find it: the absolute path of a folder, or its id on the Hub."""
    return str(Path(base_model).resolve()) if Path(base_model).exists() else base_model


@_raises_registry_error
def set_alias(name: str, alias: str, number: str, uri: str, root: Path) -> None:
    """Moves an alias to a version. A challenger that becomes the champion loses its old alias."""
    client = _client(uri, root)
    client.set_registered_model_alias(name, alias, number)
    rival = get_by_alias(name, CHALLENGER, uri, root)
    if alias == CHAMPION and rival is not None and rival.number == number:
        client.delete_registered_model_alias(name, CHALLENGER)


@_raises_registry_error
def load(name: str, uri: str, root: Path) -> Any:
    """The champion as `mlflow.diffusers.load_model` gives it, its `load_pipeline()` is a diffusers pipeline.

    The base model is pinned to the commit that the adapter was trained on; MLflow pins the newest one at registration.
    A large adapter is that of the checkout, if it is the same.

    Raises:
        LookupError: there is none, or a large adapter is not here, with the command that brings it.
    """
    import mlflow

    if (found := get_by_alias(name, CHAMPION, uri, root)) is None:
        raise LookupError(f"no version of {name} holds the alias {CHAMPION}")
    if (large := Reference.of_tags(found.tags)) is not None:
        adapter = _in_checkout(large, root, f"version {found.number} of {name}")
        base = {"base_model": _found(found.tags["base"]), "base_model_revision": found.tags.get("base.revision")}
        return mlflow.diffusers.DiffusersAdapterModel(adapter_path=str(adapter), adapter_type="lora", **base)
    with _fluent(_client(uri, root).tracking_uri):
        model = mlflow.diffusers.load_model(f"models:/{name}@{CHAMPION}")
    return replace(model, base_model_revision=found.tags.get("base.revision"))


def _in_checkout(large: Reference, root: Path, what: str) -> Path:
    """Where a large adapter is in the checkout. Raises LookupError if another one, or none, is there."""
    path = root / large.path
    if path.exists() and dvc_md5(path) == large.md5:
        return path
    ways = "; ".join(f"{wish}: {command}" for wish, command in large.ways.items())
    raise LookupError(f"{what} is not copied in the registry, and {path} is not it (md5 {large.md5}). {ways}")


@contextmanager
def _fluent(uri: str) -> Iterator[None]:
    """Sets MLflow's global store, which its fluent functions use, for the with-body."""
    import mlflow

    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])


def _client(uri: str, root: Path) -> Any:
    stores.prepare()
    stores.connect(stores.resolve_uri(uri), root)
    from mlflow import MlflowClient

    place = stores.absolute(stores.resolve_uri(uri), root)
    return MlflowClient(tracking_uri=place, registry_uri=place)
