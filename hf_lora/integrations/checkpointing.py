"""Activation checkpointing: the recompute runs under what was active in the forward.

The recompute happens after a `with model.use_lora(...)` has ended, and often on autograd's own thread. Left alone, the
non-reentrant kind then raises and the reentrant kind silently loses gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layerinfo import modules_of
from ..state import LoRAState, active_rows

__all__ = ["BoundCheckpoint", "bind_checkpoints", "unbind_checkpoints"]

_ATTRIBUTE = "_gradient_checkpointing_func"  # what transformers' checkpointed layers call


class BoundCheckpoint:
    """A checkpoint function that keeps what is active for the recompute."""

    def __init__(self, function: Callable[..., Any], state: LoRAState) -> None:
        self.function, self.state = function, state

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `run(*args)` checkpointed."""
        if not torch.compiler.is_compiling():
            return self.function(self.state.bind(run), *args, **kwargs)
        # In a graph the region's inputs are what its recompute sees again: read the state before the region.
        x = next(a for a in args if isinstance(a, Tensor))
        self.state.traced = active_rows(x, self.state)
        output = self.function(run, *args, **kwargs)
        self.state.traced = None
        return output


def bind_checkpoints(model: nn.Module, state: LoRAState) -> None:
    """Wrap every checkpoint function that the model's modules hold."""
    for module in modules_of(model).values():
        function = module.__dict__.get(_ATTRIBUTE)
        if function is not None and not isinstance(function, BoundCheckpoint):
            setattr(module, _ATTRIBUTE, BoundCheckpoint(function, state))


def unbind_checkpoints(model: nn.Module) -> None:
    """Give every module its own checkpoint function back."""
    for module in modules_of(model).values():
        function = module.__dict__.get(_ATTRIBUTE)
        if isinstance(function, BoundCheckpoint):
            setattr(module, _ATTRIBUTE, function.function)
