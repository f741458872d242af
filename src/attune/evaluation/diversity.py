"""Signs of reward hacking: lost variety, drift from the base, burnt pixels.

Numpy only. Features are one vector per image (CLIP, DINOv2, or whatever the caller has), images are
(B, H, W, 3) floats in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def pairwise_distance(features: np.ndarray) -> float:
    """Mean of 1 - cosine over all pairs of features (N, D): 0 for copies, 1 for unrelated; nan if N < 2."""
    x = _unit(features)
    n = len(x)
    if n < 2:
        return float("nan")
    total = float(np.square(x.sum(axis=0)).sum())  # sum of all cosines, the n own ones included
    return 1 - (total - n) / (n * (n - 1))


def vendi(features: np.ndarray) -> float:
    """Vendi score of features (N, D): how many distinct images they amount to, 1 .. N.

    Source: Friedman and Dieng 2023, arXiv:2210.02410: exp of the entropy of the eigenvalues of K / N, K the
    cosine kernel. Those are the squared singular values of the unit features over N, so K is never built.
    """
    x = _unit(features)
    eigenvalues = np.linalg.svd(x, compute_uv=False) ** 2 / len(x)
    positive = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def per_prompt(statistic: Callable[[np.ndarray], float], features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """A statistic of each prompt's features (N, D), as (n,) by sorted prompts; nan of a single image."""
    distinct, owner = np.unique(np.asarray(prompts, dtype=object), return_inverse=True)
    groups = [np.asarray(features)[owner == i] for i in range(len(distinct))]
    return np.array([statistic(group) if len(group) > 1 else float("nan") for group in groups])


def cmmd(x: np.ndarray, y: np.ndarray, *, sigma: float = 10.0) -> float:
    """Distance between two sets of features (N, D) and (M, D), x 1000; 0 for identical sets.

    Source: Jayasumana et al. 2024, arXiv:2401.09603: biased squared MMD of unit features under an RBF kernel.
    The name holds for CLIP ViT-L/14-336 features only; with others, compare only with itself.
    """
    x, y = _unit(x), _unit(y)
    return 1000 * (_mean_rbf(x, x, sigma) + _mean_rbf(y, y, sigma) - 2 * _mean_rbf(x, y, sigma))


def _mean_rbf(x: np.ndarray, y: np.ndarray, sigma: float) -> float:
    squared_distance = np.maximum(2 - 2 * x @ y.T, 0)
    return float(np.exp(-squared_distance / (2 * sigma**2)).mean())


def saturation(images: np.ndarray) -> np.ndarray:
    """Share of burnt or crushed pixels of images (B, H, W, 3), as (B,).

    A pixel counts if any channel, in 8-bit levels, is 0, 1, 254 or 255.
    """
    levels = np.rint(_checked(images) * 255)
    return ((levels <= 1) | (levels >= 254)).any(axis=-1).mean(axis=(1, 2))


def high_frequency(images: np.ndarray) -> np.ndarray:
    """Share of the energy of grey images (B, H, W, 3) above half the Nyquist frequency, as (B,); 0 if flat.

    Grids, ringing and speckle, the usual debris of over-optimised rewards, live there. The mean is left out.
    """
    grey = _checked(images) @ np.array([0.299, 0.587, 0.114])
    grey = grey - grey.mean(axis=(1, 2), keepdims=True)
    energy = np.abs(np.fft.fft2(grey)) ** 2
    frequency = np.hypot(np.fft.fftfreq(grey.shape[1])[:, None], np.fft.fftfreq(grey.shape[2])[None, :])
    total = energy.sum(axis=(1, 2))
    high = energy[:, frequency > 0.25].sum(axis=1)  # cycles per pixel; Nyquist is 0.5
    return np.where(total > 1e-12, high / np.maximum(total, 1e-12), 0.0)


def _unit(features: np.ndarray) -> np.ndarray:
    x = np.asarray(features, dtype=float)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise ValueError("feature vectors must be finite and not zero")
    return x / norms


def _checked(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images must be floats (B, H, W, 3), found {images.dtype} {images.shape}")
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images must lie in [0, 1], found {images.min():.3f} to {images.max():.3f}")
    return images.astype(float)
