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
ALPHA_KEYS = ("lora_alpha", "ss_network_alpha", "network_alpha", "alpha")
RANK_KEYS = ("r", "lora_r", "lora_rank", "rank", "ss_network_dim", "network_dim")
MORE_THAN_LORA = (  # settings of peft under which A and B at alpha / r are not the whole adapter
    "use_rslora",
    "use_dora",
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
    values = {name.removeprefix("unet."): text for name, text in header.items()}
    _refuse_more(values, str(file))
    for name, text in values.items():
        if name in ALPHA_KEYS and (number := _number(text, f"{file}: {name}")) is not None:
            yield Claim(name, number, of_all=False)
        elif name in RANK_KEYS and (number := _number(text, f"{file}: {name}")) is not None:
            yield Claim(name, None, number, of_all=False)
        elif name == "lora_adapter_metadata" or (text.startswith("{") and '"lora_alpha"' in text):
            config = _parsed(text, f"{file}: {name}")
            of_unet = {key.removeprefix("unet."): v for key, v in config.items() if not key.startswith("text_encoder")}
            if of_unet:
                yield _config_claim(of_unet, str(file), name)


def _config_claim(config: Mapping[str, Any], file: str, place: str) -> Claim:
    """What a configuration of peft says."""
    kind = config.get("peft_type")
    if kind not in (None, "LORA"):
        raise ValueError(f"{file}: an adapter of peft_type {kind!r:.40} is not supported, only LORA")
    _refuse_more(config, file)
    alpha = _number(config.get("lora_alpha"), f"{file}: lora_alpha")
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
    numbers = {module: _number(value, f"{file}: {name}") for module, value in pattern.items()}
    return {module: number for module, number in numbers.items() if number is not None}


def _refuse_more(config: Mapping[str, Any], file: str) -> None:
    """Raises ValueError if A and B alone, on the base model as it is published, would not be this adapter."""
    said = {name: _plain(value) for name, value in config.items() if name in (*MORE_THAN_LORA, "bias")}
    odd = [name for name, value in said.items() if value and (name, value) != ("bias", "none")]
    if odd:
        raise ValueError(f"{file}: a LoRA with {odd[0]} is not supported")
    start = _plain(config.get("init_lora_weights"))
    start = start.lower() if isinstance(start, str) else start
    if start not in KEEP_THE_BASE:
        raise ValueError(
            f"{file}: init_lora_weights {start!r:.40} changed the base model's own weights, which are not in the file; "
            "peft turns it into a plain LoRA (save_pretrained, path_initial_model_for_weight_conversion)"
        )


def _plain(value: Any) -> Any:
    """A value of a header, where everything is text, as JSON would have it."""
    words = {"true": True, "false": False, "none": None, "null": None, "": None, "[]": None, "{}": None}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} of its header is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} of its header is a {type(values).__name__}, not a JSON object")
    return values


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
