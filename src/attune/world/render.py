"""Renderer of the embedded world: scenes to anti-aliased images, thousands per second.

Every shape is a signed distance (pixels, negative inside); coverage is the distance clipped to one pixel, so
edges are anti-aliased. Images are float32 (B, size, size, 3) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attune.world.grammar import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Scene

IMAGE_SIZE = 32
RADII = {
    "small": 5.2,
    "medium": 8.0,
    "large": 11.0,
}  # pixels of a 32 px image; the radius of the circle of equal area
GROUP_RADIUS = 5.2  # pixels; each object of a count or a relation
_MOST_OBJECTS = 3
_ABSENT = -1.0  # radius of an object slot a scene does not use


def shape_distance(shape: int, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to shape number `shape` of `SHAPES`, of the area of a circle of radius r.

    x and y are pixel coordinates from the shape's centroid, y downwards; all arguments broadcast.
    """
    ax, ay = np.abs(x), np.abs(y)
    name = SHAPES[shape]
    if name == "circle":
        return np.hypot(x, y) - r
    if name == "square":
        return np.maximum(ax, ay) - 0.886 * r  # (2a)^2 = pi r^2
    if name == "triangle":  # equilateral, point up; inradius a, area 3 sqrt(3) a^2
        a = 0.7776 * r
        return np.maximum(0.8660 * ax - 0.5 * y, y) - a
    if name == "diamond":  # |x| + |y| <= d, area 2 d^2
        return (ax + ay - 1.2533 * r) * 0.7071
    if name == "cross":  # arms of half length L and half width L/3, area 20 L^2 / 9
        arm = 1.189 * r
        bar = lambda u, v: np.maximum(u - arm, v - arm / 3)  # noqa: E731
        return np.minimum(bar(ax, ay), bar(ay, ax))
    outer = 1.15 * r  # ring: pi (outer^2 - inner^2) = pi r^2
    inner = np.sqrt(outer**2 - r**2)
    return np.abs(np.hypot(x, y) - (outer + inner) / 2) - (outer - inner) / 2


def render(scenes: Sequence[Scene], rng: np.random.Generator, size: int = IMAGE_SIZE) -> np.ndarray:
    """Draws each scene once, with the placement the prompt leaves open drawn from `rng`.

    Returns: float32 (B, size, size, 3) in [0, 1].
    """
    placed = [_place(scene, rng) for scene in scenes]
    shape, radius = (np.array([p[k] for p in placed]) for k in (0, 1))
    centre = np.array([p[2] for p in placed]) * size / IMAGE_SIZE
    radius = radius * size / IMAGE_SIZE
    colour = np.array([p[3] for p in placed], dtype=np.float32)
    plain = np.array([BACKGROUNDS[s.background] for s in scenes], dtype=np.float32)[:, None, None, :]
    image: np.ndarray = np.broadcast_to(plain, (len(scenes), size, size, 3)).copy()
    grid = np.arange(size) + 0.5
    for slot in range(_MOST_OBJECTS):
        x = grid[None, None, :] - centre[:, slot, 0, None, None]
        y = grid[None, :, None] - centre[:, slot, 1, None, None]
        distance = np.zeros((len(scenes), size, size))
        for number in range(len(SHAPES)):
            rows = (shape[:, slot] == number) & (radius[:, slot] > 0)
            distance[rows] = shape_distance(number, x[rows], y[rows], radius[rows, slot, None, None])
        cover = np.clip(0.5 - distance, 0, 1) * (radius[:, slot] > 0)[:, None, None]
        cover = cover[..., None].astype(np.float32)
        image = image * (1 - cover) + cover * colour[:, slot, None, None, :]
    return image


def _place(scene: Scene, rng: np.random.Generator) -> tuple[list[int], list[float], list[tuple], list[tuple]]:
    """Shape numbers, radii, centres and colours of up to three objects (32 px units)."""
    middle = IMAGE_SIZE / 2
    if scene.kind == "one":
        radius = RADII[str(scene.size)] * rng.uniform(0.95, 1.05)
        slack = max(middle - 1.35 * radius - 0.5, 0.3)
        centres = [tuple(middle + rng.uniform(-1, 1, 2) * min(slack, 4.0))]
        radii = [radius]
    elif scene.kind == "count":
        radii = list(GROUP_RADIUS * rng.uniform(0.94, 1.06) * np.ones(scene.count) * (0.88 if scene.count == 3 else 1))
        centres = _scatter(scene.count, rng)
    else:
        direction = np.array(RELATIONS[str(scene.relation)], dtype=float)
        half = direction * rng.uniform(7.6, 8.6) + direction[::-1] * rng.uniform(-2.5, 2.5)
        origin = middle + rng.uniform(-0.8, 0.8, 2)
        centres = [tuple(origin + half), tuple(origin - half)]
        radii = list(GROUP_RADIUS * rng.uniform(0.94, 1.06, 2))
    n = len(centres)
    spare = _MOST_OBJECTS - n
    shapes = [SHAPES.index(s) for s in (scene.shapes * n)[:n]]
    colours = [COLOURS[c] for c in (scene.colours * n)[:n]]
    return (
        shapes + [0] * spare,
        radii + [_ABSENT] * spare,
        centres + [(0, 0)] * spare,
        colours + [(0, 0, 0)] * spare,
    )


def _scatter(count: int, rng: np.random.Generator) -> list[tuple]:
    """Centres of two or three equal objects that do not touch: a rotated bar or triangle, jittered."""
    angle = rng.uniform(0, 2 * np.pi)
    reach = rng.uniform(7.8, 8.8) if count == 2 else rng.uniform(8.8, 9.6)
    angles = angle + 2 * np.pi * np.arange(count) / count
    middle = IMAGE_SIZE / 2 + rng.uniform(-0.8, 0.8, 2)
    return [(middle[0] + reach * np.cos(a), middle[1] + reach * np.sin(a)) for a in angles]
