"""The champion in a real registry: who gets the alias, who does not, and that the registered model is the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

import params
from attune.build import load_policy
from attune.config.resolve import load
from attune.diffusion.generate import generate_images
from attune.diffusion.noise import noise_seed
from attune.evaluation.champion import NoCandidate, find_candidate
from attune.evaluation.protocol import Protocol, hash_prompts, write_scores
from attune.evaluation.summarise import summarise
from attune.tracking import reference, registry
from attune.tracking.promote import promote

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
NAME = "attune-tiny"
PROMPTS = [f"prompt {i:02d}" for i in range(40)]
PROTOCOL = Protocol(hash_prompts(PROMPTS), 40, 1, "ddim", 20, 0.0, 1.0, 32, "float32", 0, (("oracle", "x", "x"),), "x")
BASE = np.random.default_rng(0).normal(0, 0.1, 40)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Uri and root of a store; the working directory has the embedded models and two runs of random weights."""
    before, environment = Path.cwd(), dict(os.environ)
    for key in [key for key in os.environ if key.startswith(("DVC_", "MLFLOW_", "ATTUNE_"))]:
        del os.environ[key]
    root = tmp_path_factory.mktemp("champion")
    (root / "models").mkdir()
    (root / "models/embedded").symlink_to(ROOT / "models/embedded")
    params.write(root, *params.shipped())
    os.chdir(root)
    for seed, name in enumerate(("dpo", "spo")):
        policy = load_policy(load().model)
        policy.add_adapter(4, seed, "attention")
        for weight in policy.parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        policy.save(root / "models" / name)
        _note(name, "dpo")
    yield "sqlite:///mlflow.db", root
    os.chdir(before)
    os.environ.clear()
    os.environ.update(environment)


def _note(run: str, method: str | None) -> None:
    """What the stage align writes beside a run's model."""
    Path("models", run, "run.json").write_text(json.dumps({"method": method}))


def _report(gains: dict[str, float], protocol: Protocol = PROTOCOL) -> None:
    """Score tables and summary of runs that gain this much on every prompt, give or take 0.05."""
    noise = np.random.default_rng(1).normal(0, 0.05, 40)
    noise -= noise.mean()
    tables = {}
    for name, gain in {"base": None, **gains}.items():
        values = BASE if gain is None else BASE + gain + noise
        tables[name] = pd.DataFrame({"prompt": PROMPTS, "ordinal": 0, "file": "x.png", "oracle": values})
        write_scores(f"reports/scores/{name}.parquet", tables[name], protocol)
    Path("reports/summary.json").write_text(summarise(tables, protocol).to_json())


def _get_by_alias(place, alias: str) -> tuple[str, str] | None:
    found = registry.get_by_alias(NAME, alias, *place)
    return found and (found.number, found.tags["run"])


def _promote(place, **options: bool) -> str:
    settings = load()
    candidate = find_candidate(Path("reports"), Path("models"))
    return promote(NAME, candidate, (settings.model.path, None), place, seed=settings.seed, **options)


def test_a_champion_is_made_defended_and_replaced(place):
    """Nobody, dpo (the first), dpo again, spo as challenger, spo as champion; nobody is registered twice.

    Both share their noise, so spo's difference to dpo is the same on every prompt: first -0.001, then +0.3, with
    intervals of no width.
    """
    _report({"dpo": -0.1, "spo": 0.0})
    with pytest.raises(NoCandidate, match="no run of the report is better than base by oracle beyond doubt"):
        _promote(place)
    _report({"dpo": 0.2})
    assert _promote(place) == f"dpo, version 1 of {NAME}, is the champion: there was none"
    assert _promote(place) == f"dpo is champion already, version 1 of {NAME}"
    _report({"spo": 0.199})
    assert "is registered as challenger: it does not beat version 1 (dpo)" in _promote(place)
    assert (_get_by_alias(place, "champion"), _get_by_alias(place, "challenger")) == (("1", "dpo"), ("2", "spo"))
    assert "challenger already" in _promote(place)
    shutil.rmtree("models/spo")
    shutil.copytree("models/dpo", "models/spo")  # other weights, trained anew
    file = Path("models/spo/pytorch_lora_weights.safetensors")
    _shift(file)
    _report({"spo": 0.5})
    told = _promote(place)
    assert f"spo, version 3 of {NAME}, is the champion: it beats version 1 (dpo), oracle +0.3000" in told
    assert "n = 40 prompts" in told
    assert _get_by_alias(place, "champion") == ("3", "spo")


def _shift(file: Path) -> None:
    save_file({name: value + 0.01 for name, value in load_file(file).items()}, file, {"format": "pt"})


def test_the_champion_generates_what_the_adapter_generated(place):
    """diffusers, with base and adapter from the registry alone, against attune with the adapter's own file."""
    prompt, seed = "a red circle", 7
    settings = load()
    sampling = settings.generate.sampling
    policy = load_policy(settings.model)
    policy.load("models/spo")
    ours = generate_images(policy, [prompt], [0], sampling, seed, None)[0]
    bare = generate_images(load_policy(settings.model), [prompt], [0], sampling, seed, None)[0]
    pipe = registry.load(NAME, *place).load_pipeline(torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(noise_seed(prompt, 0, seed)))[None]
    options = {"num_inference_steps": sampling.steps, "guidance_scale": 1.0, "eta": 0.0}
    theirs = np.asarray(pipe(prompt, latents=noise, **options).images[0])
    assert np.abs(ours.astype(int) - theirs).max() <= 1  # of 255
    assert np.abs(ours.astype(int) - bare).max() > 10  # an adapter that did nothing would agree as well


def test_scores_of_another_protocol_are_no_match(place):
    other = Protocol.from_dict(PROTOCOL.to_dict() | {"steps": 50})
    _report({"dpo": 0.9}, other)
    before = _get_by_alias(place, "champion")
    with pytest.raises(ValueError, match=f"under protocol {PROTOCOL.sha}, the best run here under {other.sha}"):
        _promote(place)
    assert _get_by_alias(place, "champion") == before
    assert "dpo" in _promote(place, anew=True)
    assert _get_by_alias(place, "champion")[1] == "dpo"


def test_what_cannot_be_registered_is_named(place):
    _report({"full": 0.9})
    with pytest.raises(NoCandidate):  # no folder
        _promote(place)
    Path("models/full/unet").mkdir(parents=True)
    _note("full", None)
    with pytest.raises(NoCandidate):  # released by somebody
        _promote(place)
    _note("full", "dpo")
    with pytest.raises(ValueError, match="full is a whole denoiser; only adapters"):
        _promote(place)
    _report({"spo": 0.9}, Protocol.from_dict(PROTOCOL.to_dict() | {"seed": 1}))
    stale = Path("reports/summary.json").read_text()
    _report({"spo": 0.9})
    Path("reports/summary.json").write_text(stale)
    with pytest.raises(ValueError, match="of different protocols: `dvc repro` first"):
        _promote(place)


def test_a_large_champion_is_a_reference_to_the_checkouts_adapter(place, monkeypatch):
    """The version has no copy; loaded is the folder with these very weights, and no other."""
    monkeypatch.setattr(reference, "COPIED_BYTES", 1000)
    _shift(Path("models/spo/pytorch_lora_weights.safetensors"))
    _report({"spo": 1.5})
    assert "is the champion in the place of" in _promote(place, anew=True)
    found = registry.get_by_alias(NAME, "champion", *place)
    assert "spo is champion already" in _promote(place)
    assert found.tags["dvc.path"] == "models/spo"
    uri = f"sqlite:///{place[1]}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)  # whatever registry a test before has named
    assert {file.path for file in client.list_artifacts(found.run_id)} == {"adapter.reference.json", "spo.parquet"}
    assert "dvc checkout models/spo" in client.get_model_version(NAME, found.number).description
    pipe = registry.load(NAME, *place).load_pipeline(torch_dtype=torch.float32)
    ours = load_file("models/spo/pytorch_lora_weights.safetensors")
    theirs = {name: value for name, value in pipe.unet.state_dict().items() if "lora_" in name}
    assert len(theirs) == len(ours)
    assert sorted(x.sum().item() for x in theirs.values()) == sorted(x.sum().item() for x in ours.values())
    _shift(Path("models/spo/pytorch_lora_weights.safetensors"))
    with pytest.raises(LookupError, match=r"models/spo is not it \(md5 \w+\.dir\)\. .*: dvc checkout models/spo; "):
        registry.load(NAME, *place)


def test_a_registry_that_is_away_is_named_in_a_line(place, tmp_path):
    """Nothing listens on port 9 here."""
    with pytest.raises(registry.RegistryError, match=r"^MlflowException: .*127\.0\.0\.1"):
        registry.get_by_alias(NAME, registry.CHAMPION, "http://127.0.0.1:9", tmp_path)
