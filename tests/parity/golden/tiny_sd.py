"""The tiny Stable Diffusion of cases 5, 6 and 12 behind our own backbone, and what stands around it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from golden.reading import HERE, tensors
from torch import Tensor, nn

from attune.backbones.sd import StableDiffusion
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning

ALPHAS_CUMPROD = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
CONFIG = json.loads((HERE / "tiny_sd.json").read_text())


def part(file: str, prefix: str) -> dict[str, Tensor]:
    """A network's tensors of a file that holds several."""
    return {k.removeprefix(prefix): v for k, v in tensors(file).items() if k.startswith(prefix)}


class TinySD(StableDiffusion):
    """The backbone of these cases: its encoders are left out, their outputs are stored."""

    def __init__(self, denoiser: nn.Module | None = None, decoder: str = "tiny_sd", scaling: float = 0.18215):
        unet = UNet2DConditionModel.from_config(CONFIG["unet"])
        unet.load_state_dict(part("tiny_sd", "unet."))
        self.vae = AutoencoderKL.from_config(CONFIG["vae"], scaling_factor=scaling)
        decoder_only = self.vae.load_state_dict(part(decoder, "vae."), strict=False)
        assert all(key.startswith(("encoder.", "quant_conv.")) for key in decoder_only.missing_keys)
        assert not decoder_only.unexpected_keys
        self.vae.eval().requires_grad_(False)
        self.denoiser = (denoiser or unet).eval()
        self.alphas_cumprod, self.prediction_type = ALPHAS_CUMPROD, "epsilon"
        self.latent_shape, self.dtype, self.device = (4, 8, 8), torch.float32, torch.device("cpu")


class Recorded(nn.Module):
    """A network whose outputs were stored with its inputs: finds the input, gives its output.

    Raises: AssertionError if it is asked for anything it has not been recorded on.
    """

    def __init__(self, x_t: Tensor, t: Tensor, cond: Tensor, output: Tensor):
        super().__init__()
        self.x_t, self.t, self.cond, self.output = x_t, t, cond, output

    def forward(self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        found = []
        for x, time, cond in zip(x_t, t, encoder_hidden_states, strict=True):
            error = (self.x_t - x).flatten(1).abs().amax(1) + 1e3 * ((self.t != time) | (self.cond != cond))
            assert error.min() < 1e-5 * self.x_t.abs().max(), f"not recorded: t {time}, off by {error.min()}"
            found.append(error.argmin())
        return SimpleNamespace(sample=self.output[torch.stack(found)])


class Beside(Policy):
    """A policy without an adapter, whose reference is another network."""

    def __init__(self, backbone: StableDiffusion, other: nn.Module, null: Conditioning):
        super().__init__(backbone, null)
        self.other = other

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.module = self.other
        with torch.no_grad():
            yield
        self.module = self.denoiser


class StoredPreference:
    """The preference function of case 6, which stands in for the preference model; keeps what it said."""

    def __init__(self, w: Tensor, ids: Tensor):
        self.w, self.ids, self.calls = w, ids, []

    def __call__(self, images: Tensor, prompts: Sequence[str], t: Tensor) -> Tensor:
        """Prompts are "0", "1", ...: their token ids are stored."""
        raw, time = images * 2 - 1, t / 1000
        look = 80 * (self.w * raw).mean((1, 2, 3)) + 2 * time * raw[:, 0].mean((1, 2))
        scores = (1 + self.ids[[int(p) for p in prompts]] / 1000) * look / (time + 0.005)
        self.calls.append((t, scores))
        return scores
