"""SPO: attune's rollout, update and both together, and the same in the order of the authors' code (RockeyCoss/SPO).

Order of operations of `multi_sample_pipeline.py`: prompts are encoded in each rollout; each step predicts the noise of
all candidates in one guided call; predicted images of all candidates are decoded at once and scored at once, every
prompt as often as it has candidates, padded to full length; one of them continues at random; the last candidates are
decoded and scored as they are. Of `train_spo.py`: the reference is a second UNet; chosen and rejected latents each go
through policy and reference by a call of their own, in the order policy, reference, policy, reference; nothing is
clipped; there is no autocast, and the adapter is float32.
The preference model is the same network on both sides: a small one, so that the diffusion model's share shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from gpu_rows import draws_of
from plain import adamw_step, add_lora, frozen_unet, frozen_vae, move, schedule, text_encoder, trained_weights
from speed_sides import CLIP, LR, WEIGHT_DECAY, Place, Side, loop_settings, lora_policy, prompts, scalar
from torch import Tensor

from attune.clip.pixels import normalise
from attune.data.batches import PromptBatch
from attune.diffusion.noise import Draws
from attune.diffusion.policy import Policy
from attune.distributed import Part
from attune.methods import spo
from attune.spm.model import StepAwareReward, from_clip
from attune.training.step import TrainStep

BETA, CLIP_RANGE, GUIDANCE = 10.0, 0.1, 5.0


@dataclass(frozen=True)
class Plain:
    """What the authors' script holds: two UNets, autoencoder, preference model, and the encoder of prompts."""

    place: Place
    unet: UNet2DConditionModel
    reference: UNet2DConditionModel
    vae: AutoencoderKL
    encode: Callable[[list[str]], Tensor]
    judge: Callable[[Tensor, list[str], Tensor], Tensor]
    negative: Tensor  # the empty prompt, (1, L, D)
    alphas: Tensor


class Prediction(NamedTuple):
    """A guided noise prediction, and the clean latents that it implies."""

    x_0: Tensor
    noise: Tensor


class Step(NamedTuple):
    """A step of n prompts and its k candidates for the next latents, (k n, C, h, w)."""

    x_t: Tensor
    t: Tensor
    x_prev: Tensor


class Pairs(NamedTuple):
    """m kept steps: x_t, the preferred and the other x_prev, t, and prompt embeddings."""

    x_t: Tensor
    chosen: Tensor
    rejected: Tensor
    t: Tensor
    embeds: Tensor

    def __getitem__(self, rows: Tensor) -> Pairs:  # type: ignore[override]  # rows of every part, not a part
        return Pairs(*(part[rows] for part in tuple(self)))


def settings(place: Place) -> dict[str, Any]:
    """A run of 6 steps of which 4 have candidates; every pair whose scores differ at all is kept."""
    return {"candidates": 4, "steps": 6, "start_step": 2, "threshold": 0.0, "minibatch_size": 4} | dict(place.options)


# ---------------------------------------------------------------- attune


def _method(place: Place) -> spo.Method:
    shared = loop_settings(place) | {"beta": BETA, "clip": CLIP_RANGE, "guidance_scale": GUIDANCE}
    config = spo.Config(lora=None, max_grad_norm=None, **shared, **settings(place))
    clip, words = from_clip(str(CLIP))
    return spo.Method(config, lora_policy(place), StepAwareReward(clip.to(place.device), words))


def _batch(policy: Policy, n: int) -> PromptBatch:
    return PromptBatch(prompts(n), policy.backbone.encode_prompts(prompts(n)))


def our_rollout(place: Place) -> Side:
    method, draws = _method(place), draws_of(place.n)
    batch = _batch(method.policy, place.n)

    def step() -> Mapping[str, Tensor]:
        found = method.rollout(batch, draws.noise, draws.integers)
        return {"x_t": found.x_t, "chosen": found.chosen, "rejected": found.rejected, "t": found.t}

    return Side(step)


def our_update(place: Place) -> Side:
    method = _method(place)
    train_step, policy = TrainStep(method.policy, method.config), method.policy
    cond = policy.backbone.encode_prompts(prompts(place.n))
    policy.backbone.release()
    x_t, chosen, rejected, t = given_steps(place)
    minibatch = Part(spo.StepPairs(x_t, chosen, rejected, t, cond), place.n)
    return Side(lambda: {"loss": scalar(train_step(method, [minibatch], 1, LR)["loss"])}, policy.parameters())


def our_whole(place: Place) -> Side:
    method, draws = _method(place), draws_of(place.n)
    train_step, batch = TrainStep(method.policy, method.config), _batch(method.policy, place.n)

    def step() -> Mapping[str, Tensor]:
        losses = [train_step(method, [part], 1, LR)["loss"] for part in method.minibatches(batch, draws)]
        return {"losses": torch.tensor(losses, dtype=torch.float64)}

    return Side(step, method.policy.parameters())


def given_steps(place: Place) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, two x_prev near it, and t, a time that the run visits, of n steps, the same on both sides."""
    generator, side = torch.Generator().manual_seed(4), place.latent_side
    x_t, chosen, rejected = (torch.randn((place.n, 4, side, side), generator=generator) for _ in range(3))
    around = x_t, x_t + 0.3 * chosen, x_t + 0.3 * rejected
    steps = settings(place)["steps"]
    t = torch.full((place.n,), _timesteps(steps, place.device)[steps // 2].item(), device=place.device)
    return *(x.to(place.device) for x in around), t


# ---------------------------------------------------------------- the authors' order


def _plain(place: Place) -> Plain:
    clip, words = from_clip(str(CLIP))
    clip = clip.to(place.device).eval().requires_grad_(False)
    reference, unet = (frozen_unet(place.folder, place.computes, place.device) for _ in range(2))
    move(trained_weights(add_lora(unet)))
    encode = text_encoder(place.folder, place.computes, place.device)
    return Plain(
        place,
        unet,
        reference,
        frozen_vae(place.folder, place.computes, place.device),
        encode,
        lambda images, texts, t: _preferences(clip, words, images, texts, t),
        encode([""]),
        schedule(place.folder).alphas_cumprod.to(place.device),
    )


def _preferences(clip: Any, words: Any, images: Tensor, texts: list[str], t: Tensor) -> Tensor:
    """Scores (B,) of images (B, 3, H, W) in [-1, 1], as `get_preference_score` of the authors computes them."""
    config = clip.model.config
    size, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    small = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False)
    image = clip.image_features(normalise((small / 2 + 0.5).clamp(0, 1).float()), t)
    ids = words(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    text = clip.model.get_text_features(input_ids=ids.to(images.device)).pooler_output
    cosine = (image / image.norm(dim=-1, keepdim=True) * (text / text.norm(dim=-1, keepdim=True))).sum(-1)
    return clip.model.logit_scale.exp() * cosine


def guided(network: UNet2DConditionModel, x_t: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
    """Epsilon with guidance from one call on [negative; positive]."""
    uncond, text = network(torch.cat([x_t] * 2), t, embeds).sample.chunk(2)
    return uncond + GUIDANCE * (text - uncond)


def mean_and_std(p: Plain, predicted: Prediction, t: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Of x_prev at eta 1; t is (B,)."""
    a_t, a_prev = (p.alphas[i][:, None, None, None] for i in (t, (t - 1000 // steps).clamp(min=0)))
    std = ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).sqrt()
    return a_prev.sqrt() * predicted.x_0 + (1 - a_prev - std**2).sqrt() * predicted.noise, std


def prediction(p: Plain, x_t: Tensor, t: Tensor, noise: Tensor) -> Prediction:
    a_t = p.alphas[t][:, None, None, None]
    return Prediction((x_t - (1 - a_t).sqrt() * noise) / a_t.sqrt(), noise)


def judged(p: Plain, of: Step, x_0: Tensor, t: Tensor, embeds: Tensor) -> Pairs:
    """The step's pairs, by the scores at time t of what its candidates become, x_0 (k n, C, h, w)."""
    n = len(embeds)
    k = len(x_0) // n
    images = p.vae.decode(x_0.to(p.vae.dtype) / p.vae.config.scaling_factor).sample
    scores = p.judge(images, prompts(n) * k, t.expand(len(images))).reshape(k, n)
    shares = torch.softmax(torch.stack([scores.max(0).values, scores.min(0).values]), 0)
    rows = (shares[0] - shares[1] > settings(p.place)["threshold"]).nonzero().flatten()
    by_prompt = of.x_prev.reshape(k, n, *of.x_prev.shape[1:])
    chosen, rejected = (by_prompt[index[rows], rows] for index in (scores.argmax(0), scores.argmin(0)))
    return Pairs(of.x_t[rows], chosen, rejected, of.t.expand(len(rows)), embeds[rows])


@torch.no_grad()
def rollout(p: Plain, draws: Draws) -> Pairs:
    """The kept step pairs of n prompts, in the order of `multi_sample_pipeline`."""
    c, n, device, dtype = settings(p.place), p.place.n, p.place.device, p.place.computes
    embeds, side, k = p.encode(prompts(n)), p.place.latent_side, c["candidates"]
    x_t, last, kept = draws.noise((n, 4, side, side)).to(device, dtype), None, []
    for i, t in enumerate(_timesteps(c["steps"], device)):
        copies = len(x_t) // n
        both = torch.cat([p.negative.repeat(copies * n, 1, 1), embeds.repeat(copies, 1, 1)])
        predicted = prediction(p, x_t, t.expand(len(x_t)), guided(p.unet, x_t, t, both))
        if last is not None:
            kept.append(judged(p, last, predicted.x_0, t, embeds))
            continues = draws.integers(k, n).to(device) * n + torch.arange(n, device=device)
            x_t, predicted = x_t[continues], Prediction(*(part[continues] for part in predicted))
        mean, std = mean_and_std(p, predicted, t.expand(n), c["steps"])
        if i >= c["start_step"]:
            mean, std = mean.repeat(k, 1, 1, 1), std.repeat(k, 1, 1, 1)
        x_prev = (mean + std * draws.noise(tuple(mean.shape)).to(device, dtype)).to(dtype)
        last = Step(x_t, t, x_prev) if i >= c["start_step"] else None
        x_t = x_prev
    kept.append(judged(p, last, x_t, torch.zeros_like(t), embeds))
    return Pairs(*(torch.cat(parts) for parts in zip(*kept, strict=True)))


def _timesteps(steps: int, device: torch.device) -> Tensor:
    return torch.arange(steps - 1, -1, -1, device=device) * (1000 // steps) + 1


def log_prob(p: Plain, x_t: Tensor, t: Tensor, noise: Tensor, x_prev: Tensor, steps: int) -> Tensor:
    """Of a step, the mean over latent dimensions, (B,)."""
    mean, std = mean_and_std(p, prediction(p, x_t, t, noise), t, steps)
    density = -((x_prev - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
    return density.mean(dim=(1, 2, 3))


def update_loss(p: Plain, m: Pairs) -> Tensor:
    """The loss of a minibatch in the order of `train_spo.py`: four calls of networks."""
    embeds, t = torch.cat([p.negative.repeat(len(m.t), 1, 1), m.embeds]), torch.cat([m.t] * 2)
    x_t, steps = m.x_t.to(p.place.computes), settings(p.place)["steps"]
    predicted = [guided(network, x_t, t, embeds) for _ in range(2) for network in (p.unet, p.reference)]
    x_prev = (m.chosen, m.chosen, m.rejected, m.rejected)
    chosen, chosen_before, rejected, rejected_before = (
        log_prob(p, m.x_t, m.t, noise, x, steps) for noise, x in zip(predicted, x_prev, strict=True)
    )
    low, high = 1 - CLIP_RANGE, 1 + CLIP_RANGE
    ratios = [(a - b).exp().clamp(low, high) for a, b in ((chosen, chosen_before), (rejected, rejected_before))]
    return -torch.log(torch.sigmoid(BETA * ratios[0].log() - BETA * ratios[1].log())).mean()


def their_rollout(place: Place) -> Side:
    p, draws = _plain(place), draws_of(place.n)

    def step() -> Mapping[str, Tensor]:
        found = rollout(p, draws)
        return {"x_t": found.x_t, "chosen": found.chosen, "rejected": found.rejected, "t": found.t}

    return Side(step)


def their_update(place: Place) -> Side:
    p = _plain(place)
    weights, m = trained_weights(p.unet), Pairs(*given_steps(place), p.encode(prompts(place.n)))
    step = adamw_step(weights, lambda: update_loss(p, m), LR, WEIGHT_DECAY, max_grad_norm=None)
    return Side(lambda: {"loss": scalar(step())}, weights)


def their_whole(place: Place) -> Side:
    p, draws = _plain(place), draws_of(place.n)
    weights = trained_weights(p.unet)
    update = adamw_step(weights, lambda m: update_loss(p, m), LR, WEIGHT_DECAY, max_grad_norm=None)

    def step() -> Mapping[str, Tensor]:
        pairs = rollout(p, draws)
        order = torch.randperm(len(pairs.t), generator=draws.shared).split(settings(place)["minibatch_size"])
        return {"losses": torch.tensor([update(pairs[rows.to(place.device)]) for rows in order], dtype=torch.float64)}

    return Side(step, weights)
