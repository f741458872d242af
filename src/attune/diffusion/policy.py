"""The policy: a frozen denoiser with a LoRA adapter. Adapter on = policy, adapter off = reference.

One network serves as both, so the reference costs no memory and is the base bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from attune.interfaces import Backbone, Conditioning

ADAPTER_FILE = "pytorch_lora_weights.safetensors"


class Policy:
    """A backbone's denoiser, its adapter, and guidance.

    `module` is what gets called: the training loop replaces it by its distributed wrapper. `denoiser` is the
    network itself, whose adapters are switched and saved. Bypassing `module` would train ranks apart.
    """

    def __init__(self, backbone: Backbone, null: Conditioning):
        """`null` is the conditioning of the empty prompt, one row."""
        self.backbone, self.null = backbone, null
        self.denoiser: nn.Module = backbone.denoiser
        self.denoiser.requires_grad_(False)
        self.module: nn.Module = self.denoiser

    def add_adapter(self, rank: int, seed: int, targets: Sequence[str] | None = None) -> None:
        """Adds a trainable LoRA: Gaussian A, zero B, alpha = rank, kept in float32."""
        torch.manual_seed(seed)
        self.denoiser.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=rank,
                init_lora_weights="gaussian",
                target_modules=list(targets or self.backbone.lora_targets),
            )
        )
        for weight in self.parameters():
            weight.data = weight.data.float()

    @property
    def device(self) -> torch.device:
        """Where the base model lies."""
        return next(iter(self.null.tensors.values())).device

    def parameters(self) -> list[Tensor]:
        """What training may change: the adapter's weights."""
        return [weight for weight in self.denoiser.parameters() if weight.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, predictions are the frozen base's and carry no graph. Keep the block to one assignment."""
        self.denoiser.disable_adapters()
        try:
            with torch.no_grad():
                yield
        finally:
            self.denoiser.enable_adapters()

    def predict_noise(self, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float = 1.0) -> Tensor:
        """Epsilon; with guidance w != 1, null + w (cond - null) from one call on twice the batch.

        Source: Ho and Salimans 2022, arXiv:2207.12598, eq. 6 in diffusers' scaling (1 = off).
        """
        t = t.to(x_t.device)
        if guidance_scale == 1.0:
            return self.backbone.predict_noise(self.module, x_t, t, cond)
        both = Conditioning.cat([self.null.expand(len(cond)), cond])
        noise_pred = self.backbone.predict_noise(self.module, x_t.repeat(2, 1, 1, 1), t.repeat(2), both)
        unconditional, conditional = noise_pred.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def save(self, folder: Path) -> None:
        """Writes the adapter as diffusers reads it (`load_lora_weights`)."""
        weights = {name: value.contiguous() for name, value in get_peft_model_state_dict(self.denoiser).items()}
        StableDiffusionLoraLoaderMixin.save_lora_weights(folder, convert_state_dict_to_diffusers(weights))

    def load(self, folder: Path) -> None:
        """Reads an adapter saved by `save` into the one already added.

        Raises:
            ValueError: a tensor is missing or left over.
        """
        saved = load_file(folder / ADAPTER_FILE)
        weights = {_to_peft(name): value for name, value in saved.items()}
        expected = set(get_peft_model_state_dict(self.denoiser))
        if set(weights) != expected:
            odd = sorted(set(weights) ^ expected)
            raise ValueError(f"{folder / ADAPTER_FILE} does not fit the adapter; first differing key {odd[0]}")
        set_peft_model_state_dict(self.denoiser, weights)


def _to_peft(name: str) -> str:
    return name.removeprefix("unet.").replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the frozen weights of a module: the identity of a reference, for checkpoints and tests."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.named_parameters()):
        if not weight.requires_grad:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
