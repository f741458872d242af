"""Where numbers first stop being numbers: in the data, in weights, or in a module."""

import math

import pytest
import torch

from attune.data.batches import PairBatch
from attune.interfaces import Conditioning
from attune.training.guard import NonFiniteError, assert_finite, nonfinite_input


def batch(**changes):
    """Three pairs of finite numbers, but for `changes`."""
    tensors = {"latents_0": torch.zeros(3, 1, 2, 2), "latents_1": torch.zeros(3, 1, 2, 2)}
    tensors |= {"label_0": torch.ones(3), "weight": torch.ones(3)}
    return PairBatch(
        ["a", "b", "c"], changes.pop("cond", Conditioning({"text": torch.zeros(3, 4)})), **tensors | changes
    )


def spoilt(shape, row, value):
    tensor = torch.zeros(shape)
    tensor[row] = value
    return tensor


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_data_are_named_with_their_row(value):
    assert nonfinite_input(batch()) is None
    found = nonfinite_input(batch(latents_1=spoilt((3, 1, 2, 2), (2, 0, 1, 1), value)))
    assert found == "the data, latents_1 of row 2 of the minibatch, is not finite"
    assert nonfinite_input(batch(label_0=spoilt((3,), 1, value))).startswith("the data, label_0 of row 1 ")
    embedding = Conditioning({"text": torch.zeros(3, 4), "pooled": spoilt((3, 4), (0, 3), value)})
    assert nonfinite_input(batch(cond=embedding)).startswith("the data, pooled of row 0 ")
    assert nonfinite_input((1.0, 2.0)) is None  # no tensors


def test_weights_are_named_with_their_place_and_a_remedy():
    assert_finite([torch.zeros(2), torch.ones(3, 4)])
    with pytest.raises(NonFiniteError, match=r"trained tensor 2 of 2, of shape \(3, 4\)\): a lower lr, or max_grad"):
        assert_finite([torch.zeros(2), spoilt((3, 4), (1, 1), math.inf)])
