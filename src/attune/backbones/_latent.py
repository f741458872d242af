"""What latent diffusion models in diffusers' layout have in common: reading their parts, and their autoencoder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attune.backbones._memory import in_parts
from attune.backbones._quantise import quantise
from attune.config.settings import Model
from attune.hub import Source, fetch_folder, parse
from attune.interfaces import Guidance
from attune.pretrained import TOKENIZER_FILES, check_clip_tokenizer, load_pretrained, load_tokenizer, weight_files
from attune.weights import count_parameters, read_json

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKEN_CHARS = 256  # of CLIP's vocabulary, generously: so much text tells whether a prompt of any length is cut
DISTILLED = "was distilled to few steps, which training would take from it"
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
UNSAID = {"sample_size": 128, "patch_size": 2}
"""Latents per side of an image, and of one token, which the pipelines of FLUX and Z-Image know and no file says."""
JOINT_LORA_TARGETS = (*LORA_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # of image and text


@dataclass(frozen=True)
class Facts:
    """What a planner asks of a base model before its weights are here: numbers of weights, pixels, and memory.

    Activations are what a step of training needs in half precision besides weights: docs/full_size.md says how they
    were found. None of a model that is not of the published shape.
    """

    denoiser: int
    text_encoders: int
    autoencoder: int
    resolution: int
    guidance: Guidance = "cfg"
    prompt: int = 0  # numbers that a prompt is stored as, where it is encoded by a T5; 0: few
    adapter: int = 0  # weights of a LoRA on the attention, per rank
    activations: int | None = None  # bytes per latent of each image
    checkpointed: int | None = None  # the same with gradient checkpointing
    multiple: int = 8  # pixels that a resolution is a multiple of: those of a latent, or of a transformer's patch
    channels: int = 4  # of latents
    text: int = 0  # latents that the activations of a prompt count as, of transformers that see both


def facts(
    model: Model, parts: Mapping[str, Sequence[str]], nominal: Facts, unsaid: Mapping[str, int] | None = None
) -> Facts:
    """Of a local pipeline as its files say, from their headers; else the nominal ones.

    Args:
        parts: "denoiser", "text_encoders" and "autoencoder" -> their folders.
        nominal: of the published model.
        unsaid: what the denoiser's configuration does not say, as `UNSAID`.
    """
    source, counts = parse(model.path), {name: getattr(nominal, name) for name in parts}
    resolution, multiple, channels = nominal.resolution, nominal.multiple, nominal.channels
    folder, network = Path(source.place), parts["denoiser"][0]
    if source.commit is None and all((folder / part / "config.json").is_file() for part in (network, "vae")):
        counts = {
            name: sum(_count(folder / part, model.variant) for part in folders) for name, folders in parts.items()
        }
        config, vae = (read_json(folder / part / "config.json") for part in (network, "vae"))
        config = {**config, **(unsaid or {})}
        factor = _pixels_per_latent(vae, folder / "vae/config.json")
        channels = said if isinstance(said := vae.get("latent_channels"), int) else channels
        multiple = factor * patch_size(config, folder / network / "config.json")
        if model.resolution is None:
            resolution = _sample_size(config, folder / network / "config.json") * factor
    resolution = model.resolution or resolution
    found = replace(nominal, **counts, resolution=resolution, multiple=multiple, channels=channels)
    same = abs(found.denoiser - nominal.denoiser) < 0.1 * nominal.denoiser
    return found if same else replace(found, prompt=0, adapter=0, activations=None, checkpointed=None, text=0)


def _count(folder: Path, variant: str | None) -> int:
    """Numbers in the files of a network that would be read: published folders often hold it twice, whole and fp16."""
    stem = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    return count_parameters(folder, weight_files(stem, variant))


def _sample_size(config: Mapping[str, Any], file: Path | Source) -> int:
    """Latents per side that a denoiser was trained at. Raises ValueError naming the file if it does not say."""
    size = config.get("sample_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{file}: sample_size {size!r:.40} is no number of latents; set model.resolution instead")
    return size


def patch_size(config: Mapping[str, Any], file: Path | Source) -> int:
    """Latents per side of a transformer's patch; 1 of a UNet. Raises ValueError naming the file if it is no number."""
    size = config.get("patch_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{file}: patch_size {size!r:.40} is no number of latents")
    return size


def _pixels_per_latent(config: Mapping[str, Any], file: Path | Source | str) -> int:
    channels = config.get("block_out_channels")
    if not isinstance(channels, list | tuple) or not channels:
        raise ValueError(f"{file}: block_out_channels {channels!r:.40} is no list of an autoencoder's channels")
    return 2 ** (len(channels) - 1)


def own_name(model: Model) -> str:
    """The name of the folder or repository without its owner's, in lower case."""
    return Path(parse(model.path).place).resolve().name.lower()


def refuse_distilled(model: Model, word: str, remedy: str, sign: str | None = None) -> None:
    """Raises ValueError for a model distilled to few steps, known by a word in its name or by a sign in its files.

    Training at single noise levels, as all methods here do, would undo that. A copy that was trained until it was
    undone, and says so in its name (De-Turbo), is read.
    """
    name = own_name(model)
    if re.search(rf"de[-_ ]?{word}", name) or not (word in name or sign):
        return
    known_by = "" if word in name else f" ({sign})"
    raise ValueError(f"model.path: {model.path}{known_by} {DISTILLED}; {remedy}")


def downloads(model: Model, parts: Mapping[str, Sequence[str]]) -> list[tuple[Source, list[str]]]:
    """What loading the model fetches: sources, each with its patterns of files, as `hub.fetch_folder` takes them."""
    source = parse(model.path)
    found = [(source / "scheduler", ["*.json"])]
    for part in parts["text_encoders"]:
        found.append((source / part.replace("text_encoder", "tokenizer"), list(TOKENIZER_FILES)))
        found.append((source / part, ["config.json", *weight_files("model", model.variant)]))
    network = weight_files("diffusion_pytorch_model", model.variant)
    found += [(source / part, ["config.json", *network]) for part in parts["denoiser"]]
    if model.vae is not None:
        return [*found, (parse(model.vae), ["config.json", *weight_files("diffusion_pytorch_model")])]
    return [*found, (source / "vae", ["config.json", *network])]


def load_denoiser(kind: type[Any], part: str, model: Model, dtype: torch.dtype, device: torch.device) -> Any:
    """The pipeline's denoiser, of a class of diffusers and in a folder, frozen; errors as `load_pretrained`."""
    first = device if model.quantize is None else torch.device("cpu")
    network = load_pretrained(kind, parse(model.path) / part, dtype, first, model.variant)
    network = network.to(memory_format=torch.channels_last) if model.channels_last else network
    return network if model.quantize is None else quantise(network, model.quantize, device)


def load_vae(model: Model, device: torch.device, may_shift: bool = False) -> AutoencoderKL:
    """The pipeline's autoencoder, or the one that `model.vae` puts in its place.

    Args:
        may_shift: latents may have a `shift_factor`; Stable Diffusion before 3 would ignore it.
    """
    from diffusers import AutoencoderKL

    source, variant = (parse(model.path) / "vae", model.variant) if model.vae is None else (parse(model.vae), None)
    vae = load_pretrained(AutoencoderKL, source, getattr(torch, model.vae_dtype), device, variant)
    if vae.config.latents_mean is not None:
        raise ValueError(f"{source}: an autoencoder with latents_mean and latents_std is not supported")
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{source / 'config.json'}: scaling_factor {scale!r:.40} is not a number above 0")
    number = isinstance(shift, int | float) and not isinstance(shift, bool) and math.isfinite(shift)
    if shift is not None and not (number and (may_shift or shift == 0)):
        raise ValueError(f"{source / 'config.json'}: an autoencoder with shift_factor {shift!r:.40} is not supported")
    return vae.to(memory_format=torch.channels_last) if model.channels_last else vae


def load_text(
    kind: type[PreTrainedModel], model: Model, number: str, device: torch.device
) -> tuple[CLIPTokenizer, PreTrainedModel]:
    """A tokenizer and its text encoder, which must fit each other; `number` is what their folders' names end in."""
    from transformers import CLIPTokenizer

    source = parse(model.path)
    tokenizer = load_tokenizer(CLIPTokenizer, source / f"tokenizer{number}")
    dtype = getattr(torch, model.dtype)
    encoder = load_pretrained(kind, source / f"text_encoder{number}", dtype, device, model.variant)
    check_clip_tokenizer(tokenizer, encoder.config, source / f"tokenizer{number}")
    positions = encoder.config.max_position_embeddings
    if tokenizer.model_max_length < positions:
        short = f"model_max_length {tokenizer.model_max_length} of its tokenizer"
        raise ValueError(f"{source / f'tokenizer{number}'}: {short} is below the encoder's {positions} positions")
    tokenizer.model_max_length = positions  # prompts are padded to it; without a tokenizer_config.json it is 10^30
    return tokenizer, encoder


def tokenise(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], device: torch.device) -> Tensor:
    """Token ids (B, L), padded to the encoder's full length as the tokenizer's own configuration says."""
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)


def is_cut(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Whether a prompt has more tokens than the encoder reads; `tokenise` cuts off the rest."""
    beginning = " ".join(prompt.split())[: tokenizer.model_max_length * MAX_TOKEN_CHARS]
    ids = tokenizer(beginning, truncation=False, verbose=False).input_ids
    return len(ids) > tokenizer.model_max_length


def scheduler_config(model: Model) -> tuple[Mapping[str, Any], Path]:
    """What the pipeline's scheduler says of itself, and its file. Raises FileNotFoundError or ValueError if none."""
    if Path(model.path).is_file():
        raise ValueError(
            f"{model.path} is one file; a folder in diffusers' layout is needed: `from_single_file` makes it"
        )
    file = fetch_folder(parse(model.path) / "scheduler", ["*.json"]) / "scheduler_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{model.path}: there is no scheduler/{file.name}")
    return read_json(file), file


def image_size(
    model: Model, vae: AutoencoderKL, config: Mapping[str, Any], part: str = "unet", packed: int = 1
) -> tuple[int, tuple[int, int, int]]:
    """Resolution in pixels and shape of latents: as configured, else what the denoiser was trained at.

    Args:
        config: the denoiser's, which lies in `part`.
        packed: how many latents the channels of one of its inputs hold.

    Raises:
        ValueError: the autoencoder cannot make latents of that size, or none that fit the denoiser.
    """
    factor = _pixels_per_latent(vae.config, parse(model.path) / "vae/config.json")
    channels, wanted = vae.config["latent_channels"], config["in_channels"] / packed
    if channels != wanted:
        raise ValueError(f"model.vae has {channels} latent channels, the denoiser {wanted:g}")
    place = parse(model.path) / part / "config.json"
    resolution = model.resolution or _sample_size(config, place) * factor
    if resolution % factor:
        raise ValueError(f"model.resolution: {resolution} is not a multiple of {factor}, the pixels of a latent")
    return resolution, (channels, resolution // factor, resolution // factor)


def _shift(vae: AutoencoderKL) -> float:
    return vae.config["shift_factor"] or 0.0


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] to scaled latents, float32; a posterior sample if given a generator, else its mode.

    The generator may be of the CPU wherever the autoencoder lies.
    """
    posterior = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    return (latents.float() - _shift(vae)) * vae.config["scaling_factor"]


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents to images (B, 3, H, W), float32, nominally in [0, 1]; carries a graph.

    Any number of them: without a graph they are decoded in parts that fit.
    """

    def images(rows: Tensor) -> Tensor:
        return vae.decode(rows.to(vae.dtype) / vae.config["scaling_factor"] + _shift(vae)).sample.float() / 2 + 0.5

    scale = _pixels_per_latent(vae.config, "the autoencoder")
    return in_parts(images, latents.to(vae.device), latents.shape[-2] * latents.shape[-1] * scale**2)
