"""Weights of which each process holds a piece: fully sharded data parallelism (FSDP2, `torch.distributed.fsdp`).

A process puts a block's weights together for as long as it computes with them, so all processes must call a module
equally often. Weights, gradients and the optimizer's state are DTensors, cut along their first dimension.

Source: Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv:2304.11277.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

# The classes of diffusers' modules whose weights are put together one module after another. What lies outside of them,
# a denoiser's first and last layer and its embeddings, is put together for the whole call.
BLOCKS = (
    *("BasicTransformerBlock", "Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"),
    *("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock", "ZImageTransformerBlock"),
)


def is_sharded(what: nn.Module | Iterable[Tensor]) -> bool:
    """Whether each process holds pieces: of a module, or of its weights."""
    if isinstance(what, nn.Module):
        return isinstance(what, FSDPModule)
    return any(isinstance(weight, DTensor) for weight in what)


def shard_with_frozen_copy(module: nn.Module) -> nn.Module:
    """Cuts a module's weights over all processes, in place; returns a frozen copy that is cut alike.

    No process ever holds the copy whole. The processes must have met (`torch.distributed` is initialised).
    """
    on_meta = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        for weight in module.parameters()
    }
    frozen, device = copy.deepcopy(module, on_meta), next(module.parameters()).device
    for network in (module, frozen):
        _cut(network)
    buffers = dict(frozen.named_buffers())
    frozen.to_empty(device=device)
    with torch.no_grad():
        for ours, theirs in zip(frozen.parameters(), module.parameters(), strict=True):
            ours.copy_(theirs)
        for name, buffer in frozen.named_buffers():
            buffer.copy_(buffers[name])
    return frozen


def _cut(module: nn.Module) -> None:
    # the outermost module is cut up again after each call, too: else it would go on computing with the weights that
    # it has put together, though others have been loaded into the pieces
    for part in reversed(list(module.modules())):  # the inner ones first
        if part is module or type(part).__name__ in BLOCKS:
            fully_shard(part, reshard_after_forward=True)


def local(weight: Tensor) -> Tensor:
    """The piece of a weight that this process holds; a weight that is not cut is all here."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor put together from its pieces; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(value: Tensor, weight: Tensor) -> Tensor:
    """This process's piece of a whole tensor, cut as `weight` is and on its device; the tensor, if that is not cut."""
    if not isinstance(weight, DTensor):
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def first_nonfinite(weights: Sequence[Tensor]) -> int | None:
    """Index of the first weight that is not finite, in whatever process; None if all are."""
    own = next((i for i, weight in enumerate(weights) if not torch.isfinite(local(weight)).all()), None)
    if not is_sharded(weights):
        return own
    found: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return min((i for i in found if i is not None), default=None)


def gathered_state(module: nn.Module) -> dict[str, Any]:
    """All weights of a sharded module on the CPU, in the main process; an empty dictionary in the others."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module was of before it was sharded, which derives another one from it."""
    return cast("type[nn.Module]", next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule)))
