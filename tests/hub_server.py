"""A small server on this machine that takes uploads as the Hugging Face Hub does, and keeps what arrived."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """What the server was asked and given."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}  # of git-lfs, by SHA-256
        self.files: dict[str, bytes] = {}  # of the one commit
        self.messages: list[str] = []
        self.is_private = True  # the repository, whatever was asked for
        self.refuse: int | None = None  # the status of every answer

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        repo = re.fullmatch(r"/api/models/([^/]+/[^/]+)", self.path)
        there = repo is not None and bool(self.server.created) and self.server.refuse is None
        known = {"id": repo[1], "private": self.server.is_private} if repo is not None and there else {}
        self._answer(known, 200 if there else self.server.refuse or 404)

    def do_PUT(self) -> None:
        body = self._body()
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self._answer({})

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        body = self._body()
        if self.server.refuse is not None:
            self._answer({"error": "no"}, self.server.refuse)
        elif self.path == "/api/repos/create":
            made = json.loads(body)
            self.server.created.append(made)
            self._answer({"url": f"{self.server.address}/{made['organization']}/{made['name']}"})
        elif self.path.endswith("/preupload/main"):
            wanted = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular" if f["path"].endswith(("md", "json")) else "lfs"}
                for f in wanted
            ]
            self._answer({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                known | {"actions": {"upload": {"href": f"{self.server.address}/lfs/{known['oid']}"}}}
                for known in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif self.path.endswith("/commit/main"):
            self._commit(body)
        else:  # validate-yaml
            self._answer({"errors": [], "warnings": []})

    def _commit(self, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.server.messages.append(value["summary"])
            elif entry["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]
        repo = re.fullmatch(r"/api/models/(.+)/commit/main", self.path)
        assert repo is not None
        commit = "c" * 40
        self._answer({"commitUrl": f"{self.server.address}/{repo[1]}/commit/{commit}", "commitOid": commit})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, values: Any, status: int = 200) -> None:
        text = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def hub() -> Iterator[Hub]:
    """A server that runs in a thread of its own."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
