"""Do labels of the page train a model? A noisy annotator answers by HTTP, and DPO learns from what was exported.

The annotator chooses by the oracle's scores of what the page shows, with Bradley and Terry's noise of a temperature at
which the wanted share of choices agrees with the oracle's order. Pairs are two images each of training prompts by the
embedded base; DPO has the settings of the profile. Prints how the oracle scores it against the base, and writes JSON.

    PYTHONPATH=src python benchmarks/labels.py --pairs 300 --agreement 0.8 --out /tmp/labels.json
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
from copies import copy_repository
from PIL import Image

from attune.config.resolve import load
from attune.data.sources.world import draw_prompts
from attune.world import oracle

RUNS = {"base": {"after": "data"}, "dpo": {"method": "dpo", "after": "data"}}
IMAGES, LABELS = "data/pictures", "data/labelled/labels"
TABLE = {"source": "table", "path": f"{LABELS}/pairs.csv", "test_list": "data/labelled/test.txt", "min_side": 32}


def paint(folder: Path, prompts: list[str], seed: int) -> np.ndarray:
    """Two images by the base of each prompt, uint8 (2n, H, W, 3), also as a folder that the page reads."""
    import pandas as pd

    from attune.build import load_policy
    from attune.diffusion.generate import generate_images

    settings, rows = load(), [(prompt, ordinal) for prompt in prompts for ordinal in range(2)]
    repeated, ordinals = (list(column) for column in zip(*rows, strict=True))
    images = generate_images(load_policy(settings.model), repeated, ordinals, settings.sampling, seed, "paint")
    folder.mkdir(parents=True)
    index = pd.DataFrame(rows, columns=["prompt", "ordinal"])
    index["file"] = [f"{row:05d}.png" for row in range(len(index))]
    for file, image in zip(index.file, images, strict=True):
        Image.fromarray(image).save(folder / file)
    index.to_parquet(folder / "index.parquet", index=False)
    return images


def temperature_for(differences: np.ndarray, agreement: float) -> float:
    """The temperature at which choices between scores that differ so agree with their order in that share of pairs."""
    low, high = 1e-4, 1e2
    for _ in range(60):
        middle = (low * high) ** 0.5
        expected = (1 / (1 + np.exp(-np.abs(differences) / middle))).mean()
        low, high = (middle, high) if expected > agreement else (low, middle)
    return low


def ask(port: int, path: str, body: Any = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
    text = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, text, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.status} {content[:200]!r}")
    return content


def annotate(port: int, temperature: float, rng: np.random.Generator) -> tuple[int, int]:
    """Answers all questions; returns how many there were, and how often the choice was the oracle's."""
    state, right = json.loads(ask(port, "/state?annotator=oracle")), 0
    while (question := state["question"]) is not None:
        urls = (f"/image/{question['id']}/{side}?annotator=oracle" for side in ("left", "right"))
        shown = np.stack([np.asarray(Image.open(io.BytesIO(ask(port, url)))) for url in urls])
        left, other = oracle.scores(shown.astype(np.float32) / 255, [question["prompt"]] * 2)
        chose_left = rng.random() < 1 / (1 + np.exp(-(left - other) / temperature))
        right += chose_left == (left > other)
        body = {"annotator": "oracle", "question": question["id"], "choice": "left" if chose_left else "right"}
        state = json.loads(ask(port, "/answer", body))
    return state["answered"], right


def label(temperature: float, seed: int) -> dict[str, Any]:
    """Serves the page, answers everything, and exports."""
    words = [sys.executable, "-m", "attune.stages.label", "--a", IMAGES]
    with subprocess.Popen([*words, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        try:
            line = next(line for line in server.stdout if "http://" in line)
            port = int(line.split()[2].rpartition(":")[2])
            answers, right = annotate(port, temperature, np.random.default_rng(seed))
        finally:
            server.terminate()
    said = subprocess.run([*words, "--export", LABELS], check=True, capture_output=True, text=True).stdout
    return {"answers": answers, "agreement_with_the_oracle": right / answers, "export": said.splitlines()}


def train(home: Path) -> dict[str, Any]:
    """DPO on the export, and how the report compares it with the base by the oracle."""
    stages = [("plan", None), ("prepare", None), ("train_preference", None)]
    stages += [(stage, run) for run in RUNS for stage in ("align", "generate", "evaluate")] + [("report", None)]
    with (home / "log").open("w") as log:
        for stage, run in stages:
            words = [sys.executable, "-m", f"attune.stages.{stage}", *(["--run", run] if run else [])]
            subprocess.run(words, stdout=log, stderr=log, check=True)
    summary = json.loads((home / "reports/tiny/summary.json").read_text())
    return summary["methods"]["dpo"]["vs_base"]["oracle"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--agreement", type=float, default=0.8, help="share of choices that are the oracle's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    began, home = time.monotonic(), Path(tempfile.mkdtemp(prefix="labels-"))
    unused = {"search": {}, "preference.ai_feedback": None}  # they ask for more data than there is
    copy_repository(home, {"data": TABLE, "seed": words.seed, **unused}, {"runs": RUNS})
    os.environ |= {"PYTHONPATH": str(home / "src"), "ATTUNE_TRACKING": "off"}
    rng = np.random.default_rng(words.seed)
    with chdir(home):
        tests = draw_prompts("test", 240, rng).prompt
        Path(LABELS).parent.mkdir()
        Path(TABLE["test_list"]).write_text("\n".join(tests) + "\n")
        prompts = draw_prompts("train", words.pairs, rng).prompt.tolist()
        images = paint(Path(IMAGES), prompts, words.seed)
        scores = oracle.scores(images.astype(np.float32) / 255, [p for p in prompts for _ in range(2)]).reshape(-1, 2)
        temperature = temperature_for(scores[:, 0] - scores[:, 1], words.agreement)
        found = {"temperature": temperature, **label(temperature, words.seed), "dpo_vs_base_by_the_oracle": train(home)}
    found["seconds"] = round(time.monotonic() - began)
    text = json.dumps(found, indent=2)
    sys.stdout.write(text + "\n")
    if words.out is not None:
        words.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
