"""Labels from a scorer instead of people, or beside them.

Source: Wallace et al. 2023 (Diffusion-DPO), arXiv:2311.12908, section 5.2, learns from AI feedback; Liang et al.
2024 (SPO), arXiv:2406.04314, relabels its SDXL pairs with PickScore; authors' `update_as_pickscore_label`.
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from attune.config.settings import AIFeedback


def relabel(scores_0: Tensor, scores_1: Tensor, threshold: float = 0.1) -> Tensor:
    """Labels (B,) from a scorer instead of people: 1, 0, or 0.5 where its probabilities are too close.

    Close means that the two softmax probabilities differ by no more than `threshold`; their difference is
    tanh(d / 2) for scores d apart, so 0.1 asks for d > 0.2007. SPO's SDXL model was trained on such labels.
    """
    gap = torch.tanh((scores_0 - scores_1) / 2)
    return 0.5 + 0.5 * (gap > threshold).float() - 0.5 * (gap < -threshold).float()


def with_ai_feedback(pairs: pd.DataFrame, feedback: AIFeedback | None) -> pd.DataFrame:
    """The pairs with `label_0` moved towards a scorer's opinion of the clean images.

    Args:
        pairs: columns label_0 and, of the prepare stage, `<scorer>_0` and `<scorer>_1`.
        feedback: whose opinion, how sharp and how much of it; None leaves the labels to people.

    Raises:
        ValueError: the pairs carry no scores by that scorer.
    """
    if feedback is None:
        return pairs
    columns = [f"{feedback.scorer}_0", f"{feedback.scorer}_1"]
    if not set(columns) <= set(pairs.columns):
        raise ValueError(
            f"ai_feedback.scorer: no scores by {feedback.scorer!r} in the pairs; name it in data.score_with"
        )
    scores_0, scores_1 = (torch.tensor(pairs[column].to_numpy()) / feedback.temperature for column in columns)
    if feedback.threshold is None:
        opinion = torch.sigmoid(scores_0 - scores_1)
    else:
        opinion = relabel(scores_0, scores_1, feedback.threshold)
    people = pairs.label_0
    return pairs.assign(label_0=people + feedback.weight * (opinion.double().numpy() - people))
