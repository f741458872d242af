"""Serves the page to browsers on this machine, and to nobody else."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from attune.labelling.app import create_app
from attune.labelling.asking import Session
from attune.labelling.pairs import LabelError

ADDRESS = "127.0.0.1"


def listen(port: int) -> socket.socket:
    """A socket on this machine's own address; port 0 for any free one.

    Raises:
        LabelError: the port is taken, or not allowed.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise LabelError(f"--port {port}: {getattr(error, 'strerror', None) or error}; choose another one") from None
    return listener


def serve(session: Session, listener: socket.socket, when_done: Callable[[], None]) -> None:
    """Serves until Ctrl-C or SIGTERM, which it passes on; requests that are being answered are finished."""
    app = create_app(session, listener.getsockname()[1], when_done)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5, lifespan="off"
    )
    uvicorn.Server(config).run(sockets=[listener])
