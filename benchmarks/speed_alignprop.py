"""A step of AlignProp: attune's, and the same in the order of the authors' code (mihirp1998/AlignProp).

Order of operations of `sd_pipeline.py` and `alignprop_trainer.py`: prompts are encoded in each step; all N steps run
with gradients on, and the first N - K predictions are detached; each call of the UNet may be checkpointed, the decoder
is not; there is no autocast, and the adapter is float32. Their images are brought to [0, 1] twice, which is left out.
The reward is the same small HPSv2 on both sides, images squeezed to a square and loss 0.01 (1 - score).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from gpu_rows import draws_of, trained
from plain import adamw_step, add_lora, frozen_unet, frozen_vae, move, schedule, text_encoder, trained_weights
from speed_sides import HPS, LR, WEIGHT_DECAY, Place, Side, loop_settings, lora_policy, prompts, scalar
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attune.clip.pixels import normalise
from attune.data.batches import PromptBatch
from attune.methods import alignprop
from attune.rewards import hpsv2

STEPS, GUIDANCE, COEFFICIENT = 10, 5.0, 0.01


def scorer(place: Place) -> hpsv2.Scorer:
    """The small HPSv2, shown images as AlignProp's code does."""
    file = str(HPS / "open_clip_model.safetensors")
    config = hpsv2.Config(version="2.1", path=file, tokenizer=str(HPS), preprocess="square")
    return hpsv2.load(config, place.device)


def ours(place: Place) -> Side:
    """With options: `k` steps with a gradient, `checkpoint`."""
    policy, options = lora_policy(place), place.options
    config = alignprop.Config(
        **loop_settings(place) | {"lora": None, "rewards": {"hpsv2": 1.0}, "target": 1.0},
        loss_coeff=COEFFICIENT,
        steps=STEPS,
        guidance_scale=GUIDANCE,
        truncation="fixed",
        truncation_range=[1 - options["k"] / STEPS],
        checkpoint_steps=options["checkpoint"],
    )
    batch = PromptBatch(prompts(place.n), policy.backbone.encode_prompts(prompts(place.n)))
    policy.backbone.release()  # as a training does; the autoencoder is read again when it is needed
    step = trained(alignprop.Method(config, policy, {"hpsv2": scorer(place)}), policy, batch, place.n)
    return Side(lambda: {"loss": scalar(step()["loss"])}, policy.parameters())


def in_order_of_the_authors(place: Place) -> Side:
    """Options as of `ours`."""
    dtype, device, n = place.computes, place.device, place.n
    unet = add_lora(frozen_unet(place.folder, dtype, device))
    weights, vae, encode = trained_weights(unet), frozen_vae(place.folder, dtype, device), None
    move(weights)
    encode, alphas = text_encoder(place.folder, dtype, device), schedule(place.folder).alphas_cumprod.to(device)
    negative, draws, score = encode([""]), draws_of(n), _scored(scorer(place), prompts(n))

    def loss() -> Tensor:
        embeds = torch.cat([negative.repeat(n, 1, 1), encode(prompts(n))])
        x_t = draws.noise((n, 4, place.latent_side, place.latent_side)).to(device, dtype)
        noise = [draws.noise(tuple(x_t.shape)).to(device, dtype) for _ in range(STEPS)]
        latents = sampled(unet, alphas, x_t, noise, embeds, place.options)
        images = vae.decode(latents.to(dtype) / vae.config.scaling_factor).sample
        return COEFFICIENT * (1 - score((images / 2 + 0.5).clamp(0, 1).float())).mean()

    step = adamw_step(weights, loss, LR, WEIGHT_DECAY, max_grad_norm=1.0)
    return Side(lambda: {"loss": scalar(step())}, weights)


def sampled(
    unet: UNet2DConditionModel, alphas: Tensor, x_t: Tensor, noise: list[Tensor], embeds: Tensor, options: Any
) -> Tensor:
    """The final latents of N steps at eta 1, of which the last `k` carry a gradient."""
    steps = len(noise)
    for i, z in enumerate(noise):
        t = torch.tensor((steps - 1 - i) * (1000 // steps) + 1, device=x_t.device)
        given = (torch.cat([x_t] * 2).to(unet.dtype), t, embeds)
        output = checkpoint(unet, *given, use_reentrant=False) if options["checkpoint"] else unet(*given)
        predicted = output.sample.detach() if i < steps - options["k"] else output.sample
        uncond, text = predicted.chunk(2)
        epsilon = uncond + GUIDANCE * (text - uncond)
        a_t, a_prev = alphas[t], alphas[(t - 1000 // steps).clamp(min=0)]
        std = ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).sqrt()
        x_0 = (x_t - (1 - a_t).sqrt() * epsilon) / a_t.sqrt()
        x_t = a_prev.sqrt() * x_0 + (1 - a_prev - std**2).sqrt() * epsilon + std * z
    return x_t


def _scored(of: hpsv2.Scorer, texts: list[str]) -> Any:
    """Scores of images by the scorer's network, which encodes image and text in every call, as the package does."""
    clip, words = of.model, hpsv2.load_tokenizer(str(HPS))
    size, length = clip.config.vision_config.image_size, clip.config.text_config.max_position_embeddings
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}

    def score(images: Tensor) -> Tensor:
        square = F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)
        image = clip.get_image_features(pixel_values=normalise(square)).pooler_output
        ids = words([hpsv2.clean_text(text) for text in texts], **options).input_ids.to(images.device)
        text = clip.get_text_features(input_ids=ids).pooler_output
        return (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T).diagonal()

    return score
