"""Images made ready for a CLIP: checked, resized, cropped and normalised.

Shapes: images (B, 3, H, W) in [0, 1]; pixel values (B, 3, S, S), normalised, S the side a model takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, used by every CLIP here
STD = (0.26862954, 0.26130258, 0.27577711)
Crop = Callable[[Tensor, int], Tensor]
Prepare = Callable[[Tensor, int], Tensor]  # images and S to pixel values


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
