"""Losses and gradients that are NaN or infinite: the error, and the module in which it began."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from attune.interfaces import Objective


class NonFiniteError(RuntimeError):
    """A loss, gradient or validation score became NaN or infinite."""


def locate_nonfinite(objective: Objective, module: nn.Module, minibatch: Any) -> str:
    """Names the first weight of `module` that is not finite, else the first module in it with such an output.

    Outputs are those of one more evaluation of the loss of `minibatch`. It runs uncompiled, because compiled code
    ignores hooks that were added after it was compiled.
    """
    root: nn.Module = module.module if isinstance(module, DistributedDataParallel) else module
    for name, weight in root.named_parameters():
        if not torch.isfinite(weight).all():
            return f"weight {name} is not finite"
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = output if isinstance(output, (tuple, list)) else [output]
            if any(isinstance(x, torch.Tensor) and not torch.isfinite(x).all() for x in tensors):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in root.named_modules()]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        objective.loss(minibatch)
    for hook in hooks:
        hook.remove()
    return f"first bad output in module {found[0] or 'root'}" if found else "every module's output is finite"
