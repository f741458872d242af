"""T5, which Stable Diffusion 3 (as its third text encoder) and FLUX read a prompt with.

The pipelines give it no mask, and show the denoiser its output for the padding too: nothing of it can be left out.

Source: Raffel et al. 2020, arXiv:1910.10683, the encoder alone; diffusers' `_get_t5_prompt_embeds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attune.backbones import _latent
from attune.config.settings import Model
from attune.hub import Source, fetch_folder, parse
from attune.pretrained import TOKENIZER_FILES, load_pretrained, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5Tokenizer

TOKENS_AT_ONCE = 4096  # 8 prompts of 512, whose attention takes 1 GB where no kernel fuses its bias by position
WEIGHTS = 4_762_310_656
"""Of T5 1.1 XXL's encoder, which both have."""


def load(model: Model, number: str, length: int, device: torch.device) -> tuple[T5Tokenizer, PreTrainedModel]:
    """A tokenizer and its encoder, which must fit each other; `encode` takes both, `_latent.is_cut` the tokenizer.

    Args:
        number: what their folders' names end in.
        length: tokens of each prompt, unless `model.max_sequence_length` says otherwise.

    Raises:
        ValueError: they do not fit each other, or as `load_tokenizer` and `load_pretrained`.
        FileNotFoundError: as these.
    """
    from transformers import T5EncoderModel

    source, place = parse(model.path), parse(model.path) / f"tokenizer{number}"
    tokenizer = read_tokenizer(place)
    dtype = getattr(torch, model.dtype)
    encoder = load_pretrained(T5EncoderModel, source / f"text_encoder{number}", dtype, device, model.variant)
    _check(tokenizer, encoder.config, place)
    tokenizer.model_max_length = tokens(model, length)
    return tokenizer, encoder


def encode(
    tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, prompts: Sequence[str], device: torch.device
) -> Tensor:
    """The last hidden states (B, L, D) of any number of prompts."""
    ids = _latent.tokenise(tokenizer, prompts, device)
    parts = ids.split(max(1, TOKENS_AT_ONCE // ids.shape[1]))
    return torch.cat([encoder(part).last_hidden_state for part in parts])


def read_tokenizer(place: Source) -> T5Tokenizer:
    """The tokenizer in a folder, from tokenizer.json or the file of its authors, spiece.model."""
    from transformers import T5Tokenizer

    folder = fetch_folder(place, TOKENIZER_FILES)
    alone = (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file()
    if alone and find_spec("sentencepiece") is None:
        raise FileNotFoundError(f"{place}: there is no tokenizer.json; spiece.model needs the package sentencepiece")
    tokenizer: T5Tokenizer = load_tokenizer(T5Tokenizer, place)
    return tokenizer


def tokens(model: Model, length: int) -> int:
    """How many tokens of a prompt are read, padding included; `length` is diffusers' default."""
    return length if model.max_sequence_length is None else model.max_sequence_length


def _check(tokenizer: Any, config: Any, place: Source) -> None:
    """Raises ValueError unless a tokenizer's ids are ones that the encoder has vectors for, and mean the same to it."""
    most = max(tokenizer.get_vocab().values())
    if most >= config.vocab_size:  # published ones have fewer: the encoder's number is rounded up
        raise ValueError(f"{place}: a tokenizer of {most + 1} tokens for a model of {config.vocab_size}")
    for name, ours in (("eos", tokenizer.eos_token_id), ("pad", tokenizer.pad_token_id)):
        if (theirs := getattr(config, f"{name}_token_id")) != ours:
            raise ValueError(f"{place}: {name}_token is {ours} to the tokenizer and {theirs} to the model")
    if tokenizer("a").input_ids[-1] != config.eos_token_id:
        raise ValueError(f"{place}: its tokenizer does not end a text with its end token")
