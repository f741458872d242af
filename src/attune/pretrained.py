"""Networks and tokenizers in the layout of diffusers and transformers, whole or not at all.

Both libraries only warn where weights are missing, and answer with an empty tokenizer where its files are: here these
are errors. They are handed local folders that `attune.hub` has fetched, so what is pinned is what is read.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from attune.hub import Source, check_finite, damage, fetch_folder, misfit, refusal

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "config.json")


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
    whole: bool = False,
) -> Any:
    """A network of diffusers or transformers, frozen and in evaluation mode.

    Args:
        whole: the file must hold exactly this network: unexpected tensors are errors as well. Then it may also be a
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
    if pickled and whole:
        folder = fetch_folder(source, ["config.json", *weight_files("pytorch_model", variant, "bin")])
    if not (folder / "config.json").is_file() or (pickled and not (whole and any(folder.glob("pytorch_model*")))):
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
    unexpected = info["unexpected_keys"] if whole else []
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
