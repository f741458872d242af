"""The training objective of the step-aware preference model: which of two equally noised images a person chose.

Both images of a pair are noised alike to a random timestep, predicted back in one step by the frozen base,
and scored at that timestep; the loss is the Kullback-Leibler divergence of the label from the softmax of the
two scores.

Source: Kirstain et al. 2023 (PickScore), arXiv:2305.01569, eq. 2; Liang et al. 2024 (SPO), arXiv:2406.04314,
section 3.2. Released models: lr 3e-6 (SD 1.5) or 1e-6 (SDXL), weight decay 0.3, batch 64, guidance 5.
Cost per batch of B pairs: 2 B guided denoiser calls and decodings; 2 B vision and B text passes forward and
back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from attune.averages import MovingAverage
from attune.clip.model import image_size, load_tokenizer, text_config, tokenise
from attune.config.settings import PreferenceConfig as Config
from attune.diffusion.noise import Draws
from attune.distributed import Part, Shard
from attune.hub import fetch_file, parse
from attune.interfaces import Conditioning, Metrics
from attune.spm.model import StepAwareCLIP, from_clip, load, training_pixels
from attune.spm.noising import one_step_latents

if TYPE_CHECKING:
    from attune.data.batches import PairBatch
    from attune.diffusion.policy import Policy


@dataclass(frozen=True)
class NoisedPairs:
    """B noised pairs, ready to be scored: pixel values (2, B, 3, S, S), token ids (B, L), t, label_0, weight (B,)."""

    pixel_values: Tensor
    input_ids: Tensor
    t: Tensor
    label_0: Tensor
    weight: Tensor
    weight_sum: Tensor | None = None  # what weights are divided by, where B is a part of the pairs; None = their sum


def starting_model(config: Config) -> tuple[StepAwareCLIP, CLIPTokenizer]:
    """The model that training starts from: the plain CLIP made step-aware, or trained step-aware weights."""
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    if config.weights is None:
        return from_clip(config.clip, tokenizer)
    return load(fetch_file(parse(config.weights)), config.clip, tokenizer)


# ---------------------------------------------------------------- pure functions


def preference_criterion(
    scores_0: Tensor, scores_1: Tensor, label_0: Tensor, weight: Tensor | None = None, weight_sum: Tensor | None = None
) -> Tensor:
    """KL(label || softmax of the two scores), weighted mean, nats.

    For hard labels the negative log-likelihood of the choice, ln 2 at equal scores; a tie (0.5) costs 0 when
    the scores are equal, where plain cross-entropy would cost ln 2.

    Args:
        scores_0, scores_1: (B,) scores of the two images.
        label_0: (B,) probability that image 0 is preferred: 1, 0 or 0.5.
        weight: (B,) weights, normalised here to sum to 1; 1 / pairs of the prompt, so that a prompt with many
            pairs does not count more. None: equal.
        weight_sum: scalar to divide the weights by instead of their sum.

    Returns: scalar.
    """
    label = torch.stack([label_0, 1 - label_0]).to(scores_0.dtype)
    log_p = F.log_softmax(torch.stack([scores_0, scores_1]), dim=0)
    divergence = (torch.xlogy(label, label) - label * log_p).sum(0)
    weight = torch.ones_like(divergence) if weight is None else weight.to(divergence.dtype)
    return (weight / (weight.sum() if weight_sum is None else weight_sum) * divergence).sum()


def accuracy(scores_0: Tensor, scores_1: Tensor, label_0: Tensor) -> Tensor:
    """Share of decided pairs whose chosen image scores strictly higher, scalar; 0.5 if all are ties."""
    decided = label_0 != 0.5
    if not decided.any():
        return scores_0.new_tensor(0.5)
    margin = torch.where(label_0 > 0.5, scores_0 - scores_1, scores_1 - scores_0)
    return (margin[decided] > 0).float().mean()


# ---------------------------------------------------------------- the objective


class SPMObjective:
    """An `Objective` over labelled pairs, and the `Trainable` that it trains: all of the CLIP.

    `base` is a policy without an adapter, which is not trained.
    """

    def __init__(self, config: Config, model: StepAwareCLIP, tokenizer: CLIPTokenizer, base: Policy) -> None:
        self.config, self.tokenizer, self.base = config, tokenizer, base
        self.model = model.train().requires_grad_(True)
        for weight in [] if config.step_aware else model.adaln_parameters():
            weight.requires_grad_(False)
        self.model.checkpointing = config.gradient_checkpointing
        self.module: nn.Module = model  # the training loop replaces it by its distributed wrapper
        self.shard = Shard()  # of the training this process takes part in
        self.reference_model: nn.Module | None = None  # nothing is compared with a frozen copy
        self.moving_reference: MovingAverage | None = None
        self.autocast: torch.dtype | None = None  # `loss` chooses its own precision

    def parameters(self) -> list[Tensor]:
        """The trainable weights: vision and text tower, projections and temperature."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def minibatches(self, batch: PairBatch, draws: Draws) -> Iterable[Part[NoisedPairs]]:
        t, noise = batch.draw_noise(self.base.backbone.path, draws)
        pairs = self.prepare_batch(batch, t, noise)
        weights = self.shard.gather(pairs.weight[: self.shard.count(draws.n)])  # of all processes
        share = len(pairs.weight) / len(weights)
        yield Part(replace(pairs, weight_sum=weights.sum() * share), draws.n)

    def prepare_batch(self, batch: PairBatch, t: Tensor, noise: Tensor) -> NoisedPairs:
        """The pairs as the model is given them: noised to t (B,) with noise (B, C, h, w), and predicted back."""
        clip, here = self.model.model, batch.latents_0.device
        images = self.one_step_images(batch, t.to(here), noise.to(here))
        pixels = training_pixels(images.float(), image_size(clip)).unflatten(0, (2, -1))
        ids = tokenise(self.tokenizer, batch.prompts, text_config(clip.config).max_position_embeddings)
        return NoisedPairs(*(x.to(clip.device) for x in (pixels, ids, t, batch.label_0, batch.weight)))

    @torch.no_grad()
    def one_step_images(self, batch: PairBatch, t: Tensor, noise: Tensor) -> Tensor:
        """Both images of each pair as the base predicts them at t: (2B, 3, H, W), images 0 then images 1.

        At t = 0 they are the images themselves, because there SPO scores finished images. (The authors noise
        and predict at 0 as elsewhere, yet score finished images at 0.)
        """
        x_0, t = torch.cat([batch.latents_0, batch.latents_1]), t.repeat(2)
        if not t.any():
            return self.base.backbone.decode_latents(x_0)
        predicted = one_step_latents(
            self._guided,
            self.base.backbone.path,
            x_0,
            t,
            noise.repeat(2, 1, 1, 1),
            batch.cond.repeat(2),
        )
        return self.base.backbone.decode_latents(torch.where((t == 0)[:, None, None, None], x_0, predicted))

    def loss(self, minibatch: NoisedPairs) -> tuple[Tensor, Metrics]:
        m = minibatch
        half = torch.autocast(m.t.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
        with half:
            scores_0, scores_1 = self.module(m.pixel_values, m.input_ids, m.t).float()
        loss = preference_criterion(scores_0, scores_1, m.label_0, m.weight, m.weight_sum)
        margin = (2 * m.label_0 - 1) * (scores_0 - scores_1)
        return loss, {
            "loss": loss,
            "margin": margin.mean(),
            "accuracy": accuracy(*map(self.shard.gather, (scores_0, scores_1, m.label_0))),
            "gap": (scores_0 - scores_1).abs().mean(),
        }

    def _guided(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.base.predict(x_t, t, cond, self.config.guidance_scale)
