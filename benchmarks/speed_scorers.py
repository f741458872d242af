"""Scores of images by HPSv2 and PickScore: attune's scorers, and the same in the order of what they replace.

HPSv2, package `hpsv2`, `img_score.py`: a call with a list of images is a loop, in which each image and the prompt go
through the network by themselves, the prompt padded to full length. The package reads its weights in each call, which
is left out. PickScore, the model card's function: images of a prompt are processed by Pillow, and one call is for one
image here, because images of different prompts cannot share one.
Both sides hold the same network in float32; on a GPU the package computes under autocast to float16. With `dtype`
bfloat16 attune's has its matrix products in that, as a profile may say.
attune's scorer is new in each call, so that it has seen no prompt before.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from shapes import random_clip, tokenizer
from speed_sides import CLIP, HPS, Place, Side, prompts
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from attune.clip.model import in_dtype, load_model, load_tokenizer
from attune.clip.pixels import normalise
from attune.rewards import hpsv2, pickscore

HPS_CONFIG = {"version": "2.1", "path": str(HPS / "open_clip_model.safetensors"), "tokenizer": str(HPS)}


@cache
def network(name: str, size: str, device: torch.device, dtype: str = "float32") -> tuple[CLIPModel, CLIPTokenizer]:
    """The scorer's CLIP, small and trained or a random ViT-H/14, and its tokenizer; one for both sides in float32."""
    if size == "vit-h":
        torch.manual_seed(0)
        words = tokenizer()
        return in_dtype(random_clip(words, device), dtype, device), words
    if name == "hpsv2":
        return hpsv2.load(hpsv2.Config(**HPS_CONFIG, dtype=dtype), device).model, load_tokenizer(str(HPS))
    return in_dtype(load_model(str(CLIP)), dtype, device), load_tokenizer(str(CLIP))


def files(place: Place) -> np.ndarray:
    """Random images, uint8 (n, H, W, 3)."""
    shape = (place.n, place.resolution, place.resolution, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def texts(place: Place) -> list[str]:
    """A prompt for each image; one for all of HPSv2's, as its package has it."""
    return prompts(1) * place.n if place.options["scorer"] == "hpsv2" else prompts(place.n)


def ours(place: Place) -> Side:
    """With options: `scorer`, `clip` ("small" or "vit-h") and `dtype`. Images come as bytes, as in evaluation."""
    name, dtype = place.options["scorer"], place.options["dtype"]
    clip, words = network(name, place.options["clip"], place.device, dtype)
    images, module = files(place), {"hpsv2": hpsv2, "pickscore": pickscore}[name]
    config = hpsv2.Config(**HPS_CONFIG) if name == "hpsv2" else pickscore.Config(path=str(CLIP))

    @torch.no_grad()
    def step() -> Mapping[str, Tensor]:
        given = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return {"scores": module.Scorer(clip, words, config)(given, texts(place)).cpu()}

    return Side(step)


def in_order_of_the_package(place: Place) -> Side:
    """HPSv2, image by image."""
    clip, words = network("hpsv2", place.options["clip"], place.device)
    pictures, size = [Image.fromarray(image) for image in files(place)], clip.config.vision_config.image_size
    length = clip.config.text_config.max_position_embeddings
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}

    def score(picture: Image.Image, text: str) -> Tensor:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        fitted = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False, antialias=True)
        image = clip.get_image_features(pixel_values=normalise(fitted).to(place.device)).pooler_output
        ids = words([hpsv2.clean_text(text)], **options).input_ids.to(place.device)
        text_features = clip.get_text_features(input_ids=ids).pooler_output
        return (F.normalize(image, dim=-1) @ F.normalize(text_features, dim=-1).T).diagonal().cpu()

    half = place.device.type == "cuda" and place.dtype != "float32"

    @torch.no_grad()
    def step() -> Mapping[str, Tensor]:
        with torch.autocast(place.device.type, torch.float16, enabled=half):
            found = [score(picture, text) for picture, text in zip(pictures, texts(place), strict=True)]
        return {"scores": torch.cat(found)}

    return Side(step)


def in_order_of_the_card(place: Place) -> Side:
    """PickScore, one image and prompt per call."""
    clip, words = network("pickscore", place.options["clip"], place.device)
    pictures, size = [Image.fromarray(image) for image in files(place)], clip.config.vision_config.image_size
    square = {"height": size, "width": size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
    length = clip.config.text_config.max_position_embeddings
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}

    def unit(found: Any) -> Tensor:
        return found.pooler_output / found.pooler_output.norm(dim=-1, keepdim=True)

    def score(picture: Image.Image, text: str) -> Tensor:
        shown = processor(images=[picture], return_tensors="pt").pixel_values.to(place.device)
        image = unit(clip.get_image_features(pixel_values=shown))
        words_of = unit(clip.get_text_features(input_ids=words([text], **options).input_ids.to(place.device)))
        return (clip.logit_scale.exp() * (words_of @ image.T)[0]).cpu()

    @torch.no_grad()
    def step() -> Mapping[str, Tensor]:
        found = [score(picture, text) for picture, text in zip(pictures, texts(place), strict=True)]
        return {"scores": torch.cat(found)}

    return Side(step)
