"""Folders of images to label, and the labelling page served for tests: in a thread, or by a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import uvicorn
from PIL import Image

from attune.labelling import store
from attune.labelling.app import create_app
from attune.labelling.asking import Session
from attune.labelling.pairs import Side, find_pairs
from attune.labelling.server import listen

SRC = Path(__file__).parents[1] / "src"
RED, BLUE = (200, 10, 10), (10, 10, 200)  # of side a and of side b: tests look at what they are shown


def write_run(folder: Path, colour: tuple[int, int, int], prompts: list[str], images: int = 1) -> Side:
    """A run's folder of images in a colour, each a little different from the others."""
    folder.mkdir(parents=True)
    rows = [(prompt, k, f"{i:03d}_{k}.png") for i, prompt in enumerate(prompts) for k in range(images)]
    for i, (_, _, file) in enumerate(rows):
        Image.fromarray(np.full((8, 8, 3), colour, np.uint8) + np.uint8(i % 50)).save(folder / file)
    pd.DataFrame(rows, columns=["prompt", "ordinal", "file"]).to_parquet(folder / "index.parquet")
    return Side(folder.name, folder, is_run=True)


def session(folder: Path, prompts: list[str], **changes: Any) -> Session:
    """A session between a red run and a blue one."""
    sides = [write_run(folder / "red", RED, prompts), write_run(folder / "blue", BLUE, prompts)]
    database = folder / "red-vs-blue.db"
    values = {"seed": 0, "repeats": 0.0, "annotator": "", "export_command": "export", "names": ("red", "blue")}
    pairs, secret = find_pairs(sides).pairs, store.create(database, ["red", "blue"])
    return Session(**{**values, "pairs": pairs, "database": database, "secret": secret, **changes})


class Page:
    """The page's requests, as a browser sends them unless told otherwise."""

    def __init__(self, port: int):
        self.port = port

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content; a body makes it a POST of JSON. `_` in a header's name stands for a dash."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {"Host": f"127.0.0.1:{self.port}"}
        if body is not None:
            given |= {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        text = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, text, {k: v for k, v in given.items() if v})
        answer = connection.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return found

    def state(self, annotator: str) -> dict[str, Any]:
        return json.loads(self.ask(f"/state?annotator={annotator}")[2])

    def answer(self, annotator: str, choice: str) -> dict[str, Any]:
        """Answers what is asked now."""
        body = {"annotator": annotator, "question": self.state(annotator)["question"]["id"], "choice": choice}
        status, _, content = self.ask("/answer", body)
        assert status == 200, content
        return json.loads(content)

    def undo(self, annotator: str) -> dict[str, Any]:
        question = self.state(annotator)["question"]
        return json.loads(self.ask("/undo", {"annotator": annotator, "question": question and question["id"]})[2])

    def image(self, annotator: str, question: str, side: str) -> bytes:
        return self.ask(f"/image/{question}/{side}?annotator={annotator}")[2]


@contextmanager
def served(asked: Session, when_done: Any = lambda: None) -> Iterator[Page]:
    """The page, in a thread of this process."""
    listener = listen(0)
    port = listener.getsockname()[1]
    config = uvicorn.Config(create_app(asked, port, when_done), log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Page(port)
    finally:
        server.should_exit = True
        thread.join()


class Program:
    """`python -m attune.stages.label` in the working directory, once it serves."""

    def __init__(self, *words: str):
        command = [sys.executable, "-m", "attune.stages.label", *words]
        environment = {**os.environ, "PYTHONPATH": str(SRC)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        line = next((line for line in self.process.stdout if "http://" in line), None)
        assert line is not None, f"label ended with {self.process.wait()}"
        self.url = line.split()[2]
        self.page = Page(int(self.url.rpartition(":")[2]))

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Its exit status after a signal."""
        self.process.send_signal(how)
        self.process.stdout.close()
        return self.process.wait(timeout=60)


@contextmanager
def program(*words: str) -> Iterator[Program]:
    """The program, killed at the end if it still runs."""
    started = Program("--port", "0", *words)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.wait()
