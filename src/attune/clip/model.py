"""CLIP as all scorers use it: loading, features, and images made ready for it.

One layer below `rewards` and `preference`, which know nothing of each other. Everything is float32:
antialiased resizing has no half-precision kernel on CPU, and autocast moves scores in the third digit.

Shapes: images (B, 3, H, W) in [0, 1]; pixel values (B, 3, S, S), normalised, S = `image_size(model)`;
features (B, D).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from attune.hub import refusal

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, used by every CLIP here
STD = (0.26862954, 0.26130258, 0.27577711)
Crop = Callable[[Tensor, int], Tensor]
Prepare = Callable[[Tensor, int], Tensor]  # images and S to pixel values


# ---------------------------------------------------------------- loading


def load_model(path: str, revision: str | None = None, hidden_act: str | None = None) -> CLIPModel:
    """A frozen float32 CLIP in eval mode.

    Args:
        path: local folder or Hub id.
        revision: Hub commit; ignored for a folder.
        hidden_act: activation both towers must have. Worth stating: ViT-H/14 is "gelu", OpenAI's ViT-L/14
            "quick_gelu", transformers defaults to the latter, and the wrong one scores plausibly but wrongly.

    Raises:
        ValueError: weights are missing or left over (transformers would only warn and draw random ones), the
            activation is not the expected one, or a pickle holds more than tensors.
        FileNotFoundError: no such folder, and not a Hub id either.
    """
    check_exists(path)
    # dtype is explicit because transformers 5 otherwise follows the checkpoint, which may be fp16
    options = {"dtype": torch.float32, "weights_only": True, "output_loading_info": True}
    try:
        model, report = CLIPModel.from_pretrained(path, revision=revision, **options)
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(path)) from error
    wrong = {name: sorted(report[name]) for name in ("missing_keys", "unexpected_keys") if report[name]}
    if wrong:
        raise ValueError(f"{path} is not a complete CLIP: {wrong}")
    check_activation(model.config, hidden_act, path)
    return model.eval().requires_grad_(False)


def load_tokenizer(path: str, revision: str | None = None) -> CLIPTokenizer:
    """The tokenizer of a local folder or Hub id; FileNotFoundError as for `load_model`."""
    check_exists(path)
    return CLIPTokenizer.from_pretrained(path, revision=revision)


def check_exists(path: str) -> None:
    """A mistyped folder must not be answered with advice on Hub ids."""
    if not Path(path).is_dir() and path.count("/") != 1:
        raise FileNotFoundError(f"{path} is neither a folder nor a Hub id (owner/name)")


def check_activation(config: CLIPConfig, hidden_act: str | None, source: str) -> None:
    """Raises ValueError unless both towers use `hidden_act` (None: anything goes)."""
    found = {config.text_config.hidden_act, config.vision_config.hidden_act}
    if hidden_act is not None and found != {hidden_act}:
        raise ValueError(f"{source} has hidden_act {sorted(found)}, expected {hidden_act!r}")


# ---------------------------------------------------------------- features


def image_size(model: CLIPModel) -> int:
    """Side S of the square images the vision tower takes, pixels."""
    return model.config.vision_config.image_size


def tokenise(tokenizer: CLIPTokenizer, prompts: Sequence[str], context_length: int) -> Tensor:
    """Token ids (B, L), L the longest prompt's but at most `context_length`; truncation keeps the end token.

    Padding and attention masks change nothing: attention is causal and a feature is read at its first end
    token.
    """
    return tokenizer(
        list(prompts), padding="longest", truncation=True, max_length=context_length, return_tensors="pt"
    ).input_ids


def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Projected text features (B, D), of unit length."""
    ids = tokenise(tokenizer, prompts, model.config.text_config.max_position_embeddings)
    return F.normalize(model.get_text_features(input_ids=ids.to(model.device)).pooler_output, dim=-1)


def image_features(model: CLIPModel, pixel_values: Tensor, unit: bool = True) -> Tensor:
    """Projected image features (B, D), of unit length unless told otherwise; differentiable."""
    features = model.get_image_features(pixel_values=pixel_values).pooler_output
    return F.normalize(features, dim=-1) if unit else features


def prepared_features(model: CLIPModel, prepare: Prepare, images: Tensor) -> Tensor:
    """Unit features (B, D), on the model's device, of images as `prepare` shows them to it."""
    return image_features(model, prepare(images.to(model.device).float(), image_size(model)))


class TextFeatures:
    """Unit text features (B, D) of a frozen CLIP, each prompt encoded once.

    Prompts are encoded one by one: a batch's padded length moves the last bits, and a resumed run, whose
    cache is cold, must see the same bits as one that never stopped.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        clean: Callable[[str], str] = str,
        capacity: int = 16384,  # 64 MB at D = 1024; when full the cache starts afresh
    ) -> None:
        self._model, self._tokenizer, self._clean, self._capacity = model, tokenizer, clean, capacity
        self._rows: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([self._row(prompt) for prompt in prompts])

    @torch.no_grad()
    def _row(self, prompt: str) -> Tensor:
        if prompt not in self._rows:
            if len(self._rows) >= self._capacity:
                self._rows.clear()
            self._rows[prompt] = text_features(self._model, self._tokenizer, [self._clean(prompt)])[0]
        return self._rows[prompt]


# ---------------------------------------------------------------- images


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which a scorer computes in float32 whatever its caller's autocast says."""
    return torch.autocast(device.type, enabled=False)


def check_images(images: Tensor, prompts: Sequence[str] | None = None) -> None:
    """Raises ValueError unless images are (B, 3, H, W) in [0, 1], one per prompt if prompts are given."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), found {tuple(images.shape)}")
    if prompts is not None and len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
    low, high = (float(x) for x in images.detach().aminmax())
    if not (low >= 0 and high <= 1):  # written so that NaN is refused too
        raise ValueError(f"images must lie in [0, 1], found {low:.4g} to {high:.4g}; convert or clamp them")


def normalise(pixels: Tensor) -> Tensor:
    """[0, 1] to CLIP's units."""
    mean, std = (pixels.new_tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (pixels - mean) / std


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The central size x size pixels; an odd remainder goes to the bottom and the right, as CLIP has it."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def rounded_crop(images: Tensor, size: int) -> Tensor:
    """The same as torchvision has it: offsets are rounded, half to even."""
    top, left = round((images.shape[-2] - size) / 2), round((images.shape[-1] - size) / 2)
    return images[..., top : top + size, left : left + size]


def clip_pixels(images: Tensor, size: int, crop: Crop = centre_crop) -> Tensor:
    """CLIP's preprocessing, differentiable: shortest side to `size`, bicubic with antialias, centre crop.

    Clamped after resizing, as 8-bit images are; differs from `clip_pixels_pil` by the rounding alone
    (about 1e-3 on average).
    """
    height, width = resized(images.shape[-2:], size)
    if (height, width) != tuple(images.shape[-2:]):
        images = F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return normalise(crop(images, size).clamp(0, 1))


def clip_pixels_pil(images: Tensor, size: int, crop: Crop = centre_crop) -> Tensor:
    """CLIP's preprocessing as published figures used it: rounded to 8 bits, resized by Pillow; no gradient.

    Pillow 13 changed its resize: against older ones up to a quarter of the pixels move by one 8-bit level.
    """
    height, width = resized(images.shape[-2:], size)
    arrays = (images.detach() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    small = [Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC) for array in arrays]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2)
    return normalise(crop(pixels.to(images.device), size).float() / 255)


def square_pixels(images: Tensor, size: int) -> Tensor:
    """AlignProp's and TRL's preprocessing: bilinear with antialias, straight to a square; differentiable."""
    return normalise(F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True))


PREPARATIONS = {"pil": clip_pixels_pil, "tensor": clip_pixels, "square": square_pixels}


def resized(shape: Sequence[int], size: int) -> tuple[int, int]:
    """Height and width once the shortest side is `size`; the other is rounded down, as CLIP does."""
    height, width = shape
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size
