"""A small server on this machine that scores images, as the scorer `http` asks for it, or fails as it is told."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Answer = tuple[int, Any]
"""A status, and what is sent as JSON, or as it is if it is bytes."""


def redness(request: dict[str, Any]) -> Answer:
    """Mean of the red channel in [0, 1], and a thousandth for each letter of the prompt."""
    images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in request["images"]]
    assert all((image.format, image.mode) == ("PNG", "RGB") for image in images)
    reds = [float(np.asarray(image)[..., 0].mean() / 255) for image in images]
    return 200, {"scores": [red + len(p) / 1000 for red, p in zip(reds, request["prompts"], strict=True)]}


class Scores(ThreadingHTTPServer):
    """What the server was asked, and what it answers next: the answers in `says`, then scores."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.said_at: list[float] = []  # when each request came, seconds
        self.says: list[Answer | Callable[[dict[str, Any]], Answer]] = []
        self.location: str | None = None  # where it redirects to

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


class _Handler(BaseHTTPRequestHandler):
    server: Scores

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(405)
        self.end_headers()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.headers.append(dict(self.headers))
        self.server.said_at.append(time.monotonic())
        says = self.server.says.pop(0) if self.server.says else redness
        status, content = says(request) if callable(says) else says
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def started() -> Scores:
    """A server that answers until the process ends."""
    server = Scores()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@contextmanager
def serving() -> Iterator[Scores]:
    """A server that answers while the with-body lasts; then nothing listens at its address."""
    server = started()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
