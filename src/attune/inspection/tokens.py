"""How long prompts are for the base model: counted by its tokenizers alone, without any weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from attune.backbones import _t5
from attune.config import plugins
from attune.config.settings import Model
from attune.hub import fetch_folder, parse
from attune.pretrained import load_tokenizer
from attune.weights import read_json

TOKEN_CHARS = 256  # no token of CLIP's is longer, so so many per position tell whether a prompt is cut
POSITIONS = 77  # of a CLIP text encoder that does not say
BATCH = 1000  # prompts at a time


@dataclass(frozen=True)
class Lengths:
    """Tokens of each prompt (n,), the most that the encoder reads, and whether words stand for tokens."""

    counts: np.ndarray
    limit: int
    are_words: bool

    @property
    def unit(self) -> str:
        return "words" if self.are_words else "tokens"

    @property
    def cut(self) -> int:
        """Prompts whose end the encoder does not read; of words that is not known, and 0."""
        return 0 if self.are_words else int((self.counts > self.limit).sum())


def lengths(prompts: Sequence[str], model: Model) -> Lengths:
    """Lengths of prompts; of several encoders the one that cuts most. Words, where a tokenizer cannot be had."""
    try:
        limits, counts = zip(*_by_encoder(prompts, model), strict=True)
    except (OSError, ValueError):
        words = np.array([len(prompt[: POSITIONS * TOKEN_CHARS].split()) for prompt in prompts], dtype=int)
        return Lengths(words, POSITIONS, are_words=True)
    over = np.stack([count - limit for limit, count in zip(limits, counts, strict=True)])
    return Lengths(over.max(axis=0) + min(limits), min(limits), are_words=False)


def _by_encoder(prompts: Sequence[str], model: Model) -> Iterator[tuple[int, np.ndarray]]:
    """Positions of each text encoder, and tokens (n,) of the prompts with those for beginning and end.

    Where there is a T5 it is the only one: it reads what CLIPs leave off.
    """
    from transformers import CLIPTokenizer

    source, module = parse(model.path), plugins.load("backbones", model.backbone)
    if hasattr(module, "token_counts"):  # of a base model without a CLIP
        limit, found = module.token_counts(prompts, model)
        yield limit, np.array(found, dtype=int)
        return
    parts = [place.stem for place, _ in module.downloads(model) if place.stem.startswith("text_encoder")]
    configs = {part: read_json(fetch_folder(source / part, ["config.json"]) / "config.json") for part in parts}
    t5s = {part: config for part, config in configs.items() if config.get("model_type") == "t5"}
    for part, config in (t5s or configs).items():
        place = source / part.replace("text_encoder", "tokenizer")
        if t5s:
            tokenizer, limit = _t5.read_tokenizer(place), _t5.tokens(model, module.T5_TOKENS)
        else:
            tokenizer = load_tokenizer(CLIPTokenizer, place)
            limit = config.get("max_position_embeddings", POSITIONS)
        counts: list[int] = []
        for start in range(0, len(prompts), BATCH):
            some = [" ".join(prompt.split())[: limit * TOKEN_CHARS] for prompt in prompts[start : start + BATCH]]
            counts += map(len, tokenizer(some, truncation=False, verbose=False).input_ids)
        yield limit, np.array(counts, dtype=int)
