"""Five linear layers in a row: what the LAION aesthetic predictor and ImageReward read their score with.

There is no activation between them, so they are one affine map, stored as five.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from attune.pretrained import build_with

LAYERS = (0, 2, 4, 6, 7)  # the gaps are dropout, which does nothing here
WIDTHS = (1024, 128, 64, 16, 1)


class Head(nn.Module):
    """The layers, under the published names `layers.{0,2,4,6,7}`; features (B, D) to scores (B,)."""

    def __init__(self, features: int = 768, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        sizes = zip((features, *widths), widths, strict=False)
        self.layers = nn.ModuleDict({str(n): nn.Linear(*size) for n, size in zip(LAYERS, sizes, strict=True)})

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)


def head_of(tensors: Mapping[str, Tensor], source: str) -> Head:
    """A frozen float32 head of whatever widths the tensors have.

    Raises:
        ValueError: tensors are missing or unexpected.
    """
    weights = [tensors[name] for n in LAYERS if (name := f"layers.{n}.weight") in tensors]
    if len(weights) < len(LAYERS):
        raise ValueError(f"{source} has no layers.{{0,2,4,6,7}}.weight, only {sorted(tensors)}")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    sizes = weights[0].shape[1], [len(weight) for weight in weights]
    return build_with(lambda: Head(*sizes), tensors, source).eval().requires_grad_(False)
