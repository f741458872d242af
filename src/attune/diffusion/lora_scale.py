"""The scale of an adapter: the places where files give alpha, and what makes one more than a plain LoRA.

A LoRA adds alpha / r times B A to a weight, r the rank of A and B. Files without any alpha mean alpha = r. diffusers
writes alpha as JSON into the file's header, peft into `adapter_config.json`, kohya a tensor per module and a text in
the header, other trainers one of these under another name. Two places that disagree are an error, not a choice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

from attune.weights import read_json

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' key of a header
MOST_ALPHA = 1e6  # published ones go to some thousands
_OF_THE_ADAPTER = r"(?:ss|unet|transformer|lora|network|adapter|peft|config|linear|conv|[\W_])*"
_ALPHA_KEY = re.compile(rf"{_OF_THE_ADAPTER}alpha")
_SCALE_KEY = re.compile(rf"{_OF_THE_ADAPTER}(?:scale|scaling|scaling_?factor|multiplier|strength)")
_LIKE_ALPHA = re.compile(r"alphas?$|(?:lora|network)[\W_]*alpha")
NOT_OF_THE_DENOISER = re.compile(  # keys of text encoders, and of the pictures trained on, whose tags are any words
    r"text_encoder|te\d?[_.]|ss_(tag_frequency|datasets|dataset_dirs|reg_dataset_dirs|bucket_info)"
)
RANK_KEYS = ("r", "lora_r", "lora_rank", "rank", "ss_network_dim", "network_dim")
MORE_THAN_LORA = (  # settings of peft under which A and B at alpha / r are not the whole adapter
    "use_rslora",
    "rs_lora",
    "rslora",
    "use_dora",
    "dora",
    "dora_wd",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
OTHER_STARTS = ("loftq_config", "corda_config", "lora_ga_config")  # what `init_lora_weights` would name
KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")  # `init_lora_weights`; others change it


@dataclass(frozen=True)
class Claim:
    """What one place says of alpha and rank; patterns are peft's, module name -> value, before the general value."""

    place: str
    alpha: float | None
    rank: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    of_all: bool = True  # False: a header of kohya, which gives one value although convolutions may have another

    def alpha_of(self, module: str) -> float | None:
        return self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), module), self.alpha)

    def rank_of(self, module: str) -> float | None:
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module), self.rank)


def claims(header: Mapping[str, str], file: Path, required: bool) -> list[Claim]:
    """What a file's header and the configuration beside it say.

    Args:
        required: the tensors are named as peft names them, whose files never hold their alpha.

    Raises:
        ValueError: naming the file, if the adapter is more than a LoRA, or what is said cannot be read.
        FileNotFoundError: alpha is required and nowhere.
    """
    found = list(_header_claims(header, file))
    beside = file.parent / PEFT_CONFIG
    alone = len(list(file.parent.glob("*.safetensors"))) == 1
    if beside.is_file() and (required or alone):
        found.append(_config_claim(read_json(beside), str(beside), PEFT_CONFIG))
    elif required and not any(claim.alpha is not None for claim in found):
        raise FileNotFoundError(f"{file}: its alpha is unknown without {PEFT_CONFIG} beside it")
    return found


def scales(ranks: Mapping[str, int], alphas: Mapping[str, float], said: list[Claim], file: Path) -> dict[str, float]:
    """alpha / r of every module.

    Args:
        ranks: of the tensors, by module.
        alphas: those that are tensors of the file, by module.
        said: of the header and the configuration.

    Raises:
        ValueError: naming the file and both values, if two places disagree with each other or with the tensors.
    """
    for module, value in alphas.items():
        _alpha(value, f"{file}: the alpha of {module}")
    for claim in said:
        _check_ranks(claim, ranks, file)
        known = {alphas[module] for module in ranks if module in alphas}
        if not claim.of_all and known and claim.alpha not in (None, *known):
            raise ValueError(f"{file}: {claim.place} says alpha {claim.alpha:g}, its tensors {min(known):g}")
    found = {}
    for module, rank in ranks.items():
        places = {f"the tensor of {module}": alphas[module]} if module in alphas else {}
        for claim in said:
            if (alpha := claim.alpha_of(module)) is not None and (claim.of_all or module not in alphas):
                places[claim.place] = alpha
        if len(set(places.values())) > 1:
            one, other, *_ = sorted(places.items(), key=lambda place: place[1])
            other = next(place for place in places.items() if place[1] != one[1])
            raise ValueError(
                f"{file}: the alpha of {module} is {one[1]:g} in {one[0]} and {other[1]:g} in {other[0]}: which is it?"
            )
        found[module] = next(iter(places.values()), rank) / rank
    return found


def _check_ranks(claim: Claim, ranks: Mapping[str, int], file: Path) -> None:
    wrong = [(m, r, said) for m, r in ranks.items() if (said := claim.rank_of(m)) is not None and said != r]
    if wrong and (claim.of_all or len(wrong) == len(ranks)):
        module, rank, said = wrong[0]
        raise ValueError(f"{file}: {claim.place} says rank {said:g}, the tensors of {module} have rank {rank}")


# ---------------------------------------------------------------- what is written


def _header_claims(header: Mapping[str, str], file: Path) -> Iterator[Claim]:
    """What a header and the JSON objects in it, however deep, say under any of the names that trainers give it."""
    for place, block in _blocks(header, file):
        of_denoiser = {name: value for name, value in block.items() if not NOT_OF_THE_DENOISER.match(name)}
        values = {name.removeprefix("unet.").removeprefix("transformer."): v for name, v in of_denoiser.items()}
        _refuse_more(values, str(file))
        whole = bool(place and values) and (place == METADATA or "lora_alpha" in values)
        if whole:
            yield _config_claim(values, str(file), place)
        rest = {name: value for name, value in values.items() if not (whole and name in ("lora_alpha", "r"))}
        yield from _plain_claims(rest, f"{place}." if place else "", file)


def _plain_claims(values: Mapping[str, Any], start: str, file: Path) -> Iterator[Claim]:
    """One claim of each alpha and rank among the values of one object, whose place begins its keys.

    Raises:
        ValueError: a key looks as if it gave an alpha or a scale, and is not understood.
    """
    alphas = {name for name in values if _ALPHA_KEY.fullmatch(name.lower())}
    for name, value in values.items():
        key, place = name.lower(), f"{start}{name}"
        if name in alphas and (number := _alpha(value, f"{file}: {place}")) is not None:
            if "conv" in key and len(alphas) == 1:
                raise ValueError(f"{file}: {place} is the alpha of convolutions alone, which is not supported")
            yield Claim(place, number, of_all=False)
        elif key in RANK_KEYS and (alphas or not start) and (number := _number(value, f"{file}: {place}")) is not None:
            yield Claim(place, None, number, of_all=False)
        elif _SCALE_KEY.fullmatch(key) and _number(value, f"{file}: {place}") not in (None, 1):
            raise ValueError(f"{file}: {place} {value!r:.40} of its header is not understood; a scale is read as alpha")
        elif name not in alphas and name != "alpha_pattern" and _LIKE_ALPHA.search(key) and _plain(value) is not None:
            raise ValueError(f"{file}: {place} of its header looks like an alpha and is not understood")


def _blocks(header: Mapping[str, str], file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every JSON object of a header with its place, also those inside texts: the header itself first, at ""."""
    left: list[tuple[str, Any]] = [("", dict(header))]
    while left:
        place, value = left.pop(0)
        if isinstance(value, dict):
            yield place, value
            inner = {name: v for name, v in value.items() if not NOT_OF_THE_DENOISER.match(name)}
            patterns = ("alpha_pattern", "rank_pattern")  # their keys are names of modules
            left += [(f"{place}.{n}" if place else n, v) for n, v in inner.items() if not n.endswith(patterns)]
        elif isinstance(value, list):
            left += [(place, item) for item in value]
        elif place == METADATA or (isinstance(value, str) and value.lstrip().startswith(("{", "["))):
            left += _parsed(value, place, file)


def _config_claim(config: Mapping[str, Any], file: str, place: str) -> Claim:
    """What a configuration of peft says."""
    _refuse_more(config, file)
    alpha = _alpha(config.get("lora_alpha"), f"{file}: lora_alpha")
    if alpha is None:
        raise ValueError(f"{file}: {place} gives no lora_alpha")
    alphas, ranks = (_pattern(config, name, file) for name in ("alpha_pattern", "rank_pattern"))
    return Claim(place, alpha, _number(config.get("r"), f"{file}: r"), alphas, ranks)


def _pattern(config: Mapping[str, Any], name: str, file: str) -> dict[str, float]:
    """Values by module name, or by the part of one that peft compares as a regular expression."""
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{file}: {name} is a {type(pattern).__name__}, not module names with their values")
    for module in pattern:
        try:
            re.compile(module)
        except re.error as error:
            raise ValueError(f"{file}: {name}: {module!r:.80} is no pattern: {error}") from error
    read = _alpha if name == "alpha_pattern" else _number
    numbers = {module: read(value, f"{file}: {name}: {module:.80}") for module, value in pattern.items()}
    return {module: number for module, number in numbers.items() if number is not None}


def _refuse_more(config: Mapping[str, Any], file: str) -> None:
    """Raises ValueError if A and B alone, on the base model as it is published, would not be this adapter."""
    kind = _plain(config.get("peft_type"))
    if kind not in (None, "LORA"):
        raise ValueError(f"{file}: an adapter of peft_type {kind!r:.40} is not supported, only LORA")
    said = {name: _plain(value) for name, value in config.items() if name in (*MORE_THAN_LORA, "bias")}
    odd = [name for name, value in said.items() if value and (name, value) != ("bias", "none")]
    if odd:
        raise ValueError(f"{file}: a LoRA with {odd[0]} is not supported")
    other = [name for name in OTHER_STARTS if _plain(config.get(name))]
    if other and "init_lora_weights" not in config:
        raise ValueError(f"{file}: {other[0]} without init_lora_weights leaves open whether the base model was changed")
    start = _plain(config.get("init_lora_weights"))
    start = start.lower() if isinstance(start, str) else start
    if start not in KEEP_THE_BASE:
        raise ValueError(
            f"{file}: init_lora_weights {start!r:.40} changed the base model's own weights, which are not in the file; "
            "peft turns it into a plain LoRA (save_pretrained, path_initial_model_for_weight_conversion)"
        )


def _plain(value: Any) -> Any:
    """A value of a header, where everything is text, as JSON would have it."""
    words = {"true": True, "false": False, "none": None, "null": None, "": None, "[]": None, "{}": None, "0": False}
    return words.get(value.strip().lower(), value) if isinstance(value, str) else value


def _parsed(text: Any, place: str, file: Path) -> list[tuple[str, Any]]:
    """The JSON in a text of a header; nothing if it is none, unless it should be, or seems to give an alpha."""
    try:
        values = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        if place != METADATA and "alpha" not in text.lower():
            return []
        raise ValueError(f"{file}: {place} of its header is not JSON: {error}") from error
    if place == METADATA and not isinstance(values, dict):
        raise ValueError(f"{file}: {place} of its header is a {type(values).__name__}, not a JSON object")
    return [(place, values)]


def _alpha(value: Any, where: str) -> float | None:
    """An alpha as `_number` reads it. Raises ValueError if it is not above 0, or beyond all reason."""
    number = _number(value, where)
    if number is not None and not 0 < number <= MOST_ALPHA:
        raise ValueError(f"{where} is {number:g}; an alpha is above 0 and at most {MOST_ALPHA:g}")
    return number


def _number(value: Any, where: str) -> float | None:
    """A finite number, also one that is written as text; None = nothing is said, as kohya's resized files have it."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "dynamic")):
        return None
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} is {value!r:.40}, not a number")
    return number
