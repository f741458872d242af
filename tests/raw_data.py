"""Encoded images, and what a data source yields for a block of settings."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from attune.config import plugins
from attune.config.plugins import plugin_config
from attune.data.rows import BadRow, Pair, Prompt, Quota


def pixels(seed: int, width: int = 16, height: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def image(seed: int, kind: str = "PNG", size: tuple[int, int] = (16, 16)) -> bytes:
    return encoded(pixels(seed, *size), kind)


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def rows_from(name: str, quota: Quota | None = None, **block) -> list[Prompt | Pair | BadRow]:
    """What a source yields for a block of params.yaml."""
    module, config = plugins.load("sources", name), plugin_config("sources", name, block, "data")
    return list(module.read(module.Config.model_validate(config.model_dump()), 0, None, quota or Quota()))


def asked(name: str, **block):
    """(needs_files, split_sizes, listed_prompts) of a source."""
    module = plugins.load("sources", name)
    config = module.Config.model_validate(block)
    listed = module.listed_prompts(config)
    return module.needs_files(config), module.split_sizes(config), None if listed is None else list(listed)
