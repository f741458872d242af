"""Random scorers in the layouts that are published, for those the embedded family has none of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import score_server
from attune.rewards import aesthetic, hpsv2, imagereward
from attune.spm import model as spm
from attune.world.grammar import all_scenes

EMBEDDED = Path(__file__).parents[1] / "models/embedded"

HEAD_WIDTH = 8
WORDS = sorted({word for scene in all_scenes() for word in scene.prompt.split()})
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_bert_tokenizer(folder: Path) -> Path:
    """BERT's files with the words of the embedded world."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    options = {"do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder


def imagereward_tensors(vision: int = 32, text: int = 24, layers: int = 2, size: int = 32) -> dict[str, Tensor]:
    """A small ImageReward under the released names, random in every tensor, with what is to be left out."""
    generator, words = torch.Generator().manual_seed(0), len(SPECIAL) + len(WORDS) + 2
    found: dict[str, Tensor] = {}

    def add(name: str, *shape: int, around: float = 0.0, spread: float = 0.2) -> None:
        found[name] = around + spread * torch.randn(shape, generator=generator)

    def linear(name: str, inner: int, outer: int) -> None:
        add(f"{name}.weight", outer, inner, spread=inner**-0.5)
        add(f"{name}.bias", outer)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width, around=1.0)
        add(f"{name}.bias", width)

    seen, read = "blip.visual_encoder", "blip.text_encoder"
    add(f"{seen}.cls_token", 1, 1, vision)
    add(f"{seen}.pos_embed", 1, (size // 8) ** 2 + 1, vision)
    add(f"{seen}.patch_embed.proj.weight", vision, 3, 8, 8, spread=0.1)
    add(f"{seen}.patch_embed.proj.bias", vision)
    for n in range(layers):
        block = f"{seen}.blocks.{n}"
        norm(f"{block}.norm1", vision)
        linear(f"{block}.attn.qkv", vision, 3 * vision)
        linear(f"{block}.attn.proj", vision, vision)
        norm(f"{block}.norm2", vision)
        linear(f"{block}.mlp.fc1", vision, 4 * vision)
        linear(f"{block}.mlp.fc2", 4 * vision, vision)
    norm(f"{seen}.norm", vision)
    add(f"{read}.embeddings.word_embeddings.weight", words, text, spread=1.0)
    add(f"{read}.embeddings.position_embeddings.weight", 40, text)
    norm(f"{read}.embeddings.LayerNorm", text)
    for n in range(layers):
        layer = f"{read}.encoder.layer.{n}"
        for attention, width in ((f"{layer}.attention", text), (f"{layer}.crossattention", vision)):
            linear(f"{attention}.self.query", text, text)
            linear(f"{attention}.self.key", width, text)
            linear(f"{attention}.self.value", width, text)
            linear(f"{attention}.output.dense", text, text)
            norm(f"{attention}.output.LayerNorm", text)
        linear(f"{layer}.intermediate.dense", text, 4 * text)
        linear(f"{layer}.output.dense", 4 * text, text)
        norm(f"{layer}.output.LayerNorm", text)
    sizes = (text, 32, 16, 8, 4, 1)
    for n, inner, outer in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        linear(f"mlp.layers.{n}", inner, outer)
    found[f"{read}.embeddings.position_ids"] = torch.arange(40)[None]
    linear("blip.vision_proj", vision, 8)
    linear("blip.text_proj", text, 8)
    return found


def write_imagereward(folder: Path) -> dict[str, str]:
    """A released file, the layout beside it and a tokenizer: the locations of the scorer's block."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(imagereward_tensors(), folder / "tiny.pt")
    (folder / "tiny.json").write_text(json.dumps({"head_width": HEAD_WIDTH}))
    return {"path": str(folder / "tiny.pt"), "tokenizer": str(write_bert_tokenizer(folder / "bert"))}


WITHOUT_WEIGHTS = {
    "jpeg": dict,
    "python": lambda: {"function": "docs.examples.redness:redness"},
    "http": lambda: {"url": score_server.started().address, "version": "1", "batch_size": 4},
}


def block(name: str, folder: Path) -> dict[str, Any]:
    """A block of params.yaml for a scorer that no embedded weights were trained for."""
    if name == "imagereward":
        return write_imagereward(folder)
    if name in WITHOUT_WEIGHTS:
        return WITHOUT_WEIGHTS[name]()
    # the aesthetic predictor's CLIP was grounded in words as well, and nobody's preference tuned it
    return {"model": "ViT-tiny/4@32", "path": "models/embedded/aesthetic", "hidden_act": "gelu"}


# A scorer whose weights are to be in one file: that file, which is not there yet, and what loads the scorer.


def aesthetic_head(folder):
    block = {"path": str(EMBEDDED / "aesthetic"), "head": str(folder / "head.pth"), "hidden_act": "gelu"}
    return folder / "head.pth", lambda: aesthetic.load(aesthetic.Config(**block))


def hpsv2_file(folder):
    layout = (EMBEDDED / "hpsv2/open_clip_model.json").read_text()
    (folder / "hps.json").write_text(layout)
    block = {"version": "2.1", "path": str(folder / "hps.pt"), "tokenizer": str(EMBEDDED / "hpsv2")}
    return folder / "hps.pt", lambda: hpsv2.load(hpsv2.Config(**block))


def imagereward_file(folder):
    block = write_imagereward(folder)
    return Path(block["path"]), lambda: imagereward.load(imagereward.Config(**block))


def spm_file(folder):
    return folder / "spm.bin", lambda: spm.load(folder / "spm.bin", clip=str(EMBEDDED / "pickscore"))
