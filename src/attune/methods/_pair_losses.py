"""What methods that compare the errors on two images of a prompt with a reference's decide alike: DPO and SPIN."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from attune.config.schema import Float
from attune.diffusion.losses import (
    denoising_error,
    descent_kept,
    expected_loss,
    hinge_loss,
    ipo_loss,
    linear_loss,
    poly_loss,
    preference_loss,
    with_gradient_times,
)
from attune.diffusion.noised import NoisedBatch, policy_error, prediction_and_target
from attune.interfaces import Metrics
from attune.methods._given_images import GivenImagesConfig

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy

OWNERS = {"alpha": "poly", "eta": "linear"}
"""A number -> the one loss that has it."""


class PairLossConfig(GivenImagesConfig):
    """Settings that the methods of this family share; a number that belongs to one loss is given with that loss."""

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

    @field_validator(*OWNERS)
    @classmethod
    def _goes_with_its_loss(cls, value: float | None, info: ValidationInfo) -> float | None:
        loss, key = info.data.get("loss"), str(info.field_name)
        if value is None and loss == OWNERS[key]:
            raise ValueError(f"loss: {loss} needs {key}, which is not set")
        if value is not None and loss not in (None, OWNERS[key]):
            raise ValueError(f"{key} belongs to loss: {OWNERS[key]}, and loss is {loss}; leave it out, or change loss")
        return value


LOSSES = {"sigmoid": preference_loss, "ipo": ipo_loss, "hinge": hinge_loss}


def pair_errors(policy: Policy, m: NoisedBatch, config: PairLossConfig) -> tuple[Tensor, Tensor, Metrics]:
    """Squared errors of policy and reference, (2B,) each, and what to log of the options."""
    prediction, target = prediction_and_target(policy, m, config.embedded_guidance)
    error, metrics = denoising_error(prediction, target), Metrics()
    if config.sft_weight:
        metrics |= {"chosen_error": error.chunk(2)[0].mean()}
    if config.safeguard is not None:
        chosen_residual, rejected_residual = (prediction.float() - target.float()).chunk(2)
        kept = descent_kept(chosen_residual, rejected_residual, config.safeguard)
        chosen, rejected = error.chunk(2)
        error = torch.cat([chosen, with_gradient_times(rejected, kept)])
        metrics |= {"safeguard": kept.mean(), "safeguarded": (kept < 1).float().mean()}
    with policy.reference():
        return error, policy_error(policy, m, config.embedded_guidance), metrics


def pair_loss(config: PairLossConfig, error: Tensor, margin: Tensor, p_chosen: Tensor | float) -> Tensor:
    """The loss that `config` names, a scalar: its mean over pairs, each expected over its label; and the anchor.

    The anchor is the loss of supervised fine-tuning on the chosen images, which keeps their error from rising. Source:
    SimpleTuner's DPO (bghira/SimpleTuner bc8e6ab) has it, and MaPO (arXiv:2406.06424) beside a margin without a
    reference; of language models Pang et al. 2024, arXiv:2404.19733, and Liu et al. 2024, arXiv:2405.16436.

    Args:
        error: squared errors of the policy, (2B,).
        margin: implicit reward of the chosen image minus that of the rejected one, nats, (B,).
        p_chosen: probability that a pair is labelled rightly, (B,).
    """
    chosen, rejected = error.chunk(2)
    loss = expected_loss(partial(_named_loss, config), margin, p_chosen, chosen - rejected).mean()
    return loss + config.sft_weight * chosen.mean() if config.sft_weight else loss


def _named_loss(config: PairLossConfig, margin: Tensor, error_gap: Tensor) -> Tensor:
    if config.alpha is not None:
        return poly_loss(margin, config.alpha)
    if config.eta is not None:
        return linear_loss(margin, error_gap, config.eta)
    return LOSSES[config.loss](margin)
