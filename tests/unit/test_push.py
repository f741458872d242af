"""Uploads of a package, to a server on this machine that answers as the Hub does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import stages
from hub_server import hub

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "Secret" * 6
CARD = "---\nlicense: apache-2.0\nlibrary_name: diffusers\n---\n# dpo\n"


@pytest.fixture
def server():
    with hub() as running:
        yield running


@pytest.fixture
def project(tmp_path):
    """Parameters and a package: a few small files of each kind."""
    stages.write(tmp_path, {"base": {"after": "data"}, "dpo": {"method": "dpo", "after": "data"}})
    package = tmp_path / "packages/short/dpo"
    (package / "diffusers").mkdir(parents=True)
    contents = {"README.md": CARD.encode(), "run.json": b"{}", "samples.png": bytes(range(256)) * 9}
    weights = {"dpo.safetensors": b"kohya" * 1000, "diffusers/pytorch_lora_weights.safetensors": b"peft" * 1000}
    for name, content in {**contents, **weights}.items():
        (package / name).write_bytes(content)
    return tmp_path


def push(project, *words, **env):
    """The command in a process of its own: huggingface_hub reads its environment when it is imported."""
    known = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    known |= {"PYTHONPATH": str(ROOT / "src"), "HF_TOKEN": TOKEN, "HF_HOME": str(project / "hf"), "HF_HUB_OFFLINE": "0"}
    known |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **env}  # the server takes git-lfs alone
    command = [sys.executable, "-m", "attune.stages.push", *words]
    done = subprocess.run(command, cwd=project, env=known, capture_output=True, text=True, timeout=300)
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_what_arrives_is_the_package_in_one_commit(project, server):
    done = push(project, "--run", "dpo", "--repo", "me/dpo", "--private", HF_ENDPOINT=server.address)
    assert done.returncode == 0, done.stderr
    package = project / "packages/short/dpo"
    here = {str(f.relative_to(package)): f.read_bytes() for f in package.rglob("*") if f.is_file()}
    assert server.files == here
    assert server.messages == ["dpo of profile short, by attune"]
    assert [(made["organization"], made["name"], made["visibility"]) for made in server.created] == [
        ("me", "dpo", "private")
    ]
    assert f"{server.address}/me/dpo/commit/" in done.stdout


def test_what_is_to_be_private_is_not_put_where_all_can_see_it(project, server):
    server.is_private = False
    done = push(project, "--run", "dpo", "--repo", "me/dpo", "--private", HF_ENDPOINT=server.address)
    assert done.returncode == 1
    assert "me/dpo is there and public" in done.stderr
    assert not server.files


def test_a_dry_run_asks_nobody(project, server):
    done = push(project, "--run", "dpo", "--repo", "me/dpo", "--dry-run", HF_ENDPOINT=server.address)
    assert done.returncode == 0, done.stderr
    assert "dpo.safetensors  5,000 bytes" in done.stdout
    assert "would go to me/dpo; nothing was sent" in done.stdout
    assert not server.asked


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "`hf auth login`, or set HF_TOKEN"), (403, "may not write to me/dpo (403)"), (404, "look at --repo me/dpo")],
)
def test_a_refusal_is_one_line_with_the_remedy(project, server, status, says):
    server.refuse = status
    done = push(project, "--run", "dpo", "--repo", "me/dpo", HF_ENDPOINT=server.address)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not server.files


@pytest.mark.parametrize(
    ("words", "env", "says"),
    [
        (["--repo", "me/dpo"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "me/dpo was not uploaded: "),
        (["--repo", "me/dpo"], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (["--repo", "dpo"], {}, "--repo 'dpo': write owner/name"),
        (["--repo", "me/dpo", "--package", "models"], {}, "models is no package: `make package"),
    ],
)
def test_what_stops_an_upload_is_one_line(project, words, env, says):
    done = push(project, "--run", "dpo", *words, **env)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_it_goes_nowhere_without_a_repository(project):
    done = push(project, "--run", "dpo")
    assert done.returncode == 2
    assert "--repo" in done.stderr
