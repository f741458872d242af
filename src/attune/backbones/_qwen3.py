"""Qwen3, a language model that reads prompts: its tokenizer, which puts them into a chat, and its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from attune.backbones._latent import MAX_TOKEN_CHARS
from attune.config.settings import Model
from attune.hub import parse
from attune.pretrained import load_pretrained, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2Tokenizer


def load(model: Model, device: torch.device) -> tuple[Qwen2Tokenizer, PreTrainedModel]:
    """Tokenizer and language model. Raises ValueError if they do not fit each other; or as `load_pretrained`."""
    from transformers import Qwen3Model

    source, tokenizer = parse(model.path), read_tokenizer(model)
    encoder = load_pretrained(Qwen3Model, source / "text_encoder", getattr(torch, model.dtype), device, model.variant)
    words, known = max(tokenizer.get_vocab().values()) + 1, encoder.config.vocab_size
    if words > known:  # fewer are right: the model has room for 267 tokens that its tokenizer never makes
        raise ValueError(f"{source / 'tokenizer'}: a tokenizer of {words} tokens for a model of {known}")
    return tokenizer, encoder


def read_tokenizer(model: Model) -> Qwen2Tokenizer:
    """The tokenizer. Raises ValueError if prompts cannot be put into its chat template; or as `load_tokenizer`."""
    from transformers import Qwen2Tokenizer

    source = parse(model.path) / "tokenizer"
    tokenizer: Qwen2Tokenizer = load_tokenizer(Qwen2Tokenizer, source)
    try:
        (text,) = as_chat(tokenizer, ["a red fox"])
    except Exception as error:  # there is none, or it is no template of jinja's
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{source}: its chat template cannot be used: {reason}") from error
    if "a red fox" not in text:
        raise ValueError(f"{source}: its chat template leaves out the prompt")
    return tokenizer


def as_chat(tokenizer: Qwen2Tokenizer, prompts: Sequence[str]) -> list[str]:
    """Each prompt as what a user says to the model, up to where the model's answer would begin."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    return [str(tokenizer.apply_chat_template(chat, **options)) for chat in chats]


def count_tokens(tokenizer: Qwen2Tokenizer, prompt: str, most: int) -> int:
    """Tokens of a prompt with the chat around it; of a very long one at least `most` and one more."""
    (text,) = as_chat(tokenizer, [prompt[: most * MAX_TOKEN_CHARS]])
    return len(tokenizer(text, truncation=False, verbose=False).input_ids)
