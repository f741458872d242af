"""The schedule of a variance-preserving model, as the scheduler in its folder says; what its denoiser predicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attune.backbones import _latent
from attune.config.settings import Model
from attune.diffusion.path import VP
from attune.diffusion.process import Level, velocity_to_noise

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

SAMPLERS = (
    *("DDIM", "DDIMParallel", "DDIMInverse", "DDPM", "DDPMParallel", "PNDM", "LMSDiscrete", "LCM", "TCD", "SASolver"),
    *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
    *("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep", "DPMSolverSDE"),
    *("DEISMultistep", "UniPCMultistep"),
)
SCHEDULERS = frozenset(f"{name}Scheduler" for name in SAMPLERS)
"""diffusers' samplers of models trained as DDPM's are; EDM and flow matching have their own."""


def check_settings(model: Model) -> None:
    """Raises ValueError for settings of flow models, which would change nothing here."""
    if model.density is not None:
        raise ValueError(f"model.density: only flow models have one, and {model.backbone} is none; remove it")
    if model.max_sequence_length is not None:
        says = "only a T5 or an LLM can be told how much to read, a CLIP reads as many tokens as it has positions for"
        raise ValueError(f"model.max_sequence_length: {says}, and {model.backbone} has no other; remove it")


def load_schedule(model: Model) -> tuple[Tensor, str]:
    """alphas_cumprod (T,) float32, and what the denoiser predicts: epsilon or v_prediction.

    Which of its family's samplers a pipeline names does not matter: the schedule of its training is the same.

    Raises:
        ValueError: the model is of another family (EDM, flow matching, a distilled decoder), or the schedule is none.
        FileNotFoundError: there is no scheduler.
    """
    from diffusers import DDIMScheduler

    check_settings(model)
    config, file = _latent.scheduler_config(model)
    _check_family(config, file)
    try:
        scheduler = DDIMScheduler.from_config(config)
        alphas, predicts = scheduler.alphas_cumprod, scheduler.config.prediction_type
    except Exception as error:  # values of a wrong type or size fail in as many ways
        raise ValueError(f"{file}: its schedule cannot be computed: {' '.join(str(error).split())[:200]}") from error
    if predicts not in ("epsilon", "v_prediction"):
        raise ValueError(f"{file}: prediction_type {predicts!r:.40} is not supported")
    _check_schedule(alphas, file)
    return alphas, predicts


def _check_schedule(alphas: Tensor, file: Path) -> None:
    """Raises ValueError unless the signal left falls at every step, from below 1 to nearly but not quite nothing."""
    if alphas[-1] == 0:
        raise ValueError(f"{file}: a schedule that ends in pure noise (zero SNR) has no x_0 there to predict")
    falls = len(alphas) > 1 and bool((alphas.diff() < 0).all())  # false if there is a NaN
    if not (falls and alphas[-1] > 0 and alphas[0] < 1):
        raise ValueError(
            f"{file}: its schedule is none: the signal left must fall at every step, from below 1 to above 0"
        )
    if alphas[-1] > 0.1:  # Stable Diffusion's is 0.005; sampling starts from pure noise
        raise ValueError(f"{file}: its last step keeps {alphas[-1]:.0%} of the signal; is num_train_timesteps right?")


def _check_family(config: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError unless a scheduler is of models that are trained on `process.add_noise` at whole timesteps."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ValueError(f"{file}: a model for {name!r:.60} is no Stable Diffusion and not supported")
    kind = config.get("timestep_type")
    odd = [] if kind in (None, "discrete") else [f"timestep_type: {kind!s:.40}"]
    odd += [key for key in ("use_flow_sigmas", "sigma_data", "sigma_schedule") if config.get(key)]
    if odd:
        raise ValueError(f"{file}: a model with {odd[0]} is not supported; it is no Stable Diffusion")


def to_noise(output: Tensor, predicts: str, x_t: Tensor, at: Level) -> Tensor:
    """A denoiser's output as epsilon, in the dtype of x_t."""
    output = output.to(x_t.dtype)
    return output if predicts == "epsilon" else velocity_to_noise(output, x_t, at)


def ddim_scheduler(path: VP, prediction_type: str) -> DDIMScheduler:
    """Our sampler's times and levels on a variance-preserving path."""
    from diffusers import DDIMScheduler

    products = path.alphas_cumprod.cpu().double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
    settings: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return DDIMScheduler(
        num_train_timesteps=path.n_train,
        prediction_type=prediction_type,
        trained_betas=(1 - products / before).numpy(),  # beta_t = 1 - a_t / a_(t-1)
        **settings,
    )
