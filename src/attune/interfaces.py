"""The protocols everything else is written against; each declares all that its callers use.

`Conditioning` is a value. `Backbone`, `Objective`, `Method`, `Trainable`, `Reward` and its kin are protocols: nothing
inherits from them. `Policy`, which methods are given, is concrete and lives in `attune.diffusion.policy`.

Shapes: B images or prompts, (C, h, w) a latent, (3, H, W) an image. Images outside a backbone are float in
[0, 1]; times t (B,) are on the scale of the training timesteps, see `attune.diffusion.path`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from attune.averages import MovingAverage
from attune.config.settings import MethodConfig, Model, TrainingConfig
from attune.distributed import Part, Shard

if TYPE_CHECKING:
    from attune.diffusion.lora import Denoiser
    from attune.diffusion.noise import Draws
    from attune.diffusion.path import Path
    from attune.diffusion.policy import Policy

Metrics = dict[str, float | Tensor]
Log = Callable[[Mapping[str, float], int], None]
"""`log(metrics, step)`: how training reports its metrics."""

Guidance = Literal["cfg", "embedded", "none"]
"""How a model is guided: classifier-free, by a number that the denoiser is told, or not at all."""

Score = Callable[[Tensor, Sequence[str]], Tensor]
"""`score(images, prompts)`: what is called of a `Reward`."""


@dataclass(frozen=True)
class Conditioning:
    """The inputs of a denoiser besides x_t and t: batch-first tensors under the backbone's own names."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Conditioning:
        return self._map(lambda value: value[rows])

    def repeat(self, k: int) -> Conditioning:
        """k copies, candidate-major: row j * B + b is prompt b."""
        return self._map(lambda value: value.repeat(k, *[1] * (value.ndim - 1)))

    def expand(self, n: int) -> Conditioning:
        """One row shown n times without copying."""
        return self._map(lambda value: value.expand(n, *value.shape[1:]))

    def where(self, keep: Tensor, other: Conditioning) -> Conditioning:
        """Own rows where `keep` (B,), those of `other` elsewhere."""

        def chosen(name: str, value: Tensor) -> Tensor:
            return torch.where(keep.to(value.device).view(-1, *[1] * (value.ndim - 1)), value, other.tensors[name])

        return Conditioning({name: chosen(name, value) for name, value in self.tensors.items()})

    def to(self, *args: Any) -> Conditioning:
        return self._map(lambda value: value.to(*args))

    def _map(self, f: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning({name: f(value) for name, value in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of all parts, in order. Raises: KeyError if the parts carry different tensors."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Backbone(Protocol):
    """A base model: the only code that knows its encoders, its autoencoder and its denoiser's arguments."""

    model: Model  # what it was made from
    denoiser: Denoiser
    path: Path  # levels of noise, native target, and times of training and sampling
    prediction_type: str  # what the denoiser's own output is: epsilon, v_prediction or flow
    guidance: Guidance  # if embedded, `predict` finds it in its conditioning as "guidance", (B,)
    resolution: int  # pixels, square
    latent_shape: tuple[int, int, int]
    lora_targets: Sequence[str]

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning: ...

    def release(self) -> None:
        """Lets go of the memory of text encoders and autoencoder; each is read again when it is next used."""
        ...

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt is longer than the text encoder reads, so that its end is not encoded."""
        ...

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to scaled latents; a posterior sample if given a generator, else its mode."""
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents to images, nominally in [0, 1]; overshoot is kept, clamp before showing to a `Reward`.

        Any number of them: without a graph they are decoded as many at a time as fit.
        """
        ...

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """What `denoiser` (which may be wrapped) predicts of `path.target`, converted to that at this boundary."""
        ...

    def pipeline_parts(self) -> Mapping[str, Any]:
        """Arguments of diffusers' pipeline: networks, tokenizers, and a scheduler with our sampler's times and levels.

        The class of the pipeline is what `in_diffusers` of the backbone's file says.
        """
        ...

    def pipeline_options(self, start: Tensor) -> Mapping[str, Any]:
        """Arguments of a call of that pipeline, from the latents `start` and without noise but for that."""
        ...


class Objective(Protocol):
    """What the training loop asks: how a batch becomes minibatches, and the loss of one."""

    @property
    def config(self) -> TrainingConfig: ...

    def minibatches(self, batch: Any, draws: Draws) -> Iterable[Part[Any]]:
        """Offline methods yield the batch; online methods roll out the policy and yield what it produced.

        `batch` holds this process's rows alone, and so does every minibatch: nothing is read, drawn or computed for
        another process. A minibatch is yielded with the number of rows that it has in all processes. Where that is
        the batch's, `Part(minibatch, draws.n)`; where it is known after a rollout only, rows are gathered and shared
        out anew by `trainable.shard`. All processes yield equally many.

        All randomness comes from `draws`, which the loop seeds by (seed, batch, row): so n processes train on what
        one would, and a resumed run equals an uninterrupted one bit for bit.
        """
        ...

    def loss(self, minibatch: Any) -> tuple[Tensor, Metrics]:
        """Scalar loss of this process's rows, and what to log about it.

        Each is the mean over rows, of which the loop takes the mean over processes. What is computed of all rows at
        once is computed of `trainable.shard.gather`.
        """
        ...


class Method(Objective, Protocol):
    """A tuning method: `methods/<name>.py` exports `Config` and `Method(config, policy, **needed)`.

    `Config.trained_on` names the scorers of the profile that the loss optimises.
    """

    # the batches of `minibatches`: a `PairBatch`, an `ImageBatch` of all images or of the liked ones, a `PromptBatch`,
    # or a `GroupBatch` of scored images by prompt, of `config.images` at most
    consumes: Literal["pairs", "images", "liked images", "prompts", "groups"]
    needs: tuple[str, ...]  # further arguments: "preference_model", a `StepReward`; "rewards", name -> `Reward`
    policy: Policy

    @property
    def config(self) -> MethodConfig: ...


class Trainable(Protocol):
    """What is trained. The training loop replaces `module`, which is what gets called, by its distributed wrapper."""

    module: nn.Module
    shard: Shard  # which rows this process computes
    reference_model: nn.Module | None  # the frozen network that serves as reference, where there is one
    moving_reference: MovingAverage | None  # its weights that follow `parameters`; None: it is frozen
    autocast: torch.dtype | None  # what a float32 network computes in; None: its own dtype

    def parameters(self) -> list[Tensor]:
        """The tensors that training may change."""
        ...


@runtime_checkable
class Reward(Protocol):
    """A scorer. Images (B, 3, H, W) float32 in [0, 1] and B prompts to (B,) scores, higher is better."""

    differentiable: bool  # whether gradients reach the images
    license: str  # of the weights
    expected_range: tuple[float, float] | None  # a mean score outside is an error; None = any is possible

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


@runtime_checkable
class FeatureExtractor(Protocol):
    """A scorer that also gives image features, by which diversity and drift are measured."""

    def features(self, images: Tensor) -> Tensor:
        """Unit features (B, D) of images (B, 3, H, W) in [0, 1], without gradient."""
        ...


@runtime_checkable
class ExplainedReward(Protocol):
    """A scorer that also gives the components of its scores."""

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Part -> its values (B,). Arguments as for scores."""
        ...


@runtime_checkable
class StepReward(Protocol):
    """A scorer of one-step predictions x_0 made at timestep t (B,); images as decoded, not clamped."""

    def __call__(self, images: Tensor, prompts: Sequence[str], t: Tensor) -> Tensor: ...
