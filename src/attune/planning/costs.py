"""What each stage will do and roughly cost, as rows of a table; what cannot be known beforehand is "unknown".

Memory of weights, gradients and the optimizer's state is counted. What activations add is estimated from their size per
latent, batch size, resolution and gradient checkpointing, where the backbone knows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

from attune.backbones._diffusers import in_diffusers
from attune.config import plugins
from attune.config.resolve import Settings
from attune.config.settings import MethodConfig, TrainingConfig
from attune.data.rows import SourceError
from attune.planning.make import needs_preference_model, rows_of
from attune.pretrained import weight_files
from attune.weights import count_parameters

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTISED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # of linear layers; nf4 has a float32 scale for 64 weights
UNKNOWN = "unknown"
GB = 1e9
STATE = {"adamw": 16, "adamw8bit": 10, "adafactor": 8}  # bytes per weight that trains: weight, gradient, moments
BYTES_PER_PAIR = 2000  # of the tables, with scores
BYTES_PER_PIXEL = 1.5  # of a PNG of a photograph
PREFERENCE_WEIGHTS = 1_300_000_000  # a step-aware ViT-H/14, where the CLIP is not here to be counted


@dataclass(frozen=True)
class Row:
    """A stage of the table: sizes in bytes, None where unknown."""

    stage: str
    does: str
    sees: str = ""
    gpu: float | None = 0  # memory on the GPU, without activations; on the host, if there is none
    activations: float | None = 0  # what comes on top in training, estimated
    host: float | None = 0  # memory on the host
    disk: float | None = 0
    download: float | None = 0
    time: float | None = None  # seconds


class Facts(Protocol):
    """How large a base model is; each file of attune/backbones has one, `facts(model)`."""

    denoiser: int  # numbers of weights
    text_encoders: int
    autoencoder: int
    resolution: int  # pixels
    guidance: str  # cfg, embedded or none
    prompt: int  # numbers that a prompt is stored as; 0 where that is little
    adapter: int  # weights of a LoRA on the attention, per rank; 0 where that is not known
    activations: int | None  # bytes per latent of an image in training, half precision; None: unknown
    checkpointed: int | None  # the same with gradient checkpointing
    multiple: int  # pixels that a resolution must be a multiple of
    channels: int  # of latents
    text: int  # latents that the activations of a prompt count as


def facts(s: Settings) -> Facts:
    """Of a base model here as its files say, without loading it; else what published ones of its kind have."""
    return plugins.load("backbones", s.model.backbone).facts(s.model)


def rows(
    s: Settings, downloads: Mapping[str, float | None], seconds: Mapping[str, float], rows_here: Mapping[str, int]
) -> Iterator[Row]:
    """The table, stage by stage.

    Args:
        downloads: stage -> bytes to download, None if unknown.
        seconds: stage -> how long it took the last time on this machine, doing the same.
        rows_here: training rows that are prepared already, if they are, by what methods learn from.
    """
    for row in _rows(s, facts(s), known_rows(s) | dict(rows_here)):
        stage = row.stage
        yield replace(row, download=downloads.get(stage, 0), time=seconds.get(stage))


def known_rows(s: Settings) -> dict[str, int]:
    """Training rows, as far as they are known before any work; a limit on pairs counts as reached."""
    try:
        known = plugins.load("sources", s.source).split_sizes(s.data) or {}
    except SourceError:  # the problems say what is wrong with the data
        known = {}
    found = training_rows(known)
    limit = getattr(s.data, "pairs", None)
    return found if "pairs" in found or limit is None else {**found, "pairs": limit}


def training_rows(counts: Mapping[str, int]) -> dict[str, int]:
    """What methods learn from -> how many of them a training split has, of those that are counted."""
    names = {kind: f"{kind}/train" for kind in ("prompts", "pairs", "images")} | {"liked images": "liked/train"}
    return {kind: counts[name] for kind, name in names.items() if name in counts}


def _rows(s: Settings, weights: Facts, sizes: Mapping[str, int]) -> Iterator[Row]:
    frozen, pairs, prompts = _frozen(s, weights), sizes.get("pairs"), sizes.get("prompts")
    pixels, images = weights.resolution**2, s.generate.prompts * s.generate.images_per_prompt
    shown = "images" if "images" in plugins.load("sources", s.source).GIVES else "pairs"
    found = f"source {s.source}: {_many(prompts)} training prompts, {_many(sizes.get(shown))} {shown}"
    encoded = sizes.get("images") if shown == "images" else None if pairs is None else 2 * pairs  # at most
    latents = None if encoded is None else encoded * pixels / 64 * weights.channels * BYTES["float32"]
    read = sizes.get(shown) if prompts is None else prompts  # where they are not counted yet, one for each row at most
    embedded = (read or 0) * weights.prompt * BYTES[s.model.dtype]
    tables = (pairs or 0) * BYTES_PER_PAIR
    yield Row("prepare", found, gpu=frozen, host=frozen + tables, disk=None if latents is None else latents + embedded)
    yield _preference(s, weights, pairs)
    for name, run in s.runs.items():
        yield _align(name, s, weights, sizes) if run.method else Row(f"align@{name}", "nothing is trained")
    for name in s.runs:
        host, disk = frozen + images * pixels * 6, images * pixels * BYTES_PER_PIXEL
        yield Row(f"generate@{name}", f"{images:,} images", gpu=frozen, host=host, disk=disk)
    for name in s.runs:
        yield Row(f"evaluate@{name}", f"{images:,} images by {', '.join(s.scorers)}")
    yield Row("report", f"{len(s.runs)} runs compared")


def _preference(s: Settings, weights: Facts, pairs: int | None) -> Row:
    config = s.preference
    if config is None or not needs_preference_model(s):
        return Row("train_preference", "nothing: no run needs the preference model")
    if not config.batches:
        return Row("train_preference", "nothing is trained: the weights as they are")
    clip = Path(config.clip)
    own = count_parameters(clip, weight_files("model")) if clip.is_dir() else PREFERENCE_WEIGHTS
    frozen = _frozen(s, weights)
    does, sees = _training(config, "pairs"), _epochs(config, pairs, "pairs")
    gpu, disk = own * _per_trained_weight(config) + frozen, own * BYTES["float32"]
    return Row("train_preference", does, sees, gpu, None, own * 4 + frozen, disk)


def _align(name: str, s: Settings, weights: Facts, sizes: Mapping[str, int]) -> Row:
    config, method = s.methods[name], s.method_of(name)
    kind = rows_of(method, s.source)
    does, sees = f"{method}: {_training(config, kind)}{_times(s, kind)}", _epochs(config, sizes.get(kind), kind)
    disk = 0 if config.lora else weights.denoiser * BYTES["float32"]  # an adapter has tens of MB
    gpu, host = _training_memory(config, method, s, weights), _frozen(s, weights)
    images = _images_at_once(config, method, kind, doubled=weights.guidance == "cfg")
    activations = _activations(config, images, s, weights)
    return Row(f"align@{name}", does, sees, gpu, activations, host, disk)


def _training(config: TrainingConfig, kind: str) -> str:
    steps = f", a step each {config.accumulation} minibatches" if config.accumulation > 1 else ""
    return f"{config.batches:,} batches of {config.batch_size} {kind}{steps}"


def _times(s: Settings, kind: str) -> str:
    """Which times of a flow model are drawn; none by methods that begin with prompts, see `rows_of`."""
    names = in_diffusers(s.model)
    is_drawn = names is not None and names.is_flow and kind != "prompts"
    return f", times {s.model.density or 'logit_normal'}" if is_drawn else ""


def _epochs(config: TrainingConfig, n: int | None, kind: str) -> str:
    seen = config.batches * config.batch_size
    return f"{seen:,} {kind}, " + (f"{seen / n:.3g} epochs" if n else f"epochs {UNKNOWN}")


def _frozen(s: Settings, weights: Facts) -> float:
    """Bytes of the base model's networks as they are loaded."""
    encoders = weights.text_encoders * BYTES[s.model.dtype]
    return weights.denoiser * _per_weight(s) + encoders + weights.autoencoder * BYTES[s.model.vae_dtype]


def _per_weight(s: Settings) -> float:
    """Bytes of a frozen denoiser's weight; at least, as convolutions and norms are not quantised."""
    return BYTES[s.model.dtype] if s.model.quantize is None else QUANTISED[s.model.quantize]


def _training_memory(config: MethodConfig, method: str, s: Settings, weights: Facts) -> float:
    """The denoiser and what trains of it, or all networks as they are read, whichever is more.

    What trains is an adapter, which a moving reference has a copy of, or all weights in float32 beside a copy. Text
    encoders are let go of after reading; so is the autoencoder, unless the method looks at images.
    """
    decoder = weights.autoencoder * BYTES[s.model.vae_dtype] if plugins.load("methods", method).Method.needs else 0
    if config.lora is None:
        return weights.denoiser * (_per_trained_weight(config) + 4) + decoder
    moving_reference = 0 if getattr(config, "reference", None) is None else 4
    adapter = weights.adapter * config.lora.rank * (_per_trained_weight(config) + moving_reference)
    return max(_frozen(s, weights), weights.denoiser * _per_weight(s) + adapter + decoder)


def _per_trained_weight(config: TrainingConfig) -> int:
    """Bytes of a weight that trains, its gradient, the optimizer's state, and its moving average if it has one."""
    return STATE[config.optimizer] + (0 if config.ema_decay is None else 4)


def _activations(config: MethodConfig, images: int | None, s: Settings, weights: Facts) -> float | None:
    """Bytes that a minibatch of so many images needs in forward and backward pass; None if that is not known.

    Full fine-tuning adds the copy of its weights in the dtype it computes in.
    """
    per_latent = weights.checkpointed if config.gradient_checkpointing else weights.activations
    if per_latent is None or images is None:
        return None
    half = BYTES[s.model.dtype]
    copies = weights.denoiser * half if config.lora is None and half < 4 else 0
    return copies + images * ((weights.resolution / 8) ** 2 + weights.text) * per_latent * half / 2


def _images_at_once(config: MethodConfig, method: str, kind: str, doubled: bool) -> int | None:
    """Images that the denoiser is given with a graph at a time; None where decoder and scorers have one too.

    Args:
        kind: what the method's batches are drawn from, see `rows_of`.
        doubled: whether guidance shows the denoiser each image twice.
    """
    if kind == "pairs":
        liked_alone = plugins.load("methods", method).Method.consumes == "liked images"
        return config.batch_size * (1 if liked_alone else 2)
    if kind == "groups":
        return config.batch_size * int(getattr(config, "images", 1))
    if kind != "prompts":
        return config.batch_size
    steps: int | None = getattr(config, "minibatch_size", None)  # of SPO
    if steps is None:
        return None
    guided, apart = doubled and getattr(config, "guidance_scale", 1.0) != 1.0, getattr(config, "inner_steps", 0) > 0
    return steps * (1 + guided) * (1 + apart)


def size(n: float | None) -> str:
    """A number of bytes, to be read."""
    if n is None:
        return UNKNOWN
    return "" if n == 0 else f"{n / GB:.1f} GB" if n >= 0.1 * GB else f"{n / 1e6:.0f} MB"


def _many(n: int | None) -> str:
    return UNKNOWN if n is None else f"{n:,}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    if seconds < 100:
        return f"{seconds:.0f} s (last time)"
    return f"{seconds / 60:.0f} min (last time)" if seconds < 6000 else f"{seconds / 3600:.1f} h (last time)"


def _texts(row: Row) -> list[str]:
    sizes = [size(n) for n in (row.gpu, row.activations, row.host, row.disk, row.download)]
    return [row.stage, row.does, row.sees, *sizes, _duration(row.time)]


def as_text(table: list[Row]) -> str:
    """The table with aligned columns, for a terminal."""
    names = {"gpu": "GPU, without activations", "host": "host memory"}
    columns = [field.name for field in fields(Row)]
    lines = [[names.get(name, name) for name in columns], *map(_texts, table)]
    used = [i for i in range(len(columns)) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in used}
    return "\n".join("  ".join(line[i].ljust(widths[i]) for i in used).rstrip() for line in lines)
