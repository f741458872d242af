"""The policy: a denoiser in training, and the frozen reference it is compared with.

With a fresh LoRA adapter one network serves as both (adapter on = policy, adapter off = reference), so the
reference costs no memory and is the base bit for bit. In full fine-tuning, and when training continues from an
adapter, or the reference follows the policy, it is another network: copies of the trainable weights, around the frozen
weights of the policy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from attune.averages import MovingAverage
from attune.config.settings import Lora
from attune.costs import count_denoised
from attune.diffusion.lora import (
    add_lora,
    can_merge,
    load_lora,
    lora_layers,
    lora_ranks,
    merged_lora,
    save_lora,
    set_lora,
    target_modules,
    unload_lora,
)
from attune.diffusion.lora_files import locate, part_of, read_denoiser
from attune.diffusion.noise import Draws
from attune.distributed import Shard
from attune.files import let_umask_decide
from attune.fsdp import gathered_state, is_sharded, plain_class, shard_with_frozen_copy
from attune.interfaces import Backbone, Conditioning
from attune.weights import check_finite

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from attune.diffusion.lora import Denoiser


class Policy:
    """A backbone's denoiser, its trainable weights and its reference; a `Trainable`.

    `module` is what gets called: the training loop replaces it by its distributed wrapper. `denoiser` is the
    network itself, whose adapter is switched and saved. Calling `denoiser` in training would leave the processes
    with different weights, because only the wrapper exchanges gradients.
    """

    def __init__(self, backbone: Backbone, uncond: Conditioning, autocast: torch.dtype | None = None):
        """`uncond` encodes the empty prompt, one row; `autocast` is what a float32 denoiser computes in."""
        self.backbone, self.uncond, self.autocast = backbone, uncond, autocast
        self.denoiser = backbone.denoiser
        self.denoiser.requires_grad_(False)
        self.module: nn.Module = self.denoiser
        self.reference_model: nn.Module | None = None  # None: the denoiser without its adapter
        self.moving_reference: MovingAverage | None = None  # what of it follows the policy; None: it is frozen
        self._lora_layers: list[BaseTunerLayer] = []  # found when first switched
        self._merged = False
        self.shard = Shard()  # this process's part of the training
        self.loaded_from: str | None = None  # what was loaded last in the place of the base model; named in errors

    # ------------------------------------------------------------ prediction

    @property
    def device(self) -> torch.device:
        """Where the base model lies."""
        return next(iter(self.uncond.tensors.values())).device

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float = 1.0) -> Tensor:
        """What the path predicts (B, C, h, w) under guidance w.

        Classifier-free: for w != 1 uncond + w (cond - uncond), from one doubled call. Source: Ho and Salimans 2022,
        arXiv:2207.12598, eq. 6 in diffusers' scaling (1 = off). Embedded: the denoiser is told w, also of 1, in one
        call. Source: Meng et al. 2022, arXiv:2210.03142, section 3.1.

        Raises:
            ValueError: w is not 1, and the model has no guidance.
        """
        t, kind = t.to(x_t.device), self.backbone.guidance
        if kind == "embedded":
            told = torch.full((len(cond),), float(guidance_scale), device=x_t.device)
            return self._predict(x_t, t, Conditioning({**cond.tensors, "guidance": told}))
        if guidance_scale == 1.0:
            return self._predict(x_t, t, cond)
        if kind == "none":
            name = self.backbone.model.backbone
            raise ValueError(f"guidance_scale: {guidance_scale:g}, but {name} has no guidance; set it to 1")
        both = Conditioning.cat([self.uncond.expand(len(cond)), cond])
        without, given = self._predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        return without + guidance_scale * (given - without)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        count_denoised(len(x_t))
        # the cache would keep a copy of every weight, which are put together block by block to save that memory
        options = {"enabled": self.autocast is not None, "cache_enabled": not self.shard.sharded_weights}
        with torch.autocast(x_t.device.type, self.autocast, **options):
            return self.backbone.predict(self.module, x_t, t, cond)

    def drop_captions(self, cond: Conditioning, share: float, draws: Draws) -> Conditioning:
        """Empties a random share of the prompts: guidance needs a policy that is also trained without prompts."""
        if not share:
            return cond
        keep = draws.uniform(len(cond)) >= share
        return cond.where(keep, self.uncond.expand(len(cond)))

    # ------------------------------------------------------------ reference

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, predictions are the reference's and carry no graph. Keep the block to one assignment.

        Raises:
            RuntimeError: inside `merged`, where the base's weights are not its own.
        """
        if self._merged:
            raise RuntimeError("the reference was asked for while the adapter is merged into the base's weights")
        reference = self.reference_model
        with torch.no_grad(), self._adapter_disabled() if reference is None else self._called(reference):
            yield

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside, predictions are those without the adapter, whatever the reference is, and carry no graph."""
        if self._merged or not self._adapter():
            raise RuntimeError("the base model is only there beside an adapter that is not merged")
        with torch.no_grad(), self._adapter_disabled():
            yield

    @contextmanager
    def _adapter_disabled(self) -> Iterator[None]:
        layers = self._adapter()
        set_lora(layers, enabled=False)
        try:
            yield
        finally:
            set_lora(layers, enabled=True)

    def _adapter(self) -> list[BaseTunerLayer]:
        self._lora_layers = self._lora_layers or lora_layers(self.denoiser)
        return self._lora_layers

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, predictions carry no graph and are faster, because the adapter is added to the base's weights.

        They differ from those outside by the rounding of float32. Inside `reference` it is the reference's adapter, if
        that has one. Nothing is merged where more would be lost (`lora.can_merge`), under autocast, or in another
        such block.
        """
        reference = self.reference_model if self.module is self.reference_model else None
        network = self.denoiser if reference is None else reference
        layers = self._adapter() if reference is None else lora_layers(reference)
        merges = not self._merged and self.autocast is None and can_merge(network, layers)
        with torch.no_grad(), merged_lora(layers) if merges else nullcontext():
            self._merged |= merges
            try:
                yield
            finally:
                self._merged &= not merges

    @contextmanager
    def _called(self, reference: nn.Module) -> Iterator[None]:
        trained, self.module = self.module, reference
        try:
            yield
        finally:
            self.module = trained

    def snapshot_reference(self) -> None:
        """Makes the policy as it is now its reference: trainable weights are copied, frozen ones shared."""
        shared = {id(weight): weight for weight in self.denoiser.parameters() if not weight.requires_grad}
        self.reference_model = copy.deepcopy(self.denoiser, shared).requires_grad_(False)

    def move_reference(self, decay: float, warmup: bool) -> None:
        """Lets the reference follow the policy from now on, as a moving average of the trainable weights.

        Of a LoRA that is an average of its factors, whose product is not the average of the products B A. A reference
        that was the base without an adapter is from now on the policy as it is, which is the same while B is zero.
        """
        if self.reference_model is None:
            self.snapshot_reference()
        copies = dict(cast("nn.Module", self.reference_model).named_parameters())
        weights = [copies[name] for name, weight in self.denoiser.named_parameters() if weight.requires_grad]
        self.moving_reference = MovingAverage(weights, decay, warmup)

    # ------------------------------------------------------------ trainable weights

    def parameters(self) -> list[Tensor]:
        """The trainable weights: the adapter's, or all."""
        return [weight for weight in self.denoiser.parameters() if weight.requires_grad]

    def add_adapter(self, rank: int, seed: int, targets: str | Sequence[str] = "attention") -> None:
        """Adds a trainable LoRA. Targets and errors as in `lora.target_modules`."""
        torch.manual_seed(seed)
        add_lora(self.denoiser, dict.fromkeys(self._target_modules(targets), rank), self._lora_in_float32)
        self._lora_layers = []

    def unfreeze(self) -> None:
        """Makes every weight of the denoiser trainable; its present values become the reference.

        With `shard.sharded_weights`, each process keeps a piece of every weight and of the reference.
        """
        self.denoiser.requires_grad_(True)
        if self.shard.sharded_weights:
            self.reference_model = shard_with_frozen_copy(self.denoiser)
        else:
            self.snapshot_reference()

    def continue_from(self, start: str, lora: Lora | None) -> None:
        """Loads the policy at `start`, see `attune.hub`, to be trained further; it is also the new reference.

        Args:
            lora: the adapter that must be there; None = a whole denoiser, all of whose weights will be trained.

        Raises:
            ValueError: something else is there; or as `load` does.
        """
        wanted = {} if lora is None else dict.fromkeys(self._target_modules(lora.targets), lora.rank)
        self.load(start, may_be_zero=Path(start, "run.json").exists())  # beside every model trained here
        if (found := lora_ranks(self.denoiser)) != wanted:
            raise ValueError(f"start: {start} is {_in_words(found)}, but `lora` says {_in_words(wanted)}")
        if lora is None:
            self.backbone.denoiser = self.denoiser  # frees the memory of the base, which is not needed any more
            self.unfreeze()
        else:
            self.snapshot_reference()

    def save(self, folder: Path, header: Mapping[str, str] | None = None) -> None:
        """Writes the trained weights as diffusers reads them: a LoRA (`load_lora_weights`), or all of the denoiser.

        Of several processes the main one writes; all must call this, because each may hold a piece of the weights.

        Args:
            header: what a LoRA's file says of itself, see `weights.save_tensors`.

        Raises:
            ValueError: a weight is not finite; nothing is written.
        """
        denoiser = self._whole_denoiser()
        if not self.shard.is_main_process:
            return
        if lora_ranks(denoiser):
            save_lora(denoiser, folder, header or {})
        else:
            check_finite(denoiser.state_dict(), f"{folder} was not saved")
            part = folder / part_of(denoiser)
            denoiser.save_pretrained(part)
            let_umask_decide(part)

    def _whole_denoiser(self) -> Denoiser:
        """The denoiser; of a sharded one a copy on the CPU, which has its weights in the main process alone."""
        if not is_sharded(self.denoiser):
            return self.denoiser
        state = gathered_state(self.denoiser)
        with torch.device("meta"):
            kind = cast("type[Denoiser]", plain_class(self.denoiser))
            denoiser = cast("Denoiser", kind.from_config(self.denoiser.config))
        denoiser.load_state_dict(state, strict=self.shard.is_main_process, assign=True)
        return denoiser

    def load(self, source: Path | str, may_be_zero: bool = False) -> None:
        """Replaces the adapter, if there is one, by what a file or folder holds; rank and targets are read from it.

        Args:
            source: a LoRA as diffusers, peft or kohya write it, a denoiser, or a pipeline; here or on the Hub.
            may_be_zero: whether an adapter may change nothing. One of our own training may: early stopping can find
                that the start was best. Of a foreign file it means that its names were not understood.

        Raises:
            ValueError: it does not fit this base model, changes nothing, or is not pinned.
        """
        found = locate(source)
        if found.is_dir() and self.backbone.model.quantize is not None:
            raise ValueError(f"model.quantize: {source} is a whole denoiser, which is not quantised; set it to null")
        if found.is_dir():
            network = read_denoiser(found, self.denoiser, self.backbone.prediction_type)
            self.reference_model, self.denoiser, self.module = unload_lora(self.denoiser), network, network
        else:
            load_lora(self.denoiser, found, may_be_zero, self._lora_in_float32)
        self._lora_layers, self.loaded_from = [], str(source)

    @property
    def _lora_in_float32(self) -> bool:
        return self.backbone.model.lora_dtype == "float32"

    def _target_modules(self, targets: str | Sequence[str]) -> list[str]:
        return target_modules(self.denoiser, targets, self.backbone.lora_targets)


def _in_words(ranks: dict[str, int]) -> str:
    lora = f"a LoRA of rank {', '.join(map(str, sorted(set(ranks.values()))))} on {len(ranks)} modules"
    return lora if ranks else "a whole denoiser"
