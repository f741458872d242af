"""A model's card: README.md beside an adapter, as the Hub shows it, with YAML in front.

All text of prompts, names and paths is escaped. The card of a model's folder is a function of its training alone; that
of a package adds scores, a picture and a commit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attune.backbones._diffusers import InDiffusers, in_diffusers, sampler_name
from attune.config import plugins
from attune.config.settings import Model
from attune.evaluation.report.document import (
    DocumentBlock,
    Heading,
    Items,
    Paragraph,
    Picture,
    Table,
    one_line,
    render_markdown,
)
from attune.evaluation.report.tables import decimals, hacking_table, not_held_out, p_text, percent
from attune.evaluation.report.verdict import verdict
from attune.evaluation.summary import Summary
from attune.hub import parse
from attune.licenses import NOT_OF_THE_HUB, base_license

UNKNOWN = InDiffusers(
    "DiffusionPipeline", "AutoModel", "unet", "diffusion"
)  # of a backbone that says nothing of itself
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*")
_WORDS = {"yes", "no", "on", "off", "true", "false", "null", "y", "n"}  # that YAML would not read as text


@dataclass(frozen=True)
class Evidence:
    """What a package knows beyond the training."""

    summary: Summary | None  # None: there are no scores of this very model
    missing: str  # why there are none; empty if there are
    commit: str | None
    sampling: Mapping[str, Any]
    picture: str = "samples.png"


def card(made: Mapping[str, Any], data: Mapping[str, Any], evidence: Evidence | None = None) -> str:
    """The card as Markdown.

    Args:
        made: run.json.
        data: `source` and its settings.
        evidence: of a package; None for the card beside a model that has just been trained.
    """
    front = "\n".join(["---", *_front(made, data), "---"])
    body = render_markdown(f"{made['run']}: {_subject(made)}", list(_blocks(made, data, evidence)))
    paper = plugins.paper("methods", made["method"])
    link = f"\n## Paper\n\nThe method is that of <https://arxiv.org/abs/{paper}>.\n" if paper else ""
    return f"{front}\n\n{body}\n{_loading(made, evidence)}{link}"


def _subject(made: Mapping[str, Any]) -> str:
    what = "LoRA" if made["settings"]["lora"] else "fine-tuned denoiser"
    return f"a {what} of {parse(made['base']['path']).place}"


# ---------------------------------------------------------------- the front


def _front(made: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[str]:
    base, lora = parse(made["base"]["path"]), bool(made["settings"]["lora"])
    if found := base_license(made["base"]["path"]):
        link = NOT_OF_THE_HUB.get(found)
        yield f"license: {yaml_text('other' if link else found)}"
        yield from (f"license_name: {found}", f"license_link: {link}") if link else ()
    if base.commit is not None:
        yield f"base_model: {yaml_text(base.place)}"
        yield f"base_model_relation: {'adapter' if lora else 'finetune'}"
    yield "library_name: diffusers"
    yield "pipeline_tag: text-to-image"
    if dataset := _dataset(data):
        yield from ("datasets:", f"- {yaml_text(dataset)}")
    tags = ["text-to-image", "diffusers", _names(made).tag, *(["lora"] if lora else []), "attune", made["method"]]
    paper = plugins.paper("methods", made["method"])
    yield from ("tags:", *(f"- {yaml_text(tag)}" for tag in tags), *([f"- arxiv:{paper}"] if paper else []))


def yaml_text(text: str) -> str:
    """Text as YAML reads it back: as it is where that is safe, else quoted as JSON, which is YAML too."""
    safe = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return text if safe else json.dumps(one_line(text))


def _dataset(data: Mapping[str, Any]) -> str | None:
    """The data set's id, if it is on the Hub."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}", str(data.get("path")))
    return found[1] if found else None


# ---------------------------------------------------------------- the body


def _blocks(made: Mapping[str, Any], data: Mapping[str, Any], evidence: Evidence | None) -> Iterator[DocumentBlock]:
    yield Items(tuple(_facts(made, data, evidence)))
    yield Heading("Training")
    if changed := plugins.changed_settings("methods", made["method"], made["settings"]):
        yield Paragraph("Settings that are not the method's defaults, which are the paper's:")
        yield Table(("setting", "here", "default"), tuple((k, _text(v), _text(d)) for k, v, d in changed), prose=True)
    else:
        yield Paragraph("All settings are the method's defaults, which are the paper's.")
    yield Heading("Evaluation")
    if evidence is None:
        reports = f"reports/{made['profile']}"
        yield Paragraph(f"Scores are in {reports}/report.md and {reports}/summary.json of the repository.")
        return
    if evidence.summary is None:
        yield Paragraph(evidence.missing)
    else:
        yield from _scores(evidence.summary, made["run"])
    sampling = ", ".join(f"{key} {value}" for key, value in evidence.sampling.items() if key != "batch_size")
    sampler = sampler_name(_base(made), evidence.sampling["eta"])
    yield Heading("Samples")
    yield Paragraph(f"The same prompts and noise for the base and for {made['run']}; {sampler}, {sampling}.")
    yield Picture("base and tuned", evidence.picture)


def _facts(made: Mapping[str, Any], data: Mapping[str, Any], evidence: Evidence | None) -> Iterator[tuple[str, str]]:
    base, lora = made["base"]["path"], made["settings"]["lora"]
    yield "base model", base
    yield "license of the base", base_license(base) or "not known here: look it up before you publish"
    yield "method", made["method"]
    if lora:
        targets = lora["targets"] if isinstance(lora["targets"], str) else ", ".join(lora["targets"])
        yield "adapter", f"LoRA of rank {lora['rank']} and alpha {lora['rank']} on {targets}"
    else:
        yield "trained", "all weights of the denoiser"
    if times := made.get("times"):
        drawn = (times["density"] or "those that it samples at").replace("_", "-")
        yield "times of training", f"{drawn}, shift {times['shift']}"
    if start := made["starts_from"] or made["settings"].get("start"):
        yield "starts from", str(start)
    where = f", {data['path']}" if data.get("path") else ""
    yield "data", f"{data['source']}{where}"
    said = data.get("license") or ("made by the program itself" if data["source"] == "world" else None)
    yield "license of the data", str(said or "not said (`data.license` of the profile): look it up before you publish")
    yield "trained on the opinion of", ", ".join(made["trained_on"]) or "no scorer"
    yield "seed", str(made["seed"])
    if evidence is not None and evidence.commit is not None:
        yield "packaged at commit", evidence.commit


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _scores(summary: Summary, run: str) -> Iterator[DocumentBlock]:
    """Verdict, table and signs of reward hacking of one run; p-values stay corrected for all that were compared."""
    two = replace(summary, methods={name: summary.methods[name] for name in (summary.base, run)}, pairs=(), best=None)
    yield verdict(two)
    rows = []
    for scorer in summary.scorers:
        digits, entry = decimals(summary, scorer), summary.methods[run].vs_base[scorer]
        means = [f"{summary.methods[name].scores[scorer].mean:.{digits}f}" for name in (summary.base, run)]
        low, high = entry.difference_ci95
        rows.append(
            (
                scorer + not_held_out(summary.methods[run], scorer),
                *means,
                f"{entry.difference:+.{digits}f}",
                f"{low:+.{digits}f} to {high:+.{digits}f}",
                percent(entry.win_rate),
                f"{100 * entry.ci95[0]:.1f} to {percent(entry.ci95[1])}",
                p_text(entry.p_corrected).removeprefix("p ").removeprefix("= "),
            )
        )
    yield Table(("scorer", summary.base, run, "difference", "95 % CI", "win rate", "95 % CI", "p (Holm)"), tuple(rows))
    yield Paragraph(f"Protocol {summary.protocol.describe()}", quiet=True)
    yield Heading("Signs of reward hacking")
    yield hacking_table(two)
    yield Paragraph(
        "Gains are in units of the base's spread over prompts. A large gap between trained and held-out scorers, "
        "falling diversity, or rising saturation or high-frequency energy are signs that the scorers were exploited."
    )


# ---------------------------------------------------------------- how to load it


def _loading(made: Mapping[str, Any], evidence: Evidence | None) -> str:
    base, run, lora = parse(made["base"]["path"]), made["run"], bool(made["settings"]["lora"])
    names, settings = _names(made), made["base"]
    without = "".join(f", {part}=None" for part in names.left_out)
    revision = f', revision="{base.commit}"' if base.commit else ""
    options = ""
    if evidence:
        guidance = f"{names.guidance_scale(evidence.sampling['guidance_scale']):g}"
        options = f", num_inference_steps={evidence.sampling['steps']}, guidance_scale={guidance}"
    if side := settings.get("resolution"):
        options += f", height={side}, width={side}"
    if names.is_flow and (tokens := settings.get("max_sequence_length")):
        options += f", max_sequence_length={tokens}"
    packaged = evidence is not None
    load = [
        'folder = "."  # this folder, or the id of the repository it was uploaded to',
        f"pipeline.load_lora_weights(folder{', subfolder=' + _quoted('diffusers') if packaged else ''}, "
        'weight_name="pytorch_lora_weights.safetensors")',
    ]
    if not lora:
        load = [
            'folder = "."  # this folder, or the id of the repository it was uploaded to',
            f'pipeline.{names.part} = {names.denoiser}.from_pretrained(folder, subfolder="{names.part}")',
        ]
    classes = [*([] if names.is_flow else ["DDIMScheduler"]), names.pipeline, *([] if lora else [names.denoiser])]
    code = [
        f"from diffusers import {', '.join(classes)}",
        "",
        f"pipeline = {names.pipeline}.from_pretrained({_quoted(base.place)}{revision}{without})",
        *load,
        *([] if names.is_flow else ["pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)"]),
        f'image = pipeline("a prompt"{options}).images[0]',
    ]
    return "\n".join(
        ["## How to load it", "", "```python", *code, "```", "", *_elsewhere(run, lora, packaged, names), ""]
    )


def _names(made: Mapping[str, Any]) -> InDiffusers:
    """What the base is in diffusers."""
    return in_diffusers(_base(made)) or UNKNOWN


def _base(made: Mapping[str, Any]) -> Model:
    """The settings of the base, not checked: a card is also written where what they name is gone."""
    return Model.model_construct(**made["base"])


def _quoted(text: str) -> str:
    """A string of Python that cannot end the block of code it stands in."""
    return json.dumps(one_line(text)).replace("`", "\\x60")


def _elsewhere(run: str, lora: bool, packaged: bool, names: InDiffusers) -> Sequence[str]:
    if not lora:
        return ["ComfyUI and A1111 read single checkpoints; this is a denoiser in diffusers' layout."]
    file = f"`{run}.safetensors`"
    made = "" if packaged else f" (`make package RUN={run}` writes it)"
    comfyui = f"ComfyUI: put {file}{made} into `models/loras` and load it with the node Load LoRA, strength 1."
    if names.part != "unet":
        return [comfyui]
    return [
        comfyui,
        "",
        f"A1111: put {file} into `models/Lora` and write `<lora:{run}:1>` into the prompt.",
    ]
