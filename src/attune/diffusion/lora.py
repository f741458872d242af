"""LoRA adapters and whole denoisers: attached to a network, and as the files that diffusers, peft and kohya write.

Only safetensors are read. Every tensor of a file must find its place: what fits nothing is an error, not a warning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from attune.hub import Source, check_finite, fetch_file, fetch_folder, parse, read_tensors
from attune.pretrained import weight_files

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    Denoiser = UNet2DConditionModel
    """The networks that are trained: modules of diffusers that save themselves and take adapters."""

ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for it
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# ---------------------------------------------------------------- on a network


def target_modules(denoiser: nn.Module, targets: str | Sequence[str], attention: Sequence[str]) -> list[str]:
    """Names of the modules that an adapter is put on.

    Args:
        targets: "attention", modules whose names end as `attention` says; "all", every Linear and Conv2d but
            conv_in and conv_out, whose four channels have no low rank; or endings of module names.
        attention: endings of the attention projections' names, which the backbone knows.

    Raises:
        ValueError: an ending fits no module.
    """
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if targets == "all":
        return [name for name in layers if name not in ("conv_in", "conv_out")]
    endings = attention if targets == "attention" else targets
    for ending in endings:
        if not any(f".{name}".endswith(f".{ending}") for name in layers):
            raise ValueError(f"lora.targets: no Linear or Conv2d of the denoiser is called {ending!r}")
    return [name for name in layers if any(f".{name}".endswith(f".{ending}") for ending in endings)]


def add_lora(denoiser: Denoiser, ranks: Mapping[str, int]) -> None:
    """Puts a trainable LoRA on exactly these modules (name -> rank): A Gaussian, B zero, alpha = rank, float32."""
    rank = max(ranks.values())
    other_ranks = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    denoiser.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            rank_pattern=other_ranks,
            alpha_pattern=dict(other_ranks),
            init_lora_weights="gaussian",
            target_modules="|".join(map(re.escape, ranks)),
        )
    )
    for weight in denoiser.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def lora_ranks(denoiser: nn.Module) -> dict[str, int]:
    """Module name -> rank of its LoRA; empty without an adapter."""
    down = [(name, weight) for name, weight in denoiser.named_parameters() if ".lora_A." in name]
    return {name.partition(".lora_A.")[0]: len(weight) for name, weight in down}


def unload_lora(denoiser: Denoiser) -> Denoiser:
    """The same network, without its adapter if it had one."""
    if lora_ranks(denoiser):
        denoiser.unload_lora()
    return denoiser


def load_lora(denoiser: Denoiser, file: Path, may_be_zero: bool = False) -> None:
    """Replaces the network's adapter, if it has one, by that of a file. Raises ValueError as `read_lora`."""
    weights = read_lora(file, denoiser, may_be_zero)
    ranks = checked_ranks(weights, denoiser, file)
    add_lora(unload_lora(denoiser), ranks)
    set_peft_model_state_dict(denoiser, weights)


def save_lora(denoiser: nn.Module, folder: Path) -> None:
    """Writes the network's adapter as diffusers reads it (`load_lora_weights`), under peft's names.

    diffusers' own converter would rename attention only, and its reader, which tells the format by the first name
    in the file, would then leave the attention out.
    """
    weights = {name: value.contiguous() for name, value in get_peft_model_state_dict(denoiser).items()}
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, weights)


# ---------------------------------------------------------------- files


def locate(text: str | Path) -> Path:
    """The LoRA file, or the folder of a denoiser, that is meant.

    Args:
        text: a safetensors file; a folder that holds one, or a denoiser, or a pipeline with `unet/`; here, or on the
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
    folders = [f for f in (path / "unet", path) if any(f.glob("diffusion_pytorch_model*.safetensors"))]
    found = [*known, *folders] or sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{source} holds several things to load, name one: {', '.join(f.name for f in found)}")
    pickled = sorted(file.name for file in path.rglob("*") if file.suffix in PICKLES)
    but = f", and pickles such as {pickled[0]} are never read" if pickled else ""
    raise FileNotFoundError(f"{source}: neither a LoRA nor a denoiser in safetensors here{but}")


def read_lora(file: Path, denoiser: Denoiser, may_be_zero: bool = False) -> dict[str, Tensor]:
    """The tensors of a LoRA, float32, under peft's names: `<module>.lora_A.weight` (r, ...) and `.lora_B.weight`.

    Where alpha differs from the rank r, B is multiplied by alpha / r, so that the scale is 1 everywhere.

    Raises:
        ValueError: a tensor fits nothing in the denoiser, belongs to a text encoder, is half of a pair, or the
            whole would change nothing.
    """
    tensors, alphas = _in_peft_names(file, denoiser)
    encoders = [name for name in tensors if name.startswith("text_encoder")]
    if encoders:
        raise ValueError(f"{file} also changes a text encoder ({encoders[0]}); only denoisers are tuned and compared")
    tensors = {name.removeprefix("unet."): value.float() for name, value in tensors.items()}
    alphas = {name.removeprefix("unet."): value for name, value in alphas.items()}
    for name, rank in checked_ranks(tensors, denoiser, file).items():
        tensors[f"{name}.lora_B.weight"] *= alphas.pop(name, rank) / rank
    if alphas:
        raise ValueError(f"{file}: an alpha for {next(iter(alphas))}, which has no weights")
    pairs = {name.partition(".lora_")[0] for name in tensors}
    moved = any(tensors[f"{p}.lora_A.weight"].any() and tensors[f"{p}.lora_B.weight"].any() for p in pairs)
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


def read_denoiser(folder: Path, like: Denoiser) -> Denoiser:
    """A whole denoiser, frozen, in the dtype and on the device of `like`, which it must equal in all but values.

    Raises:
        ValueError: it is another architecture, or weights are missing.
    """
    load: Callable[..., Any] = type(like).from_pretrained  # returns two things if `output_loading_info`
    network, info = load(folder, torch_dtype=like.dtype, use_safetensors=True, output_loading_info=True)
    wanted, found = ({name: tuple(value.shape) for name, value in m.state_dict().items()} for m in (like, network))
    odd = sorted({name for name, _ in wanted.items() ^ found.items()} | set(info["missing_keys"]))
    if odd:
        raise ValueError(
            f"{folder} does not fit the base model: {len(odd)} weights differ or are missing, first {odd[0]}"
        )
    check_finite(network.state_dict(), folder)
    return network.eval().requires_grad_(False).to(like.device)


def _fits(down: Tensor, up: Tensor, weight: Tensor) -> bool:
    pointwise = (1,) * (weight.ndim - 2)
    return down.shape[1:] == weight.shape[1:] and up.shape == (len(weight), len(down), *pointwise)


def _in_peft_names(file: Path, denoiser: Denoiser) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors and alphas as peft names them, those of the denoiser below `unet.` or nothing."""
    tensors = read_tensors(file)
    odd = [name for name in tensors if "dora" in name or "magnitude" in name]
    if odd:
        raise ValueError(f"{file}: {odd[0]} is of DoRA, which is not supported")
    given, alphas = len(tensors), _written_alpha(file)
    if next(iter(tensors), "").startswith("base_model.model."):
        tensors = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    tensors, kohya = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=denoiser.config)
    if len(tensors) + len(kohya or {}) != given:
        raise ValueError(f"{file}: {given} tensors, of which only {len(tensors) + len(kohya or {})} were understood")
    tensors = convert_unet_state_dict_to_peft(tensors)
    names = {name.partition(".lora_")[0] for name in tensors}
    of_kohya = convert_unet_state_dict_to_peft(kohya or {})
    return tensors, dict.fromkeys(names, alphas) if alphas else {_module(name): a for name, a in of_kohya.items()}


def _module(alpha_name: str) -> str:
    return alpha_name.removesuffix(".alpha").partition(".lora_")[0]


def _written_alpha(file: Path) -> float | None:
    """The one alpha that diffusers' metadata or peft's configuration give; None = each module's rank, or its own."""
    with safe_open(file, "pt") as opened:
        metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    config = {name.removeprefix("unet."): value for name, value in metadata.items()}
    if file.name == PEFT_FILE:
        if not (file.parent / PEFT_CONFIG).is_file():
            raise FileNotFoundError(f"{file}: its alpha is unknown without {PEFT_CONFIG} beside it")
        config = json.loads((file.parent / PEFT_CONFIG).read_text())
    odd = [name for name in ("use_rslora", "use_dora", "alpha_pattern") if config.get(name)]
    if odd:
        raise ValueError(f"{file}: a LoRA with {odd[0]} is not supported")
    return config.get("lora_alpha")


def _fetched(source: Source) -> Path:
    if source.commit is None:
        if not Path(source.place).exists():
            raise FileNotFoundError(f"{source}: no such file or folder")
        return Path(source.place)
    if source.inner.endswith((".safetensors", *PICKLES)):
        return fetch_file(source)
    network = ["config.json", *weight_files("diffusion_pytorch_model")]
    return fetch_folder(source, [ADAPTER_FILE, PEFT_FILE, PEFT_CONFIG, *network, *(f"unet/{name}" for name in network)])
