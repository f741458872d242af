"""Losses several methods share, as pure functions.

The preference losses take a pair's margin m (B,): implicit reward of the chosen image minus that of the rejected
one, in nats, 0 where policy equals reference. Means are taken of their values, never inside them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error per sample, mean over latent dimensions, (B,)."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)


def implicit_reward(error: Tensor, reference_error: Tensor, beta: float) -> Tensor:
    """How much more likely an image is under the policy than under the reference, nats, (B,).

    -(beta / 2) (e - e_ref) with e the squared denoising error, mean over latent dimensions.
    Source: Wallace et al. 2023, arXiv:2311.12908, eq. 14, whose beta T w(t) is absorbed in `beta`.
    """
    return -0.5 * beta * (error - reference_error)


def descent_kept(chosen_residual: Tensor, rejected_residual: Tensor, mu: float) -> Tensor:
    """lambda (B,) in [0, 1]: the share of the rejected image's gradient at which the chosen one's error still falls.

    A step that raises the rejected image's error moves the prediction along its residual r_l; where that has a part
    along the chosen image's residual r_w, it raises the chosen one's error too. With lambda at most
    (1 - mu) |r_w|^2 / <r_w, r_l> a share mu of the chosen one's descent is left, to first order, and exactly where
    both predictions have one Jacobian.

    Args:
        chosen_residual: prediction minus target, (B, C, h, w); no gradient passes.
        mu: 0 to 1.

    Source: Diffusion-SDPO, arXiv:2511.03317, whose code has one lambda for a whole micro-batch, and 1e-9 in the
    denominator; here it is of each pair, so that it depends on no batch size, and has no scale.
    """
    chosen, rejected = (r.detach().float().flatten(1) for r in (chosen_residual, rejected_residual))
    agreement = (chosen * rejected).sum(1)
    kept = (1 - mu) * chosen.square().sum(1) / agreement
    return torch.where(agreement > 0, kept.clamp(0, 1), 1.0)


def with_gradient_times(value: Tensor, factor: Tensor) -> Tensor:
    """The same value to the last bit, and `factor` times its gradient."""
    return value.detach() + factor * (value - value.detach())


def preference_loss(margin: Tensor) -> Tensor:
    """-log sigmoid(m), (B,); ln 2 at m = 0.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; of diffusion models Wallace et al. 2023, eq. 14.
    """
    return -F.logsigmoid(margin)


def ipo_loss(margin: Tensor) -> Tensor:
    """(m - 1/2)^2, (B,); 1/4 at m = 0. Its minimum is at a margin of 1/2; `preference_loss` has none.

    The paper's loss is (h - 1 / (2 tau))^2 of the log-ratio h, which here is m / beta. With tau = beta it is
    (m - 1/2)^2 / beta^2; the constant is left out, so that gradients have the size of the other losses'.
    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    return (margin - 0.5) ** 2


def hinge_loss(margin: Tensor) -> Tensor:
    """max(0, 1 - m), (B,); 1 at m = 0. A pair that is clearly right stops pulling.

    Source: the calibration loss of Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425, with log-ratios to the reference
    in the place of log-likelihoods, as in Liu et al. 2023 (RSO), arXiv:2309.06657.
    """
    return F.relu(1 - margin)


def poly_loss(margin: Tensor, alpha: float) -> Tensor:
    """-log p + alpha (1 - p) with p = sigmoid(m), (B,); ln 2 + alpha / 2 at m = 0.

    Its pull is that of `preference_loss` times 1 + alpha p: with alpha > 0 pairs that are right already go on pulling,
    which suits labels that are often wrong; with alpha < 0 they pull less.
    Source: Poly-DPO of ViPO, arXiv:2604.24953.
    """
    return preference_loss(margin) + alpha * torch.sigmoid(-margin)


def linear_loss(margin: Tensor, error_gap: Tensor, eta: float) -> Tensor:
    """w (e_chosen - e_rejected) with w = 0.5 - 0.4 m, held between eta and 1 - eta, (B,); half the gap at m = 0.

    w has no gradient: a pair pulls by w, the more the wronger it is, where `preference_loss` has sigmoid(-m).

    Args:
        error_gap: denoising error of the chosen image minus that of the rejected one, (B,).

    Source: Linear-DPO, arXiv:2605.21123; 0.4 m is its 0.2 beta M, as m = (beta / 2) M. Its text has 1 for 1 - eta,
    its code has 1 - eta.
    """
    return (0.5 - 0.4 * margin).clamp(eta, 1 - eta).detach() * error_gap


def smoothed(p_chosen: Tensor | float, label_smoothing: float) -> Tensor | float:
    """The probability that a pair is labelled rightly, if a share `label_smoothing` of labels is flipped.

    Source: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO" (conservative DPO).
    """
    return p_chosen + label_smoothing * (1 - 2 * p_chosen)


def expected_loss(
    loss: Callable[..., Tensor], margin: Tensor, p_chosen: Tensor | float, *differences: Tensor
) -> Tensor:
    """p loss(m) + (1 - p) loss(-m), (B,): what a loss costs when the label is right with probability p.

    For `preference_loss` this is the cross-entropy -[p log sigmoid(m) + (1 - p) log sigmoid(-m)].

    Args:
        differences: what `loss` takes besides the margin, of the chosen image minus the rejected one.
    """
    wrong = loss(-margin, *(-difference for difference in differences))
    return p_chosen * loss(margin, *differences) + (1 - p_chosen) * wrong
