"""Sample images of a training for the tracking UI: reference and policy side by side, the same prompts every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from attune.config.settings import Sampling
    from attune.diffusion.policy import Policy
    from attune.tracking import Run


def sampler(policy: Policy, prompts: Sequence[str], sampling: Sampling, seed: int, run: Run) -> Callable[[int], None]:
    """A function of the optimizer step that generates the images and logs them as one grid.

    Of several processes that train together each calls it and generates its part; the main one logs.

    At step 0 the policy is its reference, so the images are made once.
    """
    import torch

    from attune.diffusion.generate import generate_images
    from attune.evaluation.report.grid import image_grid

    def images() -> np.ndarray:
        def generated(rows: list[int]) -> Tensor:
            some = [prompts[row] for row in rows]
            return torch.from_numpy(generate_images(policy, some, [0] * len(some), sampling, seed, None))

        return policy.shard.map_rows(len(prompts), sampling.batch_size, generated).numpy()

    @cache  # made when first shown
    def reference() -> np.ndarray:
        with policy.reference():
            return images()

    def show(step: int) -> None:
        now = images() if step else reference()
        beside = {"reference": reference(), "policy": now}
        if policy.shard.is_main_process:
            run.image("images/samples", image_grid(beside, prompts), step)

    return show
