"""A step of the step-aware preference model: attune's, and the same in the order of the authors' code (RockeyCoss/SPO).

Order of operations of `spm_task.py` and `spm_criterion.py`: in each step prompts are encoded by the diffusion model's
text encoder; both images are encoded, noised, predicted back with guidance, decoded and resized, each by calls of its
own; then the preference model encodes texts, padded to full length, and all images at once.
attune encodes images and prompts once, when data are prepared, and gives both images to the networks together.
The model in training is a small one on both sides, so that the diffusion model's share shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_rows import draws_of, trained
from plain import adamw_step, frozen_unet, frozen_vae, schedule, text_encoder
from speed_sides import CLIP, LR, WEIGHT_DECAY, Place, Side, base_policy, loop_settings, pixels, prompts, scalar
from torch import Tensor

from attune.clip.pixels import normalise
from attune.config.settings import PreferenceConfig
from attune.data.batches import PairBatch
from attune.spm.model import from_clip
from attune.spm.objective import SPMObjective

GUIDANCE = 5.0


def labels(n: int, device: torch.device) -> Tensor:
    """Which image is better: the first, neither, or the second, in turn."""
    return torch.tensor([(1.0, 0.5, 0.0)[i % 3] for i in range(n)], device=device)


def ours(place: Place) -> Side:
    """attune's objective and training step, on prepared pairs."""
    base, n = base_policy(place), place.n
    backbone, generator = base.backbone, torch.Generator().manual_seed(0)
    latents = [backbone.encode_images(images, generator) for images in pixels(2 * n, place).chunk(2)]
    weight = torch.ones(n, device=place.device)
    pairs = PairBatch(prompts(n), backbone.encode_prompts(prompts(n)), *latents, labels(n, place.device), weight)
    clip, words = from_clip(str(CLIP))
    settings = loop_settings(place) | {"precision": place.dtype, "guidance_scale": GUIDANCE}
    objective = SPMObjective(PreferenceConfig(clip=str(CLIP), **settings), clip.to(place.device), words, base)
    step = trained(objective, objective, pairs, n)
    return Side(lambda: {"loss": scalar(step()["loss"])}, objective.parameters())


def in_order_of_the_authors(place: Place) -> Side:
    clip, words = from_clip(str(CLIP))
    clip = clip.to(place.device).train().requires_grad_(True)
    config, n, noised = clip.model.config, place.n, _noised(place)
    size, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    ids, label = words(prompts(n), **options).input_ids.to(place.device), labels(n, place.device)

    def loss() -> Tensor:
        *images, t = noised()
        shown = torch.cat([_shown(image, size) for image in images])
        with torch.autocast(place.device.type, place.computes, enabled=place.computes != torch.float32):
            text = clip.model.get_text_features(input_ids=ids).pooler_output
            image = clip.image_features(shown, t.repeat(2))
        text, image = text.float() / text.float().norm(dim=-1, keepdim=True), image.float()
        logits = clip.model.logit_scale.exp() * text @ (image / image.norm(dim=-1, keepdim=True)).T
        return criterion(torch.stack([part.diagonal() for part in logits.chunk(2, dim=-1)], dim=-1), label)

    weights = list(clip.parameters())
    step = adamw_step(weights, loss, LR, WEIGHT_DECAY, max_grad_norm=1.0)
    return Side(lambda: {"loss": scalar(step())}, weights)


def criterion(logits: Tensor, label_0: Tensor) -> Tensor:
    """Cross-entropy of labels against the scores (n, 2) of both images, without the entropy of ties; the mean."""
    first, second = (F.cross_entropy(logits, torch.full_like(label_0, i).long(), reduction="none") for i in (0, 1))
    ties = (label_0 == 0.5).float() * torch.log(torch.tensor(0.5, device=logits.device))
    return (label_0 * first + (1 - label_0) * second + ties).mean()


def _shown(images: Tensor, size: int) -> Tensor:
    small = F.interpolate((images / 2 + 0.5).clamp(0, 1).float(), (size, size), mode="bicubic", align_corners=False)
    return normalise(small.clamp(0, 1))


def _noised(place: Place) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """What gives both images as predicted back from t, in [-1, 1], and t."""
    n, dtype, device = place.n, place.computes, place.device
    unet, vae = frozen_unet(place.folder, dtype, device), frozen_vae(place.folder, dtype, device)
    encode, alphas = text_encoder(place.folder, dtype, device), schedule(place.folder).alphas_cumprod.to(device)
    negative, draws = encode([""]), draws_of(n)
    images = [2 * part.to(dtype) - 1 for part in pixels(2 * n, place).chunk(2)]

    @torch.no_grad()
    def noised() -> tuple[Tensor, Tensor, Tensor]:
        t, generator = draws.integers(len(alphas), n).to(device), torch.Generator().manual_seed(0)
        a_t, embeds = alphas[t][:, None, None, None], torch.cat([negative.repeat(n, 1, 1), encode(prompts(n))])
        scale = vae.config.scaling_factor
        latents = [scale * vae.encode(image).latent_dist.sample(generator) for image in images]
        noise = draws.noise(tuple(latents[0].shape)).to(device)
        noisy = [(a_t.sqrt() * x_0 + (1 - a_t).sqrt() * noise).to(dtype) for x_0 in latents]
        predicted = [unet(torch.cat([x_t] * 2), torch.cat([t] * 2), embeds).sample.chunk(2) for x_t in noisy]
        epsilon = [uncond + GUIDANCE * (text - uncond) for uncond, text in predicted]
        x_0 = [(x_t - (1 - a_t).sqrt() * e) / a_t.sqrt() for x_t, e in zip(noisy, epsilon, strict=True)]
        return *(vae.decode(x.to(dtype) / scale).sample for x in x_0), t

    return noised
