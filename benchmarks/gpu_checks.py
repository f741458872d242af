"""Whether a GPU computes what a CPU computes: contract tests, the profile `short`, losses and gradients."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attune.build import build_method, load_policy
from attune.config import plugins
from attune.config.edit import write_yaml
from attune.config.plan import Plugin
from attune.config.resolve import PARAMS, PROFILES, method_of, read_yaml
from attune.config.schema import set_path
from attune.config.settings import Model
from attune.data.batches import GroupBatch, PairBatch, PromptBatch
from attune.diffusion.noise import Draws
from attune.distributed import Shard
from attune.interfaces import Conditioning, Method
from attune.spm.model import from_clip, save

ROOT = Path(__file__).resolve().parents[1]
BASE, CLIP = "models/embedded/base", "models/embedded/pickscore"
SMALLER = {  # of the profile `short`, for the test of this file
    "data.train_prompts": 6,
    "data.validation_prompts": 2,
    "data.test_prompts": 3,
    "data.pair_prompts": 4,
    "generate.prompts": 2,
    "methods.sft.batches": 1,
}
RUNS = ("kto", "mapo", "alignprop", "draft", "refl")  # beside those of params.yaml; the data are ready for them


@dataclasses.dataclass(frozen=True)
class Check:
    """What came of a check: in words, with its seconds."""

    name: str
    passed: bool
    says: str
    seconds: float


# ---------------------------------------------------------------- processes of their own


def environment(device: str) -> dict[str, str]:
    """This process's, with the device said and nothing tracked."""
    more = {"ATTUNE_DEVICE": device, "ATTUNE_TRACKING": "off", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **more, "PYTHONPATH": path}


def in_a_process(name: str, command: list[str], device: str, timeout_s: float, where: Path = ROOT) -> Check:
    """Runs a command; a failure says the end of what it wrote."""
    began = time.monotonic()
    options: dict[str, Any] = {"cwd": where, "env": environment(device), "stdout": subprocess.PIPE, "text": True}
    try:
        done = subprocess.run(command, **options, stderr=subprocess.STDOUT, timeout=timeout_s, check=False)
        passed, text = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        passed, text = False, f"{text}\nnot done after {timeout_s:.0f} s"
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return Check(name, passed, " ".join(lines[-1 if passed else -6 :])[:1500], time.monotonic() - began)


def contract_tests(device: str, timeout_s: float, only: str = "") -> Check:
    """The contract tests of all plug-ins, and those of memory and quantised weights, with models on the device."""
    words = ["-k", only] if only else ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    tests = ["tests/contract", "tests/unit/test_memory.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *words]
    return in_a_process("contract tests", command, device, timeout_s)


def short_profile(device: str, timeout_s: float, small: bool) -> Check:
    """The profile `short` from its data to the report, in a folder of its own and in one process."""
    with tempfile.TemporaryDirectory(prefix="gpu-short-") as folder:
        write_project(Path(folder), small)
        command = [sys.executable, str(Path(__file__).resolve()), folder]
        return in_a_process("profile short, end to end", command, device, timeout_s, Path(folder))


def write_project(folder: Path, small: bool) -> None:
    """The parameters of the profile, with more runs than it has (of a small one with two)."""
    given, profile = read_yaml(ROOT / PARAMS), read_yaml(ROOT / PROFILES / "short.yaml")
    runs = given["runs"] | {name: {"method": name, "after": "data"} for name in RUNS}
    if small:
        runs = {name: runs[name] for name in ("base", "sft")}
        for key, value in SMALLER.items():
            profile = set_path(profile, key, value)
        profile["search"] = {}
    (folder / PROFILES).mkdir()
    write_yaml(given | {"profile": "short", "runs": runs}, folder / PARAMS)
    write_yaml(profile, folder / PROFILES / "short.yaml")
    (folder / "models").mkdir()
    (folder / "models/embedded").symlink_to(ROOT / "models/embedded")


def run_stages() -> None:
    """Runs all stages in the working directory, and says what each took."""
    import importlib

    runs, taken = list(read_yaml(Path(PARAMS))["runs"]), []
    of_runs = [(stage, ["--run", run]) for stage in ("align", "generate", "evaluate") for run in runs]
    for stage, words in [("plan", []), ("prepare", []), ("train_preference", []), *of_runs, ("report", [])]:
        sys.argv, began = [stage, *words], time.monotonic()
        importlib.import_module(f"attune.stages.{stage}").main()
        taken.append(f"{'@'.join([stage, *words[1:]])} {time.monotonic() - began:.1f}")
    sys.stdout.write("seconds: " + ", ".join(taken) + "\n")


# ---------------------------------------------------------------- the same numbers


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, a GPU's convolutions are in full float32, which is not torch's default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def on(device: str) -> Iterator[None]:
    """Inside, models are loaded to the device."""
    before = os.environ.get("ATTUNE_DEVICE")
    os.environ["ATTUNE_DEVICE"] = device
    try:
        yield
    finally:
        os.environ.pop("ATTUNE_DEVICE")
        if before is not None:
            os.environ["ATTUNE_DEVICE"] = before


def moved(value: Any, device: torch.device) -> Any:
    """A minibatch with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: moved(each, device) for name, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: moved(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def method_on(name: str, device: str, preference: Path, scorers: Mapping[str, Plugin]) -> Method:
    """A method on the embedded base with an adapter that has moved a little, from its block of `short`."""
    blocks = read_yaml(ROOT / PROFILES / "short.yaml")["methods"]
    block = next((block for run, block in blocks.items() if method_of(run, {}) == name), {"lora": {"rank": 8}})
    with on(device):
        policy = load_policy(Model(backbone="sd", path=str(ROOT / BASE)))
        policy.add_adapter(8, 0, "all")
        generator = torch.Generator().manual_seed(1)
        for weight in policy.parameters():
            weight.data += (0.02 * torch.randn(weight.shape, generator=generator)).to(weight.device)
        return build_method(Plugin(kind="methods", name=name, settings=block), policy, preference, scorers)


def batch_for(method: Method, n: int = 4) -> Any:
    """Random pairs, images or prompts, on the method's device, the same on every device."""
    policy, words = method.policy, [f"{n} red circles"] * n
    generator, device = torch.Generator().manual_seed(2), policy.device
    latents = (torch.randn((n, *policy.backbone.latent_shape), generator=generator).to(device) for _ in range(2))
    cond: Conditioning = policy.backbone.encode_prompts(words)
    pairs = PairBatch(words, cond, *latents, torch.ones(n, device=device), torch.ones(n, device=device))
    kinds: dict[str, Any] = {"pairs": pairs, "images": pairs.images, "liked images": pairs.liked_images}
    if method.consumes == "groups":
        scores = {"pickscore": torch.arange(2.0 * n, device=device)}
        images = torch.stack([pairs.latents_0, pairs.latents_1], 1).flatten(0, 1)
        return GroupBatch(words, cond, images, [2] * n, scores)
    return kinds.get(method.consumes, PromptBatch(words, cond))


def first_minibatch(method: Method) -> Any:
    return next(iter(method.minibatches(batch_for(method), Draws.of_batch(0, 0, 4, Shard())))).rows


def loss_and_gradient(method: Method, minibatch: Any) -> tuple[Tensor, Tensor]:
    """Both on the CPU, in float64."""
    loss, _ = method.loss(minibatch)
    gradients = torch.autograd.grad(loss, method.policy.parameters())
    return loss.detach().cpu().double(), torch.cat([g.flatten().cpu().double() for g in gradients])


def parity(device: str) -> Iterator[tuple[str, float, float]]:
    """Of each method the relative differences of loss and gradient, device against CPU, on the CPU's minibatch."""
    scorers = {"pickscore": Plugin(kind="rewards", name="pickscore", settings={"path": str(ROOT / CLIP)})}
    with tempfile.TemporaryDirectory(prefix="gpu-parity-") as folder, without_tf32():
        save(*from_clip(str(ROOT / CLIP)), folder)
        for name in plugins.available("methods"):
            here, there = (method_on(name, where, Path(folder), scorers) for where in ("cpu", device))
            minibatch = first_minibatch(here)
            first_minibatch(there)  # that this runs there too
            ours = loss_and_gradient(here, minibatch)
            theirs = loss_and_gradient(there, moved(minibatch, there.policy.device))
            loss, gradient = (float((a - b).norm() / a.norm()) for a, b in zip(ours, theirs, strict=True))
            yield name, loss, gradient


def escaped(text: str) -> str:
    """For a cell of a Markdown table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    run_stages()
