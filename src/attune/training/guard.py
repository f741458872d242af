"""When numbers stop being numbers: say where it began."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from attune.interfaces import Objective


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite."""


def first_bad_module(objective: Objective, minibatch: Any) -> str:
    """Repeats the loss with hooks and names the first module with a non-finite weight or output."""
    trained = getattr(objective, "policy", None) or objective
    root: nn.Module = trained.module
    root = root.module if isinstance(root, DistributedDataParallel) else root
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
