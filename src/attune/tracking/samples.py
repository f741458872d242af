"""Sample images of a training for the tracking UI: reference and policy side by side, the same prompts every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from attune.config.settings import Sampling
    from attune.diffusion.policy import Policy
    from attune.tracking import Run


def sampler(policy: Policy, prompts: Sequence[str], sampling: Sampling, seed: int, run: Run) -> Callable[[int], None]:
    """A function of the optimizer step that generates the images and logs them as one grid.

    At step 0 the policy is its reference, so the images are made once.
    """
    from attune.diffusion.generate import generate_images
    from attune.evaluation.report.grid import image_grid

    def images() -> np.ndarray:
        return generate_images(policy, prompts, [0] * len(prompts), sampling, seed, None)

    @cache  # made when first shown: where several processes train, only the main process shows anything
    def reference() -> np.ndarray:
        with policy.reference():
            return images()

    def show(step: int) -> None:
        now = images() if step else reference()
        run.image("images/samples", image_grid({"reference": reference(), "policy": now}, prompts), step)

    return show
