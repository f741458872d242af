"""Networks and tokenizers from their files, which must be complete.

diffusers and transformers only warn where weights are missing, and make an empty tokenizer where its files are missing:
here both are errors. The libraries are handed local folders that `attune.hub` has fetched, so what is pinned is read.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from attune.hub import Source, check_finite, damage, fetch_folder, refusal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

M = TypeVar("M", bound="nn.Module")
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "config.json")


def build_with(build: Callable[[], M], tensors: Mapping[str, Tensor], source: str | Path) -> M:
    """The module `build` makes, holding these very tensors: one copy in memory, and no time for random ones.

    Args:
        build: makes the module; called where tensors have shapes but no memory.
        tensors: all its parameters and saved buffers, of the right dtype.
        source: named in errors.

    Raises:
        ValueError: naming missing and unexpected tensors.
    """
    import torch

    with torch.device("meta"):
        module = build()
    missing, unexpected = module.load_state_dict(tensors, strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(f"{source} does not fit: {misfit(missing, unexpected)}")
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta and name != "position_ids":
                raise NotImplementedError(f"buffer {name} of {type(part).__name__} is not in {source}")
            if buffer.is_meta:  # 0, 1, 2, ...: transformers does not save them
                setattr(part, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module


def misfit(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """What is wrong with a set of tensors, in one line however many they are."""
    return f"missing {_some(missing)}, unexpected {_some(unexpected)}"


def _some(names: Iterable[str], most: int = 6) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{names[:most]}{more}"


def weight_files(stem: str, variant: str | None = None, ending: str = "safetensors") -> list[str]:
    """Patterns of one network's files as diffusers and transformers name them, whole or in shards."""
    if variant is None:
        return [f"{stem}.{ending}", f"{stem}-?????-of-?????.{ending}", f"{stem}.{ending}.index.json"]
    shards = [f"{stem}.{variant}-?????-of-?????.{ending}", f"{stem}-?????-of-?????.{variant}.{ending}"]
    return [f"{stem}.{variant}.{ending}", *shards, f"{stem}.{ending}.index.{variant}.json"]


def load_pretrained(
    kind: type[Any],
    source: Source,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    strict: bool = False,
) -> Any:
    """A network of diffusers or transformers, frozen and in evaluation mode.

    Args:
        strict: the file must hold exactly this network: unexpected tensors are errors as well. Then it may also be a
            pickle of tensors alone, as scorers are often released.

    Raises:
        ValueError: weights are missing (the libraries would only warn, and draw random ones), have another shape, are
            not finite, or the file is a pickle that holds more than tensors.
        FileNotFoundError: there is no such folder, or no weights in it that are read.
        HubError: it could not be downloaded.
    """
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    of_transformers = issubclass(kind, PreTrainedModel)
    stem = "model" if of_transformers else "diffusion_pytorch_model"
    wanted = weight_files(stem, variant)
    folder = fetch_folder(source, ["config.json", *wanted])
    pickled = not any(file for pattern in wanted for file in folder.glob(pattern))
    if pickled and strict:
        folder = fetch_folder(source, ["config.json", *weight_files("pytorch_model", variant, "bin")])
    if not (folder / "config.json").is_file() or (pickled and not (strict and any(folder.glob("pytorch_model*")))):
        raise FileNotFoundError(f"{source}: config.json and {wanted[0]} are not both there; pickles are not read")
    options = {"dtype" if of_transformers else "torch_dtype": dtype, "variant": variant, "output_loading_info": True}
    options |= {"weights_only": True} if pickled else {"use_safetensors": True}
    try:
        module, info = kind.from_pretrained(folder, **options)
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(source)) from error
    except SafetensorError as error:
        files = [file for pattern in wanted for file in folder.glob(pattern)]
        raise ValueError(damage(files[0], error) if len(files) == 1 else f"{source} is damaged: {error}") from error
    missing = [*info["missing_keys"], *map(str, info["mismatched_keys"])]
    unexpected = info["unexpected_keys"] if strict else []
    if missing or unexpected:
        raise ValueError(f"{source} does not fit: {misfit(missing, unexpected)}")
    module = module.eval().requires_grad_(False).to(device)
    check_finite(module.state_dict(), source)
    return module


def load_tokenizer(kind: type[Any], source: Source) -> Any:
    """A tokenizer of transformers, which would answer with an empty one where its files are not there.

    Raises:
        FileNotFoundError: there is no such folder, or its vocabulary is missing or empty.
        ValueError: its files cannot be read.
        HubError: it could not be downloaded.
    """
    folder = fetch_folder(source, TOKENIZER_FILES)
    parts = [name for name in kind.vocab_files_names.values() if name != "tokenizer.json"]
    there = (folder / "tokenizer.json").is_file() or all((folder / part).is_file() for part in parts)
    try:
        tokenizer = kind.from_pretrained(folder) if there else None
    except Exception as error:  # the tokenizers library raises plain ones
        raise ValueError(f"{source}: its tokenizer cannot be read: {error}") from error
    if tokenizer is None or set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise FileNotFoundError(f"{source}: no vocabulary; a tokenizer needs tokenizer.json, or {' and '.join(parts)}")
    return tokenizer
