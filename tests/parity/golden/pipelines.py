"""The tiny Stable Diffusion and SDXL as folders, and what stands around them in the cases."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL
from golden.reading import HERE, T5_TOKENIZER, TOKENIZER, tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attune.diffusion.lora_files import ADAPTER_FILE
from attune.diffusion.policy import Policy
from attune.interfaces import Backbone, Conditioning

WEIGHTS = dict.fromkeys(("unet", "transformer", "vae"), "diffusion_pytorch_model")


def write_pipeline(folder: Path, name: str, **scheduler: str) -> str:
    """`tiny_sd`, `_sdxl`, `_sd3` or `_flux` in diffusers' layout; `scheduler` overrides settings of its scheduler."""
    configs, weights = json.loads((HERE / f"{name}.json").read_text()), tensors(name)
    for part, config in configs.items():
        place = folder / part
        place.mkdir()
        if part == "scheduler":
            (place / "scheduler_config.json").write_text(json.dumps(config | scheduler))
            continue
        own = {key.removeprefix(f"{part}."): value for key, value in weights.items() if key.startswith(f"{part}.")}
        if part == "vae":  # no case of these two encodes an image, so the encoder is not kept: any weights will do
            own = AutoencoderKL.from_config(config).state_dict() | own
        (place / "config.json").write_text(json.dumps(config))
        save_file(own, place / f"{WEIGHTS.get(part, 'model')}.safetensors", metadata={"format": "pt"})
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    if configs.get("text_encoder_2", {}).get("model_type") == "t5":
        shutil.copytree(T5_TOKENIZER, folder / "tokenizer_2")
    elif "text_encoder_2" in configs:
        write_second_tokenizer(folder / "tokenizer_2")
    return str(folder)


def write_second_tokenizer(folder: Path) -> None:
    """SDXL's second tokenizer is the first one padding with "!", whose id is 0."""
    shutil.copytree(TOKENIZER, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    exclamation = {"content": "!", "special": True, "normalized": False}
    exclamation |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    config["added_tokens_decoder"]["0"] = exclamation
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "!"}))


def conditioning(case: dict[str, Tensor], prefix: str = "") -> Conditioning:
    """A case's embeddings under the backbones' names; `prefix` "negative_" for the empty prompt's."""
    names = {"prompt_embeds": f"{prefix}prompt_embeds", "text_embeds": f"{prefix}pooled_prompt_embeds"}
    return Conditioning({ours: case[theirs] for ours, theirs in names.items() if theirs in case})


def own(backbone: Backbone) -> Backbone:
    """The backbone with a denoiser of its own, that may be given an adapter or gradients."""
    backbone = copy.copy(backbone)
    backbone.denoiser = copy.deepcopy(backbone.denoiser)
    return backbone


def adapted(backbone: Backbone, uncond: Conditioning, file: str, folder: Path) -> Policy:
    """A policy whose adapter is read from a stored file, in diffusers' layout."""
    policy = Policy(own(backbone), uncond)
    policy.add_adapter(rank=4, seed=0)
    save_file(load_file(HERE / f"{file}.safetensors"), folder / ADAPTER_FILE)
    policy.load(folder)
    return policy


class Recorded(nn.Module):
    """A network whose output was stored with its input: gives the output, and refuses any other input."""

    def __init__(self, x_t: Tensor, t: Tensor, cond: Conditioning, output: Tensor):
        super().__init__()
        self.x_t, self.t, self.cond, self.output = x_t, t, cond, output

    def forward(self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: dict | None = None):
        assert torch.equal(x_t, self.x_t)
        assert torch.equal(t, self.t)
        given = {"prompt_embeds": encoder_hidden_states} | (added_cond_kwargs or {})
        assert all(torch.equal(given[name], value) for name, value in self.cond.tensors.items())
        return SimpleNamespace(sample=self.output)


class Beside(Policy):
    """A policy without an adapter, whose reference is another network."""

    def __init__(self, backbone: Backbone, other: nn.Module, uncond: Conditioning | None = None):
        super().__init__(backbone, uncond)
        self.other = other

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.module = self.other
        with torch.no_grad():
            yield
        self.module = self.denoiser


class StoredTokens:
    """In a tokenizer's place: ids that no text leads to, because they were drawn."""

    def __init__(self, input_ids: Tensor):
        self.input_ids = input_ids

    def __call__(self, prompts: Sequence[str], **_: object) -> StoredTokens:
        assert len(prompts) == len(self.input_ids)
        return self


class StoredPreference:
    """The preference function of case 6, which stands in for the preference model; keeps what it said."""

    def __init__(self, w: Tensor, ids: Tensor):
        self.w, self.ids, self.times, self.scores = w, ids, [], []

    def __call__(self, images: Tensor, prompts: Sequence[str], t: Tensor) -> Tensor:
        """Prompts are "0", "1", ...: their token ids are stored."""
        raw, time = images * 2 - 1, t / 1000
        look = 80 * (self.w * raw).mean((1, 2, 3)) + 2 * time * raw[:, 0].mean((1, 2))
        self.times.append(t)
        self.scores.append((1 + self.ids[[int(p) for p in prompts]] / 1000) * look / (time + 0.005))
        return self.scores[-1]
