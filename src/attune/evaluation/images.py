"""Generated images, written to their folder and read from it; and small copies of images for pages."""

from __future__ import annotations

import base64
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from attune.shards import in_order

if TYPE_CHECKING:
    from torch import Tensor

SIDES = (256, 192, 128, 96, 64)  # pixels of a picture's longer side: the largest whose file is small enough
SMALL = 96  # pixels: images up to here are kept as they are, without loss


PACKED_ABOVE, PER_PACK = 10_000, 1000  # images: so many files of one folder are slow for DVC and for file systems


def png(image: np.ndarray) -> bytes:
    """An image, uint8 (H, W, 3), as a PNG."""
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, "PNG")
        return file.getvalue()


def write_images(folder: Path, batches: Iterable[Mapping[str, Tensor]], count: int) -> list[str]:
    """Writes PNGs, numbered, or packs of them where there are many; returns where each is, relative to the folder.

    A pack is a plain tar file, as webdataset reads it; image 12 of the second is `00001.tar/00001012.png`.

    Args:
        batches: row number -> bytes of its PNG, in the order of the rows.
        count: of all images.
    """
    images = ((int(row), value.numpy().tobytes()) for batch in batches for row, value in sorted(batch.items()))
    if count <= PACKED_ABOVE:
        files = []
        for row, data in images:
            files.append(f"{row:05d}.png")
            (folder / files[-1]).write_bytes(data)
        return files
    return [
        name
        for number, pack in groupby(images, lambda item: item[0] // PER_PACK)
        for name in _write_pack(folder, f"{number:05d}.tar", pack)
    ]


def _write_pack(folder: Path, pack: str, images: Iterable[tuple[int, bytes]]) -> Iterator[str]:
    """Writes a tar file that depends on nothing but the images."""
    with tarfile.open(folder / pack, "w") as tar:
        for row, data in images:
            member = tarfile.TarInfo(f"{row:08d}.png")
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
            yield f"{pack}/{member.name}"


def is_packed(file: Path) -> bool:
    """Whether an image is in a pack, which stands in its path like a folder."""
    return file.parent.suffix == ".tar"


def image_bytes(file: Path) -> bytes:
    """The bytes of an image's file, also of one in a pack.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not is_packed(file):
        return file.read_bytes()
    pack = file.parent
    try:
        start, size = _members(pack, pack.stat().st_mtime_ns)[file.name]
    except KeyError:
        raise FileNotFoundError(f"{pack} has no {file.name}") from None
    with pack.open("rb") as opened:
        opened.seek(start)
        return opened.read(size)


@lru_cache(maxsize=64)
def _members(pack: Path, changed: int) -> dict[str, tuple[int, int]]:
    """Name -> where an image's bytes begin in a pack, and how many they are."""
    with tarfile.open(pack) as tar:
        return {member.name: (member.offset_data, member.size) for member in tar if member.isfile()}


def read_images(folder: Path, files: Sequence[str]) -> np.ndarray:
    """Images of one size as uint8 (B, H, W, 3). An alpha channel is dropped: scorers take RGB."""
    return np.stack([decode_rgb(image_bytes(folder / file)) for file in files])


def image_reader(folder: Path, threads: int, most_bytes: int) -> Callable[[Sequence[str]], np.ndarray]:
    """What reads images of a folder as `read_images` does, but decodes those that it is asked for again only once.

    Args:
        threads: that decode.
        most_bytes: of the images that are kept, 3 per pixel; those beyond are decoded each time.
    """
    kept: dict[str, np.ndarray] = {}

    def read(files: Sequence[str]) -> np.ndarray:
        missing = [file for file in files if file not in kept]
        decoded = in_order(lambda file: decode_rgb(image_bytes(folder / file)), missing, threads)
        fresh = dict(zip(missing, decoded, strict=True))
        images = np.stack([fresh[file] if file in fresh else kept[file] for file in files])
        room = most_bytes - sum(image.nbytes for image in kept.values())
        kept.update(list(fresh.items())[: max(0, room) // images[0].nbytes])
        return images

    return read


def decode_rgb(data: bytes) -> np.ndarray:
    """An image's file as uint8 (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def thumbnail_uri(image: Image.Image | Path, most_bytes: int) -> str:
    """A small copy of an image as a data URI: WebP, lossless where the image is tiny, and smaller if it has to be."""
    source = (Image.open(io.BytesIO(image_bytes(image))) if isinstance(image, Path) else image).convert("RGB")
    data = b""
    for side in SIDES:
        small = source.copy()
        small.thumbnail((side, side))
        with io.BytesIO() as file:
            small.save(file, "WEBP", quality=82, lossless=max(small.size) <= SMALL and small.size == source.size)
            data = file.getvalue()
        if len(data) <= most_bytes:
            break
    return "data:image/webp;base64," + base64.b64encode(data).decode()
