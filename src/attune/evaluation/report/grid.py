"""A grid of images: one row per prompt, one or more columns per method, each image from the same noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from attune.evaluation.report.document import one_line

INK, SOFT = "#1d2330", "#667085"
_CELL, _LARGEST = 128, 320  # pixels: small images grow to at least the first, large ones shrink to the second
_GAP, _LABEL, _MARGIN, _HEADER, _FOOT = 10, 210, 20, 34, 22
_LEADING = 21


def image_grid(
    images: Mapping[str, Any],
    prompts: Sequence[str],
    scores: Mapping[str, Sequence[float]] | None = None,
    per_prompt: int = 1,
) -> Image.Image:
    """A table of images: a row per prompt, labelled with it, and for each method `per_prompt` columns side by side.

    Args:
        images: method -> B * per_prompt square images of one size, those of a prompt one after the other:
            (..., H, H, 3) uint8 or float in [0, 1], or PIL images.
        prompts: B prompts, the rows' labels.
        scores: method -> B * per_prompt scores to print under its images, or None.

    Returns:
        An RGB picture. Small images are enlarged by a whole factor without smoothing, so that each of their
        pixels is seen as it is.

    Raises:
        ValueError: no images, counts that differ, or images outside [0, 1].
    """
    methods = {name: _pixels(name, column, len(prompts) * per_prompt) for name, column in images.items()}
    if not methods or not prompts:
        raise ValueError("an image grid needs at least one method and one prompt")
    size = _cell_size(next(iter(methods.values())).shape[1])
    row_height = size + _GAP + (_FOOT if scores else 0)
    group = per_prompt * (size + _GAP) - _GAP
    between = _GAP if per_prompt == 1 else 3 * _GAP
    width = 2 * _MARGIN + _LABEL + len(methods) * (group + between) - between
    canvas = Image.new("RGB", (width, 2 * _MARGIN + _HEADER + len(prompts) * row_height - _GAP), "white")
    draw, header = ImageDraw.Draw(canvas), _font(17, bold=True)
    for row, prompt in enumerate(prompts):
        _write_label(draw, prompt, _MARGIN + _HEADER + row * row_height, size)
    for number, (name, pixels) in enumerate(methods.items()):
        left = _MARGIN + _LABEL + number * (group + between)
        draw.text((left, _MARGIN), _fit(one_line(name), group, header), INK, header)
        for i, image in enumerate(pixels):
            row, column = divmod(i, per_prompt)
            x, y = left + column * (size + _GAP), _MARGIN + _HEADER + row * row_height
            canvas.paste(_scaled(image, size), (x, y))
            if scores and name in scores:
                draw.text((x, y + size + 3), f"{scores[name][i]:#.3g}", SOFT, _font(14))
    return canvas


def _pixels(name: str, images: Any, n: int) -> np.ndarray:
    """Images as (n, H, W, 3) uint8."""
    pixels = np.stack([np.asarray(image) for image in images]) if len(images) else np.empty(0)
    if pixels.shape[:1] != (n,) or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"{name}: expected {n} RGB images, found an array of shape {pixels.shape}")
    if pixels.dtype == np.uint8:
        return pixels
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"{name}: images must lie in [0, 1], found {pixels.min():.3f} to {pixels.max():.3f}")
    return np.rint(pixels * 255).astype(np.uint8)


def _cell_size(size: int) -> int:
    return min(size * math.ceil(_CELL / size), _LARGEST)


def _scaled(image: np.ndarray, size: int) -> Image.Image:
    method = Image.Resampling.LANCZOS if image.shape[0] > size else Image.Resampling.NEAREST
    return Image.fromarray(image).resize((size, size), method)


def _write_label(draw: ImageDraw.ImageDraw, prompt: str, top: int, height: int) -> None:
    """The prompt, wrapped, centred on its row; what does not fit ends in an ellipsis."""
    font, width = _font(16), _LABEL - 20
    lines = _wrap(one_line(prompt), width, font)
    room = max(1, height // _LEADING)
    if len(lines) > room:
        lines = [*lines[: room - 1], _fit(" ".join(lines[room - 1 :]), width, font)]
    y = top + (height - _LEADING * len(lines)) / 2
    for line in lines:
        draw.text((_MARGIN, y), line, INK, font)
        y += _LEADING


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines no wider than `width` pixels; a word wider than that is cut."""
    lines, line = [], ""
    for word in (_fit(word, width, font) for word in text.split()):
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line]


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Text of at most `width` pixels, with an ellipsis where it was cut."""
    if font.getlength(text) <= width:
        return text
    end = next(n for n in range(len(text) - 1, -1, -1) if font.getlength(text[:n] + "...") <= width)
    return text[:end].rstrip() + "..."


@cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: the same everywhere, whatever fonts the machine has."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(files("matplotlib") / "mpl-data" / "fonts" / "ttf" / name), size)
