"""Losses and gradients that are NaN or infinite: the error, and the module in which it began."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attune.fsdp import first_nonfinite, local
from attune.interfaces import Objective


class NonFiniteError(RuntimeError):
    """A loss, gradient or validation score became NaN or infinite."""


def assert_finite(parameters: Sequence[Tensor]) -> None:
    """Raises NonFiniteError naming the first trained tensor that is not finite: such a model samples black images.

    Where weights are sharded all processes call this, and the error is raised in all of them.
    """
    if (i := first_nonfinite(parameters)) is not None:
        raise NonFiniteError(
            f"training has made weights NaN or infinite (the first is trained tensor {i + 1} of {len(parameters)}, "
            f"of shape {tuple(parameters[i].shape)}): a lower lr, or max_grad_norm, avoids that"
        )


def nonfinite_input(minibatch: Any) -> str | None:
    """Names the first tensor of the minibatch that is not finite, and its first such row; None if all are finite."""
    for name, rows in _tensors(minibatch):
        if bad := [i for i, row in enumerate(rows) if not torch.isfinite(row).all()]:
            return f"the data, {name} of row {bad[0]} of the minibatch, is not finite"
    return None


def nonfinite_weight(module: nn.Module) -> str | None:
    """Names the first weight of `module` that is not finite in this process, which may hold pieces; None if all are."""
    names = (name for name, weight in _root(module).named_parameters() if not torch.isfinite(local(weight)).all())
    return next((f"weight {name} is not finite" for name in names), None)


def nonfinite_output(objective: Objective, module: nn.Module, minibatch: Any) -> str:
    """Names the first module in `module` with an output that is not finite.

    Outputs are those of one more evaluation of the loss of `minibatch`. It runs uncompiled, because compiled code
    ignores hooks that were added after it was compiled.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = output if isinstance(output, (tuple, list)) else [output]
            if any(isinstance(x, torch.Tensor) and not torch.isfinite(x).all() for x in tensors):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in _root(module).named_modules()]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        objective.loss(minibatch)
    for hook in hooks:
        hook.remove()
    return f"first bad output in module {found[0] or 'root'}" if found else "every module's output is finite"


def _root(module: nn.Module) -> nn.Module:
    """The network inside of a distributed wrapper."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def _tensors(value: Any, name: str = "minibatch") -> Iterator[tuple[str, Tensor]]:
    """The tensors with rows in a value, with the names of the fields and keys that lead to them."""
    if isinstance(value, Tensor):
        yield from [(name, value)] if value.ndim else []
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name), field.name)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, str(key))
