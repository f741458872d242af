"""LoRA adapters and whole denoisers in files, as diffusers, peft and kohya write them.

Only safetensors are read. Every tensor of a file must find its place: what fits nothing is an error, not a warning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from attune.diffusion.lora_scale import PEFT_CONFIG, PEFT_FILE, claims, scales
from attune.files import digest
from attune.hub import Source, fetch_file, fetch_folder, parse
from attune.pretrained import load_pretrained, weight_files
from attune.weights import check_finite, read_json, read_tensors

if TYPE_CHECKING:
    from attune.diffusion.lora import Denoiser

ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for it
SCHEDULER = "scheduler/scheduler_config.json"
PARTS = ("unet", "transformer")  # where a pipeline has its denoiser; also how the names of its LoRA begin
KOHYA = ("lora_unet_", "lora_te")  # how its names begin; diffusers reads their alphas
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_KINDS = (  # parts of tensors' names -> what trains such tensors
    (r"dora|magnitude", "DoRA"),
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.lora_mid\.", "LoCon in three factors"),
    (r"\.b?oft_", "OFT"),
    (r"\.ia3_|\.on_input$", "IA3"),
    (r"vera_lambda|\.randlora_|\.hra_|\.fourierft_", "another method of peft"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.diff(_b)?$|\.set_weight$|\.[wb]_norm$", "differences of whole weights"),
)
OF_AUTHORS = re.compile(r"(double|single|joint)_blocks[._]\d|\.attention\.qkv\.")
"""Of transformers' LoRAs by kohya's sd-scripts and others: names of the models' own code, not of diffusers'."""
_PREFIX = re.compile(r"^(base_model\.model\.)?(transformer\.|diffusion_model\.)?")  # the last is of ComfyUI
_ALPHA = re.compile(r"(?:^|\.)(?:lora_|network_)?alphas?$")


def locate(text: str | Path) -> Path:
    """The LoRA file, or the folder of a denoiser, that is meant.

    Args:
        text: a safetensors file; a folder that holds one, or a denoiser, or a pipeline with one; here, or on the
            Hub as `owner/name[/file or folder]@commit`.

    Raises:
        ValueError: a Hub address without its commit, a pickle, or more than one file it could be.
        FileNotFoundError: there is nothing of the kind.
        HubError: it could not be downloaded.
    """
    source = parse(text)
    path = _fetched(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{source}: only safetensors are read, a pickle could run any program")
        return path
    known = [path / name for name in (ADAPTER_FILE, PEFT_FILE) if (path / name).is_file()]
    places = (*(path / part for part in PARTS), path)
    folders = [place for place in places if any(place.glob("diffusion_pytorch_model*.safetensors"))]
    found = [*known, *folders] or sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{source} holds several things to load, name one: {', '.join(f.name for f in found)}")
    pickled = sorted(file.name for file in path.rglob("*") if file.suffix in PICKLES)
    but = f", and pickles such as {pickled[0]} are never read" if pickled else ""
    raise FileNotFoundError(f"{source}: neither a LoRA nor a denoiser in safetensors here{but}")


def model_identity(text: str | Path) -> str:
    """What tells an adapter or a denoiser from any other: the digest of its weights, wherever they lie.

    Raises: as `locate`.
    """
    return digest(locate(text))


def _fetched(source: Source) -> Path:
    if source.commit is None:
        if not Path(source.place).exists():
            raise FileNotFoundError(f"{source}: no such file or folder")
        return Path(source.place)
    if source.inner.endswith((".safetensors", *PICKLES)):
        if Path(source.inner).name == PEFT_FILE:  # nothing without its configuration
            fetch_file(Source(source.place, str(Path(source.inner).with_name(PEFT_CONFIG)), source.commit))
        return fetch_file(source)
    network = ["config.json", *weight_files("diffusion_pytorch_model")]
    adapter = [ADAPTER_FILE, PEFT_FILE, PEFT_CONFIG]
    return fetch_folder(
        source, [*adapter, *network, *(f"{part}/{name}" for part in PARTS for name in network), SCHEDULER]
    )


# ---------------------------------------------------------------- adapters


def read_lora(file: Path, denoiser: Denoiser, may_be_zero: bool = False) -> dict[str, Tensor]:
    """The tensors of a LoRA, float32, under peft's names: `<module>.lora_A.weight` (r, ...) and `.lora_B.weight`.

    Where alpha differs from the rank r, B is multiplied by alpha / r, so that the scale is 1 everywhere.

    Raises:
        ValueError: a tensor fits nothing in the denoiser, belongs to a text encoder or to another kind of adapter, is
            half of a pair, or is not finite; places that give alpha disagree; or the whole would change nothing.
        FileNotFoundError: alpha is in a configuration that is not there.
    """
    given = read_tensors(file)
    _check_kind(given, file)
    tensors, alphas = _in_peft_names(given, file, denoiser)
    encoders = [name for name in tensors if name.startswith("text_encoder")]
    if encoders:
        raise ValueError(f"{file} also changes a text encoder ({encoders[0]}); only denoisers are tuned and compared")
    ranks = checked_ranks(tensors, denoiser, file)
    if strange := set(alphas) - set(ranks):
        raise ValueError(f"{file}: an alpha for {min(strange)}, which has no weights")
    with safe_open(file, "pt") as opened:
        said = claims(opened.metadata() or {}, file, required=any(name.startswith("base_model.") for name in given))
    for name, scale in scales(ranks, alphas, said, file).items():
        tensors[f"{name}.lora_B.weight"] *= scale
    check_finite(tensors, f"{file}, scaled by its alpha")
    moved = any(tensors[f"{m}.lora_A.weight"].any() and tensors[f"{m}.lora_B.weight"].any() for m in ranks)
    if not moved and not may_be_zero:
        raise ValueError(f"{file} changes nothing: in every pair, A or B is zero")
    return tensors


def checked_ranks(tensors: Mapping[str, Tensor], denoiser: nn.Module, file: Path) -> dict[str, int]:
    """Module name -> rank of its pair of tensors. Raises ValueError naming the first that does not fit."""
    layers, found = dict(denoiser.named_modules()), {}
    for key in tensors:
        name, _, side = key.partition(".lora_")
        layer = layers.get(name)
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer  # it may have an adapter already
        down, up = (tensors.get(f"{name}.lora_{half}.weight") for half in "AB")
        if side not in ("A.weight", "B.weight") or not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(f"{file}: {key} fits nothing in the denoiser")
        if down is None or up is None or not _fits(down, up, layer.weight):
            shapes = [None if half is None else tuple(half.shape) for half in (down, up)]
            raise ValueError(f"{file}: {name} is {tuple(layer.weight.shape)}, its A and B are {shapes}")
        found[name] = len(down)
    return found


def _fits(down: Tensor, up: Tensor, weight: Tensor) -> bool:
    pointwise = (1,) * (weight.ndim - 2)
    return len(down) > 0 and down.shape[1:] == weight.shape[1:] and up.shape == (len(weight), len(down), *pointwise)


def _check_kind(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raises ValueError unless these are the tensors of a LoRA, as far as their names and types say."""
    for pattern, kind in OTHER_KINDS:
        if odd := next((name for name in tensors if re.search(pattern, name)), None):
            raise ValueError(f"{file}: {odd:.200} is of {kind}, which is not supported; only LoRA is read")
    if odd := next((name for name in tensors if OF_AUTHORS.search(name)), None):
        raise ValueError(
            f"{file}: {odd:.200} is a name of the model's own code, where one matrix makes query, key and value; only "
            "diffusers' are read (of FLUX, sd-scripts' networks/convert_flux_lora.py --dst ai-toolkit writes them)"
        )
    if not any("lora" in name for name in tensors):
        first = min(tensors, default="none")
        of_whole = "; a whole model must be a folder in diffusers' layout" if len(tensors) > 0 else ""
        raise ValueError(f"{file} holds no LoRA; its first tensor is {first!r:.200}{of_whole}")
    alphas = [name for name in tensors if _ALPHA.search(name)]
    if odd := next((name for name in alphas if tensors[name].numel() != 1), None):
        raise ValueError(f"{file}: {odd:.200} has {tensors[odd].numel()} values, an alpha has one")
    whole = {name for name in alphas if not tensors[name].is_complex() and tensors[name].dtype != torch.bool}
    if odd := next((name for name, v in tensors.items() if not v.is_floating_point() and name not in whole), None):
        raise ValueError(f"{file}: {odd:.200} is of {tensors[odd].dtype}; only floating-point weights are read")


def _in_peft_names(
    given: Mapping[str, Tensor], file: Path, denoiser: Denoiser
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors, float32, and alphas of the denoiser's modules by name; a text encoder's keep their prefix."""
    tensors = {_PREFIX.sub("", name): value for name, value in given.items()}
    plain = {name: value for name, value in tensors.items() if _ALPHA.search(name) and not name.startswith(KOHYA)}
    tensors = {name: value for name, value in tensors.items() if name not in plain}
    try:
        found, kohya = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(tensors), unet_config=denoiser.config)
        found, of_kohya = convert_unet_state_dict_to_peft(found), convert_unet_state_dict_to_peft(kohya or {})
    except Exception as error:  # diffusers' converters fail in many ways on names they do not know
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: the names of its tensors are not understood ({reason})") from error
    if len(found) + len(of_kohya) != len(tensors):
        understood = len(found) + len(of_kohya)
        raise ValueError(f"{file}: {len(tensors)} tensors, of which only {understood} were understood")
    found = {name.removeprefix("unet."): value.float() for name, value in found.items()}
    alphas = {_module(name): float(value) for name, value in of_kohya.items()}
    for name, value in plain.items():
        of_all = {key.partition(".lora_")[0] for key in found} if _module(name) == "" else {_module(name)}
        alphas |= dict.fromkeys(of_all, float(value))
    return found, alphas


def _module(alpha_name: str) -> str:
    """The module that an alpha belongs to; empty for one of all modules."""
    stem = _ALPHA.sub("", alpha_name).partition(".lora_")[0].removeprefix("unet.").replace(".processor.", ".")
    return stem.removesuffix(".lora").removesuffix("_lora")


# ---------------------------------------------------------------- whole denoisers


def part_of(denoiser: nn.Module) -> str:
    """Which of `PARTS` a denoiser is."""
    return "unet" if isinstance(denoiser, UNet2DConditionModel) else "transformer"


def read_denoiser(folder: Path, like: Denoiser, prediction_type: str) -> Denoiser:
    """A whole denoiser, frozen, in the dtype and on the device of `like`, which it must equal in all but values.

    Args:
        like: the present denoiser, whose adapter, if it has one, does not count.
        prediction_type: what `like` predicts, which it must predict too, if its pipeline's scheduler is beside it.

    Raises:
        ValueError: it is another architecture, predicts something else, or weights are missing or not finite.
    """
    scheduler = folder.parent / SCHEDULER
    if folder.name in PARTS and scheduler.is_file():
        said = read_json(scheduler)
        of_flow = str(said.get("_class_name", "")).startswith("FlowMatch")
        predicts = "flow" if of_flow else said.get("prediction_type", "epsilon")
        if predicts != prediction_type:
            raise ValueError(f"{folder} predicts {predicts!r:.40}, the base model {prediction_type}: {scheduler}")
    network: Any = load_pretrained(type(like), Source(str(folder)), like.dtype, like.device)
    wanted, found = (
        {name.replace(".base_layer.", "."): tuple(value.shape) for name, value in module.state_dict().items()}
        for module in (like, network)
    )
    wanted = {name: shape for name, shape in wanted.items() if ".lora_" not in name}
    odd = sorted({name for name, _ in wanted.items() ^ found.items()})
    if odd:
        raise ValueError(
            f"{folder} does not fit the base model: {len(odd)} weights differ or are missing, first {odd[0]}"
        )
    return network
