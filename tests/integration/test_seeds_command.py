"""`attune seeds` as a user calls it: stopped, gone on with, and called again; real DVC, training and scores."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import stages
from attune.evaluation.seeds import SeedRun, across_seeds

pytestmark = [pytest.mark.integration, pytest.mark.pipeline]

RUNS = {"base": {"after": "data"}, "sft": {"method": "sft", "after": "data"}}
CODE = ("src", "sweeps", "dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/plots")
COPY, REPORTS = Path(".checkpoints/seeds/short/seed1"), Path("reports/short")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A checkout with a setting that only this machine has."""
    folder = stages.write(tmp_path_factory.mktemp("checkout"), RUNS, methods__sft__batches=1)
    for name in CODE:
        source, target = stages.ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    (folder / "params.local.yaml").write_text("short: {methods: {sft: {lr: 1.0e-3}}}\n")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


def start(checkout: Path, *words: str) -> subprocess.Popen[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(stages.PREFIXES)}
    env |= {"PYTHONPATH": "src", "DVC_SITE_CACHE_DIR": f"{checkout}.site", "ATTUNE_TRACKING": "off"}
    words = (sys.executable, "-m", "attune.stages.seeds", *words)
    return subprocess.Popen(
        words,
        cwd=checkout,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as in the background of a script
    )


def test_seeds_are_stopped_and_gone_on_with_and_not_run_again(checkout):
    first = start(checkout, "--n", "2", "--jobs", "2")
    end = time.monotonic() + 300
    log = (checkout / COPY).with_suffix(".log")
    while not (log.exists() and "Running stage 'align@base'" in log.read_text()):
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)
    beside = start(checkout, "--n", "2")
    said = beside.communicate(timeout=120)[0]
    assert beside.returncode == 1
    assert said.strip().endswith("another `make seeds` of profile short is running here: wait for it, or stop it first")
    children = psutil.Process(first.pid).children(recursive=True)
    assert len(children) >= 2
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=120)[0]
    assert first.returncode == 143, said
    assert "0 of 2 done. `make seeds N=2` goes on" in said
    assert "Traceback" not in said
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert not list((checkout / REPORTS).glob("seeds/*.json"))

    second = start(checkout, "--n", "2", "--jobs", "2")
    said = second.communicate(timeout=600)[0]
    assert second.returncode == 0, said
    assert "2 to run, 2 at a time" in said
    assert "Stage 'prepare' didn't change, skipping" in log.read_text(), (
        "what was done before the stop is not done again"
    )
    summaries = {k: SeedRun.read(checkout / REPORTS / f"seeds/seed{k}.json").summary for k in (0, 1)}
    assert [each.protocol.seed for each in summaries.values()] == [0, 1]
    assert across_seeds(summaries).runs["sft"]["oracle"].per_seed[0] != 0
    own = json.loads((checkout / REPORTS / "summary.json").read_text())
    assert summaries[0].to_json() == json.dumps(own, indent=2) + "\n"
    assert json.loads((checkout / COPY / "models/short/sft/run.json").read_text())["settings"]["lr"] == 1e-3
    assert "seeds/seed1.json" in (checkout / "plan/report.json").read_text(), "the report has it as an input"
    assert "2 seeds: 0, 1; oracle" in said

    third = start(checkout, "--n", "2")
    said = third.communicate(timeout=120)[0]
    assert third.returncode == 0
    assert "seed1.json is current" in said
    assert "to run" not in said
    assert "2 seeds: 0, 1; oracle" in said
