"""The policy: a denoiser that learns, and the frozen reference it is compared with.

With a fresh LoRA adapter one network serves as both (adapter on = policy, adapter off = reference), so the
reference costs no memory and is the base bit for bit. Where the base is not the reference, in full fine-tuning and
when training goes on from an adapter, it is a frozen copy of what moves, around the very weights that do not.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from attune.config.settings import Lora
from attune.diffusion import lora as adapters
from attune.diffusion.lora import ADAPTER_FILE as ADAPTER_FILE
from attune.distributed import Shard
from attune.interfaces import Backbone, Conditioning


class Policy:
    """A backbone's denoiser, what it learns, and guidance.

    `module` is what gets called: the training loop replaces it by its distributed wrapper. `denoiser` is the
    network itself, whose adapters are switched and saved. Bypassing `module` would train ranks apart.
    """

    def __init__(self, backbone: Backbone, null: Conditioning, autocast: torch.dtype | None = None):
        """`null` is the conditioning of the empty prompt, one row; `autocast` what a float32 denoiser computes in."""
        self.backbone, self.null, self.autocast = backbone, null, autocast
        self.denoiser: nn.Module = backbone.denoiser
        self.denoiser.requires_grad_(False)
        self.module: nn.Module = self.denoiser
        self.reference_model: nn.Module | None = None  # the reference, where it is not the denoiser without its adapter
        self.shard = Shard()  # of the training this process takes part in

    def add_adapter(self, rank: int, seed: int, targets: str | Sequence[str] = "attention") -> None:
        """Adds a trainable LoRA: Gaussian A, zero B, alpha = rank, kept in float32.

        Args:
            targets: "attention", the backbone's own choice; "all", every Linear and Conv2d but conv_in and
                conv_out, whose four channels have no low rank; or endings of module names.

        Raises:
            ValueError: a name fits no module.
        """
        torch.manual_seed(seed)
        self._attach(self._modules(targets), rank, {})

    def unfreeze(self) -> None:
        """Makes every weight of the denoiser trainable; what it is now stays as the reference."""
        self.denoiser.requires_grad_(True)
        self.anchor()

    def anchor(self) -> None:
        """Keeps what the policy is now as its reference: trainable weights are copied, frozen ones shared."""
        shared = {id(weight): weight for weight in self.denoiser.parameters() if not weight.requires_grad}
        self.reference_model = copy.deepcopy(self.denoiser, shared).requires_grad_(False)

    def go_on(self, start: str, lora: Lora | None) -> None:
        """Takes on what `place[@revision]` holds, to be trained further; it is the reference from now on.

        Args:
            lora: the adapter that is expected there; None = a whole denoiser, of which every weight will move.

        Raises:
            ValueError: it is something else; or as `load` does.
        """
        wanted = {} if lora is None else dict.fromkeys(self._modules(lora.targets), lora.rank)
        place, _, revision = start.partition("@")
        self.load(place, revision or None)
        if (found := self.adapted()) != wanted:
            raise ValueError(f"start: {place} is {_in_words(found)}, but `lora` says {_in_words(wanted)}")
        if lora is None:
            self.backbone.denoiser = self.denoiser  # lets go of the base, which is of no more use
            self.unfreeze()
        else:
            self.anchor()

    def adapted(self) -> dict[str, int]:
        """Module name -> rank of its LoRA; empty without an adapter."""
        sides = [(name, weight) for name, weight in self.denoiser.named_parameters() if ".lora_A." in name]
        return {name.partition(".lora_A.")[0]: len(weight) for name, weight in sides}

    @property
    def device(self) -> torch.device:
        """Where the base model lies."""
        return next(iter(self.null.tensors.values())).device

    def parameters(self) -> list[Tensor]:
        """What training may change: the adapter's weights, or all."""
        return [weight for weight in self.denoiser.parameters() if weight.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, predictions are the reference's and carry no graph. Keep the block to one assignment."""
        with torch.no_grad(), self._without_adapter() if self.reference_model is None else self._as_the_copy():
            yield

    def drop_captions(self, cond: Conditioning, share: float, generator: torch.Generator) -> Conditioning:
        """Empties a random share of the prompts, so that guidance still has an unconditional model to lean on."""
        if share == 0:
            return cond
        keep = torch.rand(len(cond), generator=generator) >= share
        return cond.where(keep, self.null.expand(len(cond)))

    def predict_noise(self, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float = 1.0) -> Tensor:
        """Epsilon; with guidance w != 1, null + w (cond - null) from one call on twice the batch.

        Source: Ho and Salimans 2022, arXiv:2207.12598, eq. 6 in diffusers' scaling (1 = off).
        """
        t = t.to(x_t.device)
        if guidance_scale == 1.0:
            return self._predict(x_t, t, cond)
        both = Conditioning.cat([self.null.expand(len(cond)), cond])
        noise_pred = self._predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), both)
        unconditional, conditional = noise_pred.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def save(self, folder: Path) -> None:
        """Writes what was learnt as diffusers reads it: a LoRA (`load_lora_weights`), or all of `unet/`."""
        if self.adapted():
            adapters.write_lora(folder, get_peft_model_state_dict(self.denoiser))
        else:
            self.denoiser.save_pretrained(folder / "unet")

    def load(self, source: Path | str, revision: str | None = None) -> None:
        """Takes on what a file or folder holds, in the place of any adapter there was; needs no configuration.

        Args:
            source: a LoRA as diffusers, peft or kohya write it, a denoiser, a pipeline, or a hub id of one.
            revision: hub commit, required for a hub id.

        Raises:
            ValueError: it does not fit this base model, changes nothing, or is not pinned.
        """
        found = adapters.locate(source, revision)
        if found.is_dir():
            network = adapters.read_denoiser(found, self._bare(self.denoiser))
            self.reference_model, self.denoiser, self.module = self.denoiser, network, network
            return
        weights = adapters.read_lora(found, self.denoiser)
        ranks = adapters.ranks(weights, self.denoiser, found)
        self._bare(self.denoiser)
        self._attach(list(ranks), max(ranks.values()), ranks)
        set_peft_model_state_dict(self.denoiser, weights)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        with torch.autocast(x_t.device.type, self.autocast, enabled=self.autocast is not None):
            return self.backbone.predict_noise(self.module, x_t, t, cond)

    def _modules(self, targets: str | Sequence[str]) -> list[str]:
        """Names of the modules meant by `targets`."""
        layers = [n for n, m in self.denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        if targets == "all":
            return [name for name in layers if name not in ("conv_in", "conv_out")]
        endings = self.backbone.lora_targets if targets == "attention" else targets
        for ending in endings:
            if not any(f".{name}".endswith(f".{ending}") for name in layers):
                raise ValueError(f"lora.targets: no Linear or Conv2d of the denoiser is called {ending!r}")
        return [name for name in layers if any(f".{name}".endswith(f".{ending}") for ending in endings)]

    def _attach(self, modules: Sequence[str], rank: int, other_ranks: dict[str, int]) -> None:
        """Wraps exactly these modules; alpha is the rank of each."""
        exactly = {f"^{re.escape(name)}": r for name, r in other_ranks.items() if r != rank}
        self.denoiser.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=rank,
                rank_pattern=exactly,
                alpha_pattern=dict(exactly),
                init_lora_weights="gaussian",
                target_modules="|".join(map(re.escape, modules)),
            )
        )
        for weight in self.parameters():
            weight.data = weight.data.float()

    @staticmethod
    def _bare(denoiser: nn.Module) -> nn.Module:
        """The denoiser without its adapter, if it had one."""
        if getattr(denoiser, "peft_config", None):
            denoiser.unload_lora()
        return denoiser

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        self.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.denoiser.enable_adapters()

    @contextmanager
    def _as_the_copy(self) -> Iterator[None]:
        learning, self.module = self.module, self.reference_model
        try:
            yield
        finally:
            self.module = learning


def _in_words(ranks: dict[str, int]) -> str:
    if not ranks:
        return "a whole denoiser"
    return f"a LoRA of rank {', '.join(map(str, sorted(set(ranks.values()))))} on {len(ranks)} modules"


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the frozen weights of a module: the identity of a reference, for checkpoints and tests."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.named_parameters()):
        if not weight.requires_grad:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
