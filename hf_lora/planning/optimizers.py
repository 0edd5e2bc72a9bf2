"""Optimizers by name, as Trainer's `optim` calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import LoRAConfigError

__all__ = ["NAMES", "Factory", "factory"]

Factory = Callable[[Iterable[torch.nn.Parameter]], Optimizer]


def _torch(name: str, **arguments: Any) -> Factory:
    def build(parameters: Iterable[torch.nn.Parameter]) -> Optimizer:
        built: Optimizer = getattr(torch.optim, name)(parameters, **arguments)
        return built

    return build


def _adafactor(parameters: Iterable[torch.nn.Parameter]) -> Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, scale_parameter=False, relative_step=False, lr=1e-3)


_ADAMW = _torch("AdamW", foreach=False)
NAMES: dict[str, Factory] = {
    "adamw": _ADAMW,
    "adamw_torch": _ADAMW,
    "adamw_torch_fused": _ADAMW,
    "adam": _torch("Adam", foreach=False),
    "adamax": _torch("Adamax", foreach=False),
    "nadam": _torch("NAdam", foreach=False),
    "radam": _torch("RAdam", foreach=False),
    "sgd": _torch("SGD", lr=1e-3, foreach=False),
    "sgd_momentum": _torch("SGD", lr=1e-3, momentum=0.9, foreach=False),
    "adagrad": _torch("Adagrad", foreach=False),
    "rmsprop": _torch("RMSprop", foreach=False),
    "adafactor": _adafactor,
}


def factory(optimizer: Any) -> tuple[str, Factory]:
    """Name and constructor of what a user calls an optimizer: a name, a class, or a function of the parameters.

    Raises:
        LoRAConfigError: a name that is not known, or something else.
    """
    if isinstance(optimizer, str) and optimizer in NAMES:
        return optimizer, NAMES[optimizer]
    if callable(optimizer):
        return getattr(optimizer, "__name__", type(optimizer).__name__), optimizer
    raise LoRAConfigError(
        f"optimizer={optimizer!r} is not known.",
        name="optimizer",
        value=optimizer,
        expected=sorted(NAMES),
        remedy=f"Give one of {', '.join(sorted(NAMES))}, or the class of an optimizer.",
    )
