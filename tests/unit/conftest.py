"""A tiny CLIP on disk, and the step-aware model that starts from it."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from attune.spm.model import from_clip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP for 16 px images whose tokenizer spells letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokens), "max_position_embeddings": 24, "hidden_act": "gelu"}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    vision = {**tower, "image_size": 16, "patch_size": 8, "hidden_act": "gelu"}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=8))
    for weight in model.parameters():  # wide enough that everything matters
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def spm(clip_folder):
    return from_clip(clip_folder)


@pytest.fixture
def images():
    return torch.rand(3, 3, 20, 28, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.1
