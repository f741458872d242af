"""Networks and tokenizers from their files, which must be complete and fit each other.

diffusers and transformers only warn where weights are missing, and make an empty tokenizer where its files are missing:
here both are errors. The libraries are handed local folders that `attune.hub` has fetched, so what is pinned is read.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from attune.hub import Source, fetch_folder
from attune.weights import check_there, check_weights_files, nonfinite_name, read_json, refusal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

M = TypeVar("M", bound="nn.Module")
TOKENIZER_FILES = (
    *("tokenizer*", "vocab.*", "merges.txt", "spiece.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "config.json"),
)


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
            not finite, or a file is no such file or a pickle that holds more than tensors.
        FileNotFoundError: there is no such folder, or no weights in it that are read.
        HubError: it could not be downloaded.
    """
    from transformers import PreTrainedModel

    of_transformers = issubclass(kind, PreTrainedModel)
    stem = "model" if of_transformers else "diffusion_pytorch_model"
    files, pickled = _network_files(source, stem, variant, or_pickles=strict)
    check_weights_files(files)
    _check_config(files[0].with_name("config.json"), kind)
    options = {"dtype" if of_transformers else "torch_dtype": dtype, "variant": variant, "output_loading_info": True}
    options |= {"weights_only": True} if pickled else {"use_safetensors": True}
    try:
        module, info = kind.from_pretrained(files[0].parent, **options)
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(source)) from error
    except Exception as error:  # a lost shard, shapes that differ, settings of wrong types: all fail in other ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise ValueError(f"{source} cannot be read: {reason}") from error
    missing = [*info["missing_keys"], *map(str, info["mismatched_keys"])]
    unexpected = info["unexpected_keys"] if strict else []
    if missing or unexpected:
        raise ValueError(f"{source} does not fit: {misfit(missing, unexpected)}")
    check_network(module, files)
    return module.eval().requires_grad_(False).to(device)


def _network_files(source: Source, stem: str, variant: str | None, or_pickles: bool) -> tuple[list[Path], bool]:
    """The files of a network's weights, and whether they are pickles, which are looked for where it has no others."""
    for name, ending in ((stem, "safetensors"), ("pytorch_model", "bin"))[: 1 + or_pickles]:
        patterns = weight_files(name, variant, ending)
        folder = fetch_folder(source, ["config.json", *patterns])
        files = sorted(file for pattern in patterns for file in folder.glob(pattern))
        if files:
            break
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{source}: there is no config.json")
    weights = [file for file in files if file.suffix != ".json"]
    whole = any(file.name == weight_files(name, variant, ending)[0] for file in weights)
    for index in (file for file in files if file.suffix == ".json" and not whole):
        lost = set(read_json(index).get("weight_map", {}).values()) - {file.name for file in weights}
        if lost:
            raise FileNotFoundError(f"{source}: there is no {min(lost)}, which {index.name} names")
    if not weights:
        there = sorted(file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin"))
        but = f", only {there[0]} (a variant is read by its name, a pickle never)" if there else ""
        raise FileNotFoundError(f"{source}: there is no {weight_files(stem, variant)[0]}{but}")
    return weights, weights[0].suffix == ".bin"


def _check_config(file: Path, kind: type[Any]) -> None:
    """Raises ValueError if a configuration is another network's, or none: diffusers would use defaults in its place."""
    config = read_json(file)
    described = config.get("_class_name") or config.get("architectures") or config.get("model_type")
    if described is None:
        raise ValueError(f"{file} does not describe a network: it has neither _class_name nor model_type")
    if config.get("_class_name") not in (None, kind.__name__):
        raise ValueError(f"{file} describes a {config['_class_name']!s:.60}, not a {kind.__name__}")
    if config.get("quantization_config"):
        raise ValueError(f"{file}: quantised weights (quantization_config) are not supported")
    if config.get("_class_name") is None:
        _check_architecture(config, file, kind)


def _check_architecture(config: Mapping[str, Any], file: Path, kind: type[Any]) -> None:
    """Raises ValueError if a configuration of transformers is of another family: a CLIP's may be of both its halves."""
    own = kind.config_class.model_type if hasattr(kind.config_class, "model_type") else ""
    family = own.partition("_")[0]
    said = config.get("model_type")
    if said not in (None, family, own):
        raise ValueError(f"{file}: model_type {said!r:.60} is not that of a {kind.__name__}, {own}")
    names = config.get("architectures") or []
    odd = [name for name in (names if isinstance(names, list) else [names]) if not _is_of(name, family)]
    if odd:
        raise ValueError(f"{file}: architectures names a {odd[0]!r:.60}, not a {kind.__name__}")


def _is_of(name: Any, family: str) -> bool:
    return isinstance(name, str) and name.lower().startswith(family)


def check_network(module: nn.Module, files: Iterable[Path]) -> None:
    """Raises ValueError naming file and tensor if a network that was read from files has values that are not finite."""
    name = nonfinite_name(module.state_dict())
    if name is None:
        return
    from safetensors import safe_open

    for file in files:
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            stored = [key for key in names if key == name or key.endswith(f".{name}") or name.endswith(f".{key}")]
            if stored and nonfinite_name({"": opened.get_tensor(stored[0])}) is None:
                dtype = str(module.state_dict()[name].dtype).removeprefix("torch.")
                raise ValueError(f"{file}: {name} is not finite in {dtype}, only as stored: set another dtype")
            if stored:
                raise ValueError(f"{file}: {name} holds values that are not finite (NaN or infinity)")
    raise ValueError(f"{next(iter(files))}: {name} holds values that are not finite (NaN or infinity)")


# ---------------------------------------------------------------- tokenizers


def load_tokenizer(kind: type[Any], source: Source) -> Any:
    """A tokenizer of transformers, which would answer with an empty one where its files are not there.

    Raises:
        FileNotFoundError: there is no such folder, or its vocabulary is missing or empty.
        ValueError: its files cannot be read, or it makes the same tokens of different words.
        HubError: it could not be downloaded.
    """
    folder = fetch_folder(source, TOKENIZER_FILES)
    for file in sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}):
        read_json(file) if file.suffix == ".json" else check_there(file)
    parts = [name for name in kind.vocab_files_names.values() if name != "tokenizer.json"]
    there = (folder / "tokenizer.json").is_file() or all((folder / part).is_file() for part in parts)
    nothing = f"{source}: no vocabulary; a tokenizer needs tokenizer.json, or {' and '.join(parts)}"
    if not there:
        raise FileNotFoundError(nothing)
    try:
        tokenizer: Any = kind.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain ones
        raise ValueError(f"{source}: its tokenizer cannot be read: {error}") from error
    _check_lengths(tokenizer, source)
    words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    if not words:
        raise FileNotFoundError(nothing)
    texts = [tokenizer.convert_tokens_to_string([word]).strip() for word in words[:: max(1, len(words) // 50)]]
    if len({frozenset(tokenizer(text).input_ids) - {*tokenizer.all_special_ids} for text in texts}) == 1:
        raise ValueError(f"{source}: its tokenizer makes the same tokens of every word, among them {texts[:3]}")
    return tokenizer


def _check_lengths(tokenizer: Any, source: Source) -> None:
    """Raises ValueError unless a tokenizer can pad and cut texts at their ends, and tells its words apart."""
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or length < 1 or length % 1 != 0:
        raise ValueError(f"{source}: model_max_length of its tokenizer is {length!r:.40}, not a number of tokens")
    for name in ("padding_side", "truncation_side"):
        if (side := getattr(tokenizer, name)) != "right":
            raise ValueError(f"{source}: {name} of its tokenizer is {side!r:.40}; only right is supported")
    if tokenizer.pad_token is None:
        raise ValueError(f"{source}: its tokenizer has no pad_token to fill short texts with")
    words: dict[int, str] = {}
    for word, number in tokenizer.get_vocab().items():
        if (other := words.setdefault(number, word)) != word:
            raise ValueError(f"{source}: {other!r:.40} and {word!r:.40} of its tokenizer are both token {number}")


def check_tokenizer(tokenizer: Any, vocabulary: int, source: str | Path | Source) -> None:
    """Raises ValueError unless a tokenizer's ids are those that a text encoder of so many tokens has vectors for.

    A tokenizer that lacks its start and end tokens is found too: transformers appends them to the vocabulary.
    """
    found = max(tokenizer.get_vocab().values()) + 1
    if found != vocabulary:
        raise ValueError(f"{source}: a tokenizer of {found} tokens for a model of {vocabulary}")
    ids = tokenizer("a").input_ids
    bos, eos = (
        (tokenizer.cls_token_id, tokenizer.sep_token_id)
        if tokenizer.bos_token_id is None
        else (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    if len(ids) < 2 or (ids[0], ids[-1]) != (bos, eos) or bos == eos:
        raise ValueError(f"{source}: its tokenizer does not put a text between a start and an end token")


def check_clip_tokenizer(tokenizer: Any, text: Any, source: str | Path | Source) -> None:
    """`check_tokenizer` for a CLIP's text configuration, and raises ValueError if features would be read elsewhere.

    transformers reads a text's feature at the configured end token, or at the highest id if that is 2, as older files
    have it; the tokenizer must end its texts with that very token.
    """
    check_tokenizer(tokenizer, text.vocab_size, source)
    end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    if tokenizer.eos_token_id != end:
        raise ValueError(
            f"{source}: its tokenizer ends texts with token {tokenizer.eos_token_id}, the model with {end}"
        )
