"""Listwise losses: case 27, formulas in float64."""

import pytest
import torch
from golden.reading import tensors

from attune.diffusion.losses import denoising_error, implicit_reward
from attune.methods.listwise import lair_loss, plackett_luce_loss

pytestmark = pytest.mark.parity


def advantages(case):
    """s (3 prompts, 4 images), and the prediction that gradients are taken of."""
    predicted = case["model_pred"].clone().requires_grad_()
    errors = [
        denoising_error(p.flatten(0, 1), case["target"].flatten(0, 1)).view(3, 4) for p in (predicted, case["ref_pred"])
    ]
    return errors[1] - errors[0], predicted


def compare(table, name, per_prompt, predicted, case, key, **bounds):
    (gradient,) = torch.autograd.grad(per_prompt.mean(), predicted)
    table.close("27", f"{name}, loss", per_prompt.double(), case[f"{key}.per_prompt_loss_f64"], **bounds)
    table.close("27", f"{name}, gradient", gradient.double(), case[f"{key}.grad_model_pred_f64"], rel=1e-4)


@pytest.mark.parametrize("tau", [0.1, 1])
@pytest.mark.parametrize("ridge", [0.5, 50])
def test_lair(table, tau, ridge):
    case = tensors("27_listwise")
    s, predicted = advantages(case)
    table.close("27", "advantage", s.double(), case["s_f64"], rel=1e-4)
    loss = torch.stack([lair_loss(*each, tau, ridge) for each in zip(s, case["rewards"], strict=True)])
    compare(table, "LAIR", loss, predicted, case, f"lair.tau{tau}.lam{ridge}", absolute=1e-8)


@pytest.mark.parametrize("beta", [2000, 5000])
def test_plackett_luce(table, beta):
    case = tensors("27_listwise")
    s, predicted = advantages(case)
    implicit = implicit_reward(-s, torch.zeros_like(s), beta)
    loss = torch.stack([plackett_luce_loss(*each) for each in zip(implicit, case["rewards"], strict=True)])
    compare(table, "Plackett-Luce", loss, predicted, case, f"plackett_luce.beta{beta}", rel=1e-4)
    best_two = [row[order[:2]] for row, order in zip(implicit, case["plackett_luce.order"], strict=True)]
    of_two = torch.stack([plackett_luce_loss(row, torch.tensor([1.0, 0.0])) for row in best_two]).mean()
    expected = case[f"plackett_luce.beta{beta}.first_two_only_loss_f64"]
    table.close("27", "Plackett-Luce of two", of_two.double(), expected, rel=1e-4)
