"""A package of a run's model for others to use, and the check that others' programs read it as we do.

A LoRA is written as diffusers writes it, and as ComfyUI reads it. Each file is loaded into diffusers' own pipeline,
which then generates; a picture that differs from our own by more than rounding is an error, and nothing is left of the
package.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attune.backbones._diffusers import InDiffusers, in_diffusers
from attune.config.settings import Model, Sampling
from attune.diffusion.ddim import sample
from attune.diffusion.lora import lora_ranks, unload_lora
from attune.diffusion.lora_files import ADAPTER_FILE, checked_ranks, model_identity
from attune.diffusion.noise import noise_seed, per_row_noise
from attune.diffusion.policy import Policy
from attune.evaluation.protocol import MODEL
from attune.evaluation.summary import Summary
from attune.licenses import base_license
from attune.sharing import comfyui, kohya
from attune.sharing.card import Evidence, card
from attune.sharing.models import NamedModel
from attune.sharing.pipeline import generated, pipeline_of, read_denoiser
from attune.sharing.sample import generate, image_rows, write_sheet
from attune.weights import read_header, read_tensors, save_tensors

if TYPE_CHECKING:
    from attune.interfaces import Backbone

STEPS = 4  # of the pictures that are compared: more steps only let rounding grow
LARGEST = 1e-3  # difference of pixels in [0, 1] between two programs that compute the same in float32
ROUNDING = 2e-5


class PackageError(RuntimeError):
    """A layout of the package is not read as the model that it is; the message says by how much."""


@dataclass(frozen=True)
class Trained:
    """A model that was trained here, and what is known of it."""

    folder: Path
    made: Mapping[str, Any]  # run.json
    data: Mapping[str, Any]  # `source` and its settings

    @property
    def is_lora(self) -> bool:
        return bool(self.made["settings"]["lora"])


@dataclass(frozen=True)
class Check:
    """How far diffusers, given a layout of the package, is from our own policy; largest differences of pixels."""

    layout: str
    difference: float
    effect: float  # of our policy from the base: a layout that were not read at all would differ by this

    def __str__(self) -> str:
        return (
            f"{self.layout}: largest pixel difference {self.difference:.1e} (the model's own effect {self.effect:.1e})"
        )


def read_trained(folder: Path, data: Mapping[str, Any]) -> Trained:
    """A model's folder as `align` left it."""
    return Trained(folder, json.loads((folder / "run.json").read_text(encoding="utf-8")), data)


def scores_of(model: Trained, reports: Path) -> tuple[Summary | None, str]:
    """The summary, if it is of this very model, else why there is none."""
    run, file = model.made["run"], reports / "summary.json"
    remedy = f"`dvc repro report` scores {run}, and packaging it again puts the scores here"
    if not file.is_file():
        return None, f"Not scored yet: there is no {file}. {remedy}."
    summary = Summary.from_json(file.read_text(encoding="utf-8"))
    if run not in summary.methods or run == summary.base:
        return None, f"Not scored yet: {file} does not hold {run}. {remedy}."
    if summary.made_with.get(run, {}).get(f"generate.{MODEL}") != model_identity(model.folder):
        return None, f"The scores in {file} are not known to be of this very model. {remedy}."
    return summary, ""


def write_package(
    folder: Path,
    model: Trained,
    evidence: Evidence,
    prompts: list[str],
    sampling: Sampling,
    load_backbone: Callable[[Model], Backbone],
) -> list[Check]:
    """Fills an empty folder with the layouts, the card, a picture and run.json, and checks the layouts.

    Args:
        prompts: of the picture; the first two are those of the check.
        load_backbone: makes the base model from its settings.

    Raises:
        PackageError: diffusers makes other images with a layout than our policy does.
        ValueError: the model does not fit its base, or its kind of base has no package.
    """
    settings = Model(**model.made["base"])
    names = in_diffusers(settings)
    if names is None:
        why = f"model.backbone: there is no package of {settings.backbone} yet"
        raise ValueError(f"{why}; share {model.folder}, which diffusers reads")
    # diffusers' pipeline finds its networks where they are put, so none of them may wait elsewhere for its turn
    exact = settings.model_copy(update={"dtype": "float32", "vae_dtype": "float32", "offload": False})
    backbone = load_backbone(settings)
    models = [NamedModel("base", None), NamedModel(model.made["run"], str(model.folder), own=True)]
    rows = image_rows(prompts, 1)
    write_sheet(
        folder / evidence.picture, dict(generate(backbone, models, rows, sampling, model.made["seed"])), prompts, 1
    )
    if exact != settings:
        del backbone
        backbone = load_backbone(exact)
    header = _header(model, evidence)
    if model.is_lora:
        _write_lora(folder, model, backbone, names, header)
    else:
        shutil.copytree(model.folder / names.part, folder / names.part)
    (folder / "README.md").write_text(card(model.made, model.data, evidence), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({**model.made, "commit": evidence.commit}, indent=2) + "\n")
    return check_layouts(folder, model, backbone, names, prompts[:2], max(1.0, sampling.guidance_scale))


def _header(model: Trained, evidence: Evidence) -> dict[str, str]:
    """What the files say of themselves."""
    made = model.made
    known = {
        "base_model": made["base"]["path"],
        "run": made["run"],
        "profile": made["profile"],
        "method": made["method"],
        "settings": json.dumps(made["settings"], sort_keys=True),
        "trained_on": ", ".join(made["trained_on"]),
        "trained_with": "attune",
    }
    optional = {
        "base_license": base_license(made["base"]["path"]),
        "commit": evidence.commit,
        "protocol": evidence.summary and json.dumps(evidence.summary.protocol.to_dict(), sort_keys=True),
    }
    return known | {name: value for name, value in optional.items() if value}


def _write_lora(
    folder: Path, model: Trained, backbone: Backbone, names: InDiffusers, header: Mapping[str, str]
) -> None:
    """Both layouts of a LoRA."""
    source, config = model.folder / ADAPTER_FILE, dict(backbone.denoiser.config)
    tensors = read_tensors(source)
    plain = {name.removeprefix(f"{names.part}."): value for name, value in tensors.items()}
    ranks = checked_ranks(plain, backbone.denoiser, source)
    if names.part == "unet":
        told = kohya.header(ranks, config, backbone.prediction_type, backbone.resolution, model.made)
        for_others = kohya.to_kohya(tensors, config)
    else:
        told, for_others = comfyui.header(ranks, names, backbone.resolution, model.made), tensors
    if license_ := header.get("base_license"):
        told["modelspec.license"] = license_
    save_tensors(tensors, folder / "diffusers" / ADAPTER_FILE, {**read_header(source), **header})
    save_tensors(for_others, folder / f"{model.made['run']}.safetensors", {**header, **told})


# ---------------------------------------------------------------- the check


def check_layouts(
    folder: Path, model: Trained, backbone: Backbone, names: InDiffusers, prompts: list[str], guidance_scale: float
) -> list[Check]:
    """Loads each layout into diffusers' own pipeline, generates, and compares with our policy.

    Raises:
        PackageError: they differ by more than rounding, or not all of an adapter was read.
    """
    seeds = [noise_seed(prompt, 0, model.made["seed"]) for prompt in prompts]
    start = per_row_noise(seeds)((len(prompts), *backbone.latent_shape))
    base = _ours(Policy(copy.copy(backbone), backbone.encode_prompts([""])), prompts, start, guidance_scale)
    policy = Policy(copy.copy(backbone), backbone.encode_prompts([""]))
    policy.load(model.folder, may_be_zero=True)
    ours, ranks = _ours(policy, prompts, start, guidance_scale), lora_ranks(policy.denoiser)
    effect = float((ours - base).abs().max())
    unload_lora(backbone.denoiser)
    pipeline = pipeline_of(backbone, names)
    start = start.to(policy.device)

    def checked(layout: str) -> Check:
        found = lora_ranks(getattr(pipeline, names.part))
        if found != ranks:
            read = len(found)
            raise PackageError(f"{layout}: diffusers read {read} modules of {len(ranks)}, or other ranks")
        theirs = generated(pipeline, backbone, prompts, start, STEPS, names.guidance_scale(guidance_scale))
        check = Check(layout, float((theirs - ours).abs().max()), effect)
        if not check.difference <= max(ROUNDING, min(LARGEST, effect / 10)):
            raise PackageError(f"{check}: diffusers makes other images with it than the model does")
        return check

    if not model.is_lora:
        setattr(pipeline, names.part, read_denoiser(folder / names.part, names).to(policy.device))
        return [checked(names.part)]
    checks = []
    for place, name in ((folder / "diffusers", ADAPTER_FILE), (folder, f"{model.made['run']}.safetensors")):
        pipeline.load_lora_weights(place, weight_name=name)
        checks.append(checked(str((place / name).relative_to(folder))))
        pipeline.unload_lora_weights()
    return checks


@torch.no_grad()
def _ours(policy: Policy, prompts: list[str], start: Tensor, guidance_scale: float) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of our own sampler from the latents `start`."""
    cond = policy.backbone.encode_prompts(prompts)
    latents = sample(policy, cond, lambda shape: start, STEPS, 0.0, guidance_scale)
    return policy.backbone.decode_latents(latents).clamp(0, 1).float().cpu()
