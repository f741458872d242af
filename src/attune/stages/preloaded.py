"""Stages whose libraries are imported already: for a run of many short stages on one machine.

To import torch, diffusers, transformers, peft and MLflow takes about five seconds in every stage. `serving` starts a
process that does so once. A stage that finds its address in the environment asks it for a copy of itself (`hand_over`):
a fork, which is given the stage's words, environment and standard streams and is the stage from there on. The process
that has asked passes signals on to it, and ends as it does. Nothing is computed before the fork, so numbers stay as
they are. Linux only; elsewhere, and where no server answers (it may have failed to import something), stages import for
themselves.
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
from typing import Any, TextIO

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
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("r") as answers:
        child = ask(connection, answers, address, spec.name)
        if not child:
            return

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


def ask(connection: socket.socket, answers: TextIO, address: str, module: str) -> int:
    """The process that is this stage from now on; 0 if there is no server, or it ends or has no memory for a fork."""
    environment = {name: value for name, value in os.environ.items() if name != ADDRESS}
    asked = json.dumps([module, sys.argv[1:], str(Path.cwd()), environment])
    try:
        connection.connect(address)
        socket.send_fds(connection, [b"."], [0, 1, 2])
        connection.sendall(asked.encode() + b"\n")
        return int(answers.readline() or 0)
    except OSError:
        return 0


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
    command = [sys.executable, "-m", "attune.stages.preloaded", address, str(os.getpid())]
    # a session of its own: Ctrl-C of a terminal reaches the stages, which pass it on; twice would mean at once
    options: dict[str, Any] = {"start_new_session": True, "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with errors.open("w") as file:
        server = subprocess.Popen(command, env=dict(environment), stderr=file, **options)
    try:
        yield {ADDRESS: address}
    finally:
        server.terminate()
        server.wait()  # for the stages, too, where the with-body has failed
        shutil.rmtree(folder, ignore_errors=True)


def serve(address: str, parent: int) -> None:
    """Forks a stage for whoever asks, until it is told to end (SIGTERM) and the stages that run have ended.

    If the process `parent` that has started it is gone already, which the system would not tell, it ends at once.

    So these are not interrupted a second time, which would be at once, by the end of `attune repro` or by a scheduler
    that sends SIGTERM to every process of a job.
    """
    signals: list[int] = []
    selector = selectors.DefaultSelector()

    def end_when_idle(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)
        if is_idle(selector):
            sys.exit()

    signal.signal(signal.SIGTERM, end_when_idle)
    end_with_parent()
    if os.getppid() != parent:
        return
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    selector.register(listening, selectors.EVENT_READ)
    for name in MODULES:
        importlib.import_module(name)
    while not (signals and is_idle(selector)):
        for key, _ in selector.select():
            if key.fileobj is listening:
                start_stage(listening.accept()[0], selector)
            elif key.fileobj == key.data.process.sentinel:
                end_stage(key.data, selector)
            elif key in selector.get_map().values():  # who has asked is gone, so the stage must not go on
                selector.unregister(key.fileobj)
                key.data.process.kill()


def is_idle(selector: selectors.BaseSelector) -> bool:
    """Whether no stage runs: the selector has only the socket at which others ask."""
    return len(selector.get_map()) <= 1


def start_stage(connection: socket.socket, selector: selectors.BaseSelector) -> None:
    """Forks the stage that is asked for, says which process it is, and looks out for its end and for the asker's.

    Without an answer the asker goes on by itself: where memory is lacking, or where the question is not whole because
    the asker was killed meanwhile.
    """
    streams: list[int] = []
    try:
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile("r") as lines:
            module, words, folder, environment = json.loads(lines.readline())
        process = FORK.Process(target=become, args=(module, words, folder, environment, streams, selector))
        process.start()
    except (OSError, ValueError) as error:
        sys.stderr.write(f"no stage was begun: {error}\n")
        connection.close()
        return
    finally:
        for stream in streams:
            os.close(stream)
    stage = Stage(process, connection)
    selector.register(connection, selectors.EVENT_READ, stage)
    selector.register(process.sentinel, selectors.EVENT_READ, stage)
    with suppress(OSError):
        connection.sendall(f"{process.pid}\n".encode())


def end_stage(stage: Stage, selector: selectors.BaseSelector) -> None:
    """Says how a stage has ended, to whoever has asked for it."""
    stage.process.join()
    selector.unregister(stage.process.sentinel)
    with suppress(KeyError):
        selector.unregister(stage.connection)
    with stage.connection, suppress(OSError):
        stage.connection.sendall(f"{stage.process.exitcode}\n".encode())


def become(
    module: str,
    words: list[str],
    folder: str,
    environment: Mapping[str, str],
    streams: Sequence[int],
    selector: selectors.BaseSelector,
) -> None:
    """Is a stage, as a process that has just been started would be: with its folder, environment, words and streams.

    It closes what the server has open for others. The connection of its own asker stays open, so this one waits for
    its end even if the server is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    for key in list(selector.get_map().values()):
        os.close(key.fileobj if isinstance(key.fileobj, int) else key.fileobj.detach())  # type: ignore[attr-defined]
    selector.close()
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
    try:
        serve(sys.argv[1], int(sys.argv[2]))
    finally:  # `serving` does so itself, unless it was killed
        shutil.rmtree(Path(sys.argv[1]).parent, ignore_errors=True)
