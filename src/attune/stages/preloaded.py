"""Stages whose libraries are imported already: for a run of many short stages on one machine.

To import torch, diffusers, transformers, peft and MLflow takes about five seconds in every stage. `serving` starts a
process that does so once. A stage that finds its address in the environment asks it for a copy of itself (`hand_over`):
a fork, which is given the stage's words, environment and standard streams and is the stage from there on. The process
that has asked passes signals on to it, and ends as it does. Nothing is computed before the fork, so numbers stay as
they are. Linux only; elsewhere, and where no server answers, stages import for themselves.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import FrameType
from typing import Any

from attune.stop import end_with_parent, handling

ADDRESS = "ATTUNE_PRELOADED"  # environment variable: the server's socket
MODULES = (
    "attune.finetune",
    "attune.backbones.sd",
    "attune.data.ingest.write",
    "attune.diffusion.generate",
    "attune.evaluation.scoring",
    "attune.spm.objective",
    "attune.stages.history",
    "attune.stages.run_json",
    "attune.evaluation.report.page",
    "attune.evaluation.summarise",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers.scheduling_ddim",
    "mlflow.tracking",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
)
"""What stages import, with all that these import in turn."""


FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Stage:
    """A fork, and the connection of the process that has asked for it."""

    process: ForkProcess
    connection: socket.socket


# ------------------------------------------------------------ the stage's side


def hand_over() -> None:
    """Lets a fork of the server be this stage, and ends as it ends; returns if there is no server to ask."""
    address = os.environ.get(ADDRESS)
    if not address or "RANK" in os.environ:
        return
    spec = sys.modules["__main__"].__spec__
    if spec is None:  # not started with -m
        return
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:  # it has ended
        return
    environment = {name: value for name, value in os.environ.items() if name != ADDRESS}
    asked = json.dumps([spec.name, sys.argv[1:], str(Path.cwd()), environment])
    with connection, connection.makefile("r") as answers:
        socket.send_fds(connection, [b"."], [0, 1, 2])
        connection.sendall(asked.encode() + b"\n")
        child = int(answers.readline() or 0)

        def pass_on(signum: int, frame: FrameType | None) -> None:
            with suppress(ProcessLookupError):
                os.kill(child, signum)

        with handling(pass_on):
            status = answers.readline()
    if not status:
        sys.exit(f"{spec.name}: the process that had imported the libraries is gone; start again")
    code = int(status)
    if code < 0:  # a signal has ended it
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


# ------------------------------------------------------------ the server's side


@contextmanager
def serving(environment: Mapping[str, str], errors: Path) -> Iterator[dict[str, str]]:
    """Runs a server during the with-body; gives the variables by which stages find it.

    Args:
        environment: of the server.
        errors: file for what it writes.
    """
    if sys.platform != "linux":
        yield {}
        return
    folder = Path(tempfile.mkdtemp(prefix="attune-"))  # for this user alone
    address = str(folder / "socket")
    command = [sys.executable, "-m", "attune.stages.preloaded", address]
    # a session of its own: Ctrl-C of a terminal reaches the stages, which pass it on; twice would mean at once
    options: dict[str, Any] = {"start_new_session": True, "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with errors.open("w") as file:
        server = subprocess.Popen(command, env=dict(environment), stderr=file, **options)
    try:
        yield {ADDRESS: address}
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def serve(address: str) -> None:
    """Forks a stage for whoever asks, until it is told to end."""
    end_with_parent()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    for name in MODULES:
        importlib.import_module(name)
    selector = selectors.DefaultSelector()
    selector.register(listening, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listening:
                begin(listening.accept()[0], selector)
            elif key.fileobj == key.data.process.sentinel:
                end(key.data, selector)
            elif key.fileobj in selector.get_map():  # who has asked is gone, so the stage must not go on
                selector.unregister(key.fileobj)
                key.data.process.kill()


def begin(connection: socket.socket, selector: selectors.BaseSelector) -> None:
    """Forks the stage that is asked for, says which process it is, and looks out for its end and for the asker's."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("r") as lines:
        module, words, folder, environment = json.loads(lines.readline())
    process = FORK.Process(target=become, args=(module, words, folder, environment, streams))
    process.start()
    for stream in streams:
        os.close(stream)
    stage = Stage(process, connection)
    selector.register(connection, selectors.EVENT_READ, stage)
    selector.register(process.sentinel, selectors.EVENT_READ, stage)
    with suppress(OSError):
        connection.sendall(f"{process.pid}\n".encode())


def end(stage: Stage, selector: selectors.BaseSelector) -> None:
    """Says how a stage has ended, to whoever has asked for it."""
    stage.process.join()
    selector.unregister(stage.process.sentinel)
    with suppress(KeyError):
        selector.unregister(stage.connection)
    with stage.connection, suppress(OSError):
        stage.connection.sendall(f"{stage.process.exitcode}\n".encode())


def become(module: str, words: list[str], folder: str, environment: Mapping[str, str], streams: Sequence[int]) -> None:
    """Is a stage, as a process that has just been started would be: with its folder, environment, words and streams."""
    end_with_parent()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *words]
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, errors="backslashreplace", closefd=False) for n in (1, 2))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(sys.argv[1])
