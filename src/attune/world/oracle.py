"""The oracle: the score in [0, 1] that the simulated human of the embedded world gives an image, free of noise.

    score = sqrt(faithfulness * appeal)

Faithfulness: whether the image shows what the prompt says: background, colours, shapes, and size, count or
relation. Appeal: whether it is a good image whatever it shows: sharp edges, calm surfaces, pure colours. Both are
measured on the pixels alone, so generated images are judged as rendered ones are. numpy and scipy only, deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy.ndimage import label

from attune.world.grammar import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Scene, parse
from attune.world.render import IMAGE_SIZE, RADII, shape_distance

PALETTE = np.array([*COLOURS.values(), *BACKGROUNDS.values()], dtype=np.float32)
PALETTE_NAMES = [*COLOURS, *BACKGROUNDS]
_SIGMA = 0.11  # RGB distance at which a pixel no longer counts as a palette colour
_SMALLEST_AREA = 12  # pixels of a 32 px image; smaller specks are not objects
_SHAPE_TEMPERATURE = 0.05  # in IoU: how sharply the best fitting shape wins
_WEIGHTS = {"background": 0.5, "colour": 1.0, "shape": 0.7, "layout": 1.0}


@dataclass(frozen=True)
class Verdict:
    """The oracle's judgement of one image; every field in [0, 1], 1 is best."""

    score: float
    faithfulness: float
    appeal: float
    background: float
    colour: float
    shape: float
    layout: float  # size of one object, number of a count, relation of two
    sharpness: float
    calm: float
    purity: float


VERDICT_FIELDS = tuple(field.name for field in fields(Verdict))


@dataclass(frozen=True)
class _Blob:
    """A connected patch of one object colour."""

    colour: int
    area: int
    centre: np.ndarray  # (x, y) pixels
    shape: np.ndarray  # (6,) probability of each shape


def judge(images: np.ndarray, prompts: Sequence[str]) -> list[Verdict]:
    """Judges images against prompts.

    Args:
        images: (B, H, W, 3) float in [0, 1].
        prompts: B prompts of the grammar.

    Raises:
        ValueError: lengths differ, values leave [0, 1], or a prompt is not in the grammar.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"oracle images must lie in [0, 1], found {images.min():.3f} to {images.max():.3f}")
    return [_judge_one(image, parse(prompt)) for image, prompt in zip(images, prompts, strict=True)]


def scores(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """The overall oracle score of each image, float64 (B,)."""
    return np.array([verdict.score for verdict in judge(images, prompts)])


def _judge_one(image: np.ndarray, scene: Scene) -> Verdict:
    membership = _memberships(image)
    blobs = _find_blobs(membership)
    parts = _faithfulness(scene, membership, blobs)
    faithfulness = float(np.prod([parts[name] ** weight for name, weight in _WEIGHTS.items()]))
    appeal_parts = _appeal(image, membership)
    appeal = float(np.prod(list(appeal_parts.values())) ** (1 / len(appeal_parts)))
    return Verdict(float(np.sqrt(faithfulness * appeal)), faithfulness, appeal, **parts, **appeal_parts)


def _memberships(image: np.ndarray) -> np.ndarray:
    """Soft assignment of each pixel to the 11 palette colours, (H, W, 11), summing to <= 1 (the rest is "other")."""
    distance = ((image[:, :, None, :] - PALETTE) ** 2).sum(-1)
    weight = np.exp(-distance / (2 * _SIGMA**2))
    return weight / (weight.sum(-1, keepdims=True) + 0.05)


def _find_blobs(membership: np.ndarray) -> list[_Blob]:
    """Objects: connected pixels whose likeliest palette colour is one object colour, largest first."""
    size = membership.shape[0]
    best = np.where(membership.max(-1) > 0.3, membership.argmax(-1), -1)
    blobs = []
    for colour in range(len(COLOURS)):
        patches, n = label(best == colour)
        for patch in range(1, n + 1):
            mask = patches == patch
            area = int(mask.sum())
            if area >= _SMALLEST_AREA * (size / IMAGE_SIZE) ** 2:
                ys, xs = np.nonzero(mask)
                centre = np.array([xs.mean() + 0.5, ys.mean() + 0.5])
                blobs.append(_Blob(colour, area, centre, _shape_posterior(mask, centre, area)))
    return sorted(blobs, key=lambda blob: -blob.area)


def _shape_posterior(mask: np.ndarray, centre: np.ndarray, area: int) -> np.ndarray:
    """How well each ideal shape of the same area and centroid overlaps the patch, as probabilities (6,)."""
    grid = np.arange(mask.shape[0]) + 0.5
    x, y = grid[None, :] - centre[0], grid[:, None] - centre[1]
    radius = np.sqrt(area / np.pi) * 1.03  # anti-aliased borders belong to no colour
    overlap = np.empty(len(SHAPES))
    for number in range(len(SHAPES)):
        ideal = shape_distance(number, x, y, radius) < 0
        overlap[number] = (mask & ideal).sum() / max((mask | ideal).sum(), 1)
    weight = np.exp((overlap - overlap.max()) / _SHAPE_TEMPERATURE)
    return weight / weight.sum() * min(1.0, overlap.max() / 0.8)


def _faithfulness(scene: Scene, membership: np.ndarray, blobs: list[_Blob]) -> dict[str, float]:
    """Sub-scores of faithfulness, each in [0.02, 1]: above 0, or one of them would hide all others in the product."""
    found = _assign(scene, blobs)
    colours = [PALETTE_NAMES.index(c) for c in scene.colours]
    right = sum(membership[..., c].sum() for c in set(colours))
    object_area = membership[..., : len(COLOURS)].sum()
    shapes = [SHAPES.index(s) for s in scene.shapes]
    wanted = list(zip(colours, shapes, strict=True)) * (scene.count if scene.kind == "count" else 1)
    shape = [blob.shape[s] if blob else 0.0 for blob, (_, s) in zip(found, wanted, strict=True)]
    present = [float(blob is not None and blob.colour == c) for blob, (c, _) in zip(found, wanted, strict=True)]
    parts = {
        "background": _background(scene, membership),
        "colour": float(right / max(object_area, 1e-6)) * float(np.mean(present)) if object_area > 8 else 0.0,
        "shape": float(np.prod(np.maximum(shape, 0.02)) ** (1 / len(shape))),
        "layout": _layout(scene, found, blobs, membership.shape[0]),
    }
    return {name: float(np.clip(value, 0.02, 1.0)) for name, value in parts.items()}


def _assign(scene: Scene, blobs: list[_Blob]) -> list[_Blob | None]:
    """The blob taken for each requested object: of its colour if there is one, else the largest left."""
    n = scene.count
    left, found = list(blobs), []
    for colour in (scene.colours * n)[:n] if scene.kind == "count" else scene.colours:
        number = PALETTE_NAMES.index(colour)
        chosen = next((b for b in left if b.colour == number), None)
        found.append(chosen)
        if chosen:
            left.remove(chosen)
    for i, blob in enumerate(found):
        if blob is None and left:
            found[i] = left.pop(0)
    return found


def _background(scene: Scene, membership: np.ndarray) -> float:
    """Share of the non-object pixels that have the requested background colour, in [0, 1]."""
    groups = membership[..., len(COLOURS) :]
    outside = 1 - membership[..., : len(COLOURS)].sum(-1)
    solid = outside > 0.5
    if not solid.any():
        return 0.0
    wanted = groups[..., list(BACKGROUNDS).index(scene.background)][solid]
    # one-pixel borders between object and background have neither colour, so a share of 0.85 counts as all
    return float(min(1.0, wanted.mean() / 0.85))


def _layout(scene: Scene, found: list[_Blob | None], blobs: list[_Blob], size: int) -> float:
    extra = np.exp(-1.5 * abs(len(blobs) - scene.count))
    if scene.kind == "count":
        return float(extra)
    there = [blob for blob in found if blob is not None]
    if len(there) < len(found):
        return 0.0
    if scene.kind == "one":
        radius = np.sqrt(there[0].area / np.pi) * 1.06 * IMAGE_SIZE / size
        log_ratio = np.log(radius / RADII[str(scene.size)])
        return float(np.exp(-((max(abs(log_ratio) - 0.1, 0) / 0.2) ** 2)) * extra)
    offset = (there[0].centre - there[1].centre) * IMAGE_SIZE / size
    direction = np.array(RELATIONS[str(scene.relation)], dtype=float)
    along, across = offset @ direction, abs(offset @ direction[::-1])
    return float(np.clip(0.5 + (along - across) / 8, 0, 1) * extra)


def _appeal(image: np.ndarray, membership: np.ndarray) -> dict[str, float]:
    """Sharpness of edges, calm of surfaces, purity of colours; each in [0.02, 1]."""
    steps = np.concatenate(
        [
            np.linalg.norm(np.diff(image, axis=0), axis=-1).ravel(),
            np.linalg.norm(np.diff(image, axis=1), axis=-1).ravel(),
        ]
    )
    edge = steps > 0.12
    flat = steps[~edge]
    # an anti-aliased edge spreads its contrast over one or two steps, a blurred one over four or more
    contrast = np.quantile(steps[edge], 0.9) if edge.sum() > 20 else 0.0
    spread = _edge_spread(image) if edge.sum() > 20 else 9.0
    return {
        "sharpness": float(np.clip(np.exp(-max(spread - 1.55, 0) / 0.9) * min(1.0, contrast / 0.35), 0.02, 1)),
        "calm": float(np.clip(np.exp(-max(flat.mean() - 0.004, 0) / 0.03), 0.02, 1)) if len(flat) else 0.02,
        "purity": float(np.clip((membership.max(-1).mean() - 0.35) / 0.5, 0.02, 1)),
    }


def _edge_spread(image: np.ndarray) -> float:
    """Mean width of edges in pixels: how many neighbouring steps share one transition's contrast.

    For every line of pixels, (sum of steps)^2 / sum of squared steps counts equal steps; a line that crosses an
    object has two transitions, so the count is divided by the number of distinct peaks.
    """
    widths, weights = [], []
    for axis in (0, 1):
        steps = np.linalg.norm(np.diff(image, axis=axis), axis=-1)
        steps = np.moveaxis(steps, axis, 0) * (np.moveaxis(steps, axis, 0) > 0.03)
        padded = np.pad(steps, ((1, 1), (0, 0)))
        peaks = (padded[1:-1] >= padded[:-2]) & (padded[1:-1] > padded[2:]) & (steps > 0.06)
        total, squares, n = steps.sum(0), (steps**2).sum(0), peaks.sum(0)
        lines = n > 0
        widths.append(total[lines] ** 2 / squares[lines] / n[lines])
        weights.append(total[lines])
    width, weight = np.concatenate(widths), np.concatenate(weights)
    return float((width * weight).sum() / weight.sum()) if len(width) else 9.0
