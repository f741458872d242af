"""Diffusion-DPO: raise the likelihood of chosen images over rejected ones, relative to the base.

A diffusion model's likelihood is bounded by its denoising error, so the DPO log-ratio of an image becomes
(minus) how much better than the reference the policy denoises it. Both images of a pair share the timestep
and the noise, so the difference comes from the images and not from the noise. The loss of the margin is a choice
(`loss`), and so is how much labels are trusted (`label_smoothing`, `ai_feedback`), what else holds the chosen image's
error down (`safeguard`, `sft_weight`), and whether the reference follows the policy (`reference`). Their sources are
in docs/methods/dpo.md.

Source: Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization",
arXiv:2311.12908, eq. 14 (its beta T w(t) is absorbed in `beta`, as in the authors' code).
Cost per step: one policy and one reference forward, and one backward, on 2 B images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import AIFeedback, Lora, MovingReference
from attune.data.batches import PairBatch
from attune.diffusion.inversion import inverted_noise
from attune.diffusion.losses import (
    denoising_error,
    descent_kept,
    expected_loss,
    hinge_loss,
    implicit_reward,
    ipo_loss,
    linear_loss,
    poly_loss,
    preference_loss,
    smoothed,
    with_gradient_times,
)
from attune.diffusion.noise import Draws
from attune.diffusion.noised import NoisedBatch, policy_error, prediction_and_target
from attune.distributed import Part
from attune.interfaces import Metrics
from attune.methods._given_images import GivenImagesConfig

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


LOSS_AT_REFERENCE = math.log(2)
"""The loss while the policy equals its reference, of the default `loss`."""


LOSSES = {"sigmoid": preference_loss, "ipo": ipo_loss, "hinge": hinge_loss}
"""Losses of the margin alone."""
OWNERS = {"alpha": "poly", "eta": "linear"}
"""A number -> the one loss that has it."""


class Config(GivenImagesConfig):
    """Defaults: the paper's training of SD 1.5, 2,000 steps of 2,048 pairs, section 5.1 and the authors' code."""

    lora: Lora | None = Field(None, description="null = train every weight, in float32, as the paper does")
    lr: Float = Field(2.048e-5, gt=0, description="learning rate; paper: 1e-8 times the 2,048 pairs of a step")
    warmup: int = Field(500, ge=0, description="optimizer steps of linear warm-up; authors' code: 500")
    batches: int = Field(512_000, ge=1, description="batches of pairs; paper: 2,000 steps")
    batch_size: int = Field(8, ge=1, description="pairs per batch")
    accumulation: int = Field(256, ge=1, description="batches per optimizer step; paper: 2,048 pairs to a step")
    gradient_checkpointing: bool = Field(True, description="saves memory: activations are computed twice")
    beta: Float = Field(
        2000.0, gt=0, description="strength of the KL penalty; the loss uses beta / 2. Paper: 2000 SD 1.5, 5000 SDXL"
    )
    caption_dropout: Float = Field(
        0.2, ge=0, lt=1, description="share of pairs trained without their prompt; authors' code: 0.2"
    )
    loss: Literal["sigmoid", "ipo", "hinge", "poly", "linear"] = Field(
        "sigmoid", description="loss of the margin between chosen and rejected image; sigmoid is the paper's"
    )
    alpha: Float | None = Field(
        None,
        ge=-1,
        validate_default=True,
        description="of loss: poly, how much more right pairs pull; paper: 8 for Pick-a-Pic v2, 0 for clean labels",
    )
    eta: Float | None = Field(
        None,
        ge=0,
        le=0.5,
        validate_default=True,
        description="of loss: linear, a pair's least weight; the largest is 1 - eta. Paper: 0.001 SD 1.5, 0 SDXL",
    )
    safeguard: Float | None = Field(
        None,
        ge=0,
        le=1,
        description="share mu of the chosen image's descent that a rejected one must leave (SDPO); null = none. Paper: "
        "0.9 SD 1.5, 0.6 SDXL",
    )
    sft_weight: Float = Field(
        0.0, ge=0, description="of the chosen image's denoising error, added to the loss as an anchor; 0 = none"
    )
    label_smoothing: Float = Field(
        0.0, ge=0, lt=0.5, description="share of labels taken to be wrong (conservative DPO); paper: 0"
    )
    ai_feedback: AIFeedback | None = Field(
        None, description="labels from a scorer beside people's or instead of them; null = people's alone"
    )
    noise: Literal["random", "inverted"] = Field(
        "random",
        description="what images are shown with: random = one noise for both, as the paper; inverted = the noise that "
        "each was made from, by the sampler run backwards (InPO, SmPO)",
    )
    inversion_steps: int = Field(5, ge=1, description="of noise: inverted, steps from the image to its time t")
    heun: bool = Field(
        False, description="of noise: inverted, two calls of the denoiser a step, which are nearer (SmPO); else one"
    )
    reference: MovingReference | None = Field(
        None, description="lets the reference follow the policy, as Linear-DPO does; null = frozen, as the paper has it"
    )

    @field_validator(*OWNERS)
    @classmethod
    def _goes_with_its_loss(cls, value: float | None, info: ValidationInfo) -> float | None:
        loss, key = info.data.get("loss"), str(info.field_name)
        if value is None and loss == OWNERS[key]:
            raise ValueError(f"loss: {loss} needs {key}, which is not set")
        if value is not None and loss not in (None, OWNERS[key]):
            raise ValueError(f"{key} belongs to loss: {OWNERS[key]}, and loss is {loss}; leave it out, or change loss")
        return value

    @property
    def trained_on(self) -> tuple[str, ...]:
        return (self.ai_feedback.scorer,) if self.ai_feedback else ()


def pair_loss(config: Config, margin: Tensor, error_gap: Tensor) -> Tensor:
    """The loss that `config` names, of each pair, (B,).

    Args:
        margin: implicit reward of the chosen image minus that of the rejected one, nats, (B,).
        error_gap: squared error of the policy on the chosen image minus that on the rejected one, (B,).
    """
    if config.alpha is not None:
        return poly_loss(margin, config.alpha)
    if config.eta is not None:
        return linear_loss(margin, error_gap, config.eta)
    return LOSSES[config.loss](margin)


class Method:
    consumes = "pairs"
    needs = ()

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy
        if config.reference is not None:
            policy.move_reference(config.reference.ema_decay, config.reference.warmup)

    def minibatches(self, batch: PairBatch, draws: Draws) -> Iterable[Part[NoisedBatch]]:
        t, noise = batch.draw_noise(self.policy.backbone.path, draws)
        cond = self.policy.drop_captions(batch.cond, self.config.caption_dropout, draws)
        pairs = NoisedBatch.pairs(batch.chosen, batch.rejected, t, noise, cond, batch.p_chosen)
        yield Part(pairs if self.config.noise == "random" else self.with_their_own_noise(pairs), draws.n)

    def with_their_own_noise(self, pairs: NoisedBatch) -> NoisedBatch:
        """The images with the noise that the policy as it is now would make each of them from."""
        c, path = self.config, self.policy.backbone.path

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return self.policy.predict(x_t, t, pairs.cond, c.embedded_guidance)

        with self.policy.merged():
            noise = inverted_noise(predict, path, pairs.x_0, pairs.t.to(pairs.x_0.device), c.inversion_steps, c.heun)
        return replace(pairs, noise=noise)

    def loss(self, minibatch: NoisedBatch) -> tuple[Tensor, Metrics]:
        error, reference_error, options = self.errors(minibatch)
        chosen, rejected = implicit_reward(error, reference_error, self.config.beta).chunk(2)
        margin = chosen - rejected
        p_chosen = smoothed(minibatch.p_chosen, self.config.label_smoothing)
        chosen_error, rejected_error = error.chunk(2)
        loss = expected_loss(partial(pair_loss, self.config), margin, p_chosen, chosen_error - rejected_error).mean()
        if self.config.sft_weight:
            loss = loss + self.config.sft_weight * chosen_error.mean()
            options["chosen_error"] = chosen_error.mean()
        return loss, {
            "loss": loss,
            "margin": margin.mean(),
            "accuracy": (margin > 0).float().mean(),
            "chosen_reward": chosen.mean(),
            "rejected_reward": rejected.mean(),
            **options,
        }

    def errors(self, minibatch: NoisedBatch) -> tuple[Tensor, Tensor, Metrics]:
        """Squared errors of policy and reference, (2B,) each, and what the safeguard did."""
        prediction, target = prediction_and_target(self.policy, minibatch, self.config.embedded_guidance)
        error, metrics = denoising_error(prediction, target), Metrics()
        if self.config.safeguard is not None:
            chosen_residual, rejected_residual = (prediction.float() - target.float()).chunk(2)
            kept = descent_kept(chosen_residual, rejected_residual, self.config.safeguard)
            chosen, rejected = error.chunk(2)
            error = torch.cat([chosen, with_gradient_times(rejected, kept)])
            metrics = {"safeguard": kept.mean(), "safeguarded": (kept < 1).float().mean()}
        with self.policy.reference():
            return error, policy_error(self.policy, minibatch, self.config.embedded_guidance), metrics
