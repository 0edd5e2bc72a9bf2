"""Room for adapters to come."""

from __future__ import annotations

import torch
from torch import nn

from .attachment import state_of
from .errors import LoRAStateError
from .layerinfo import modules_of
from .slots import LoRASlots

__all__ = ["RESERVED", "reserve"]

RESERVED = "_lora_reserved"  # slots and rank of banks to be made


def reserve(model: nn.Module, slots: int | None, rank: int | None = None) -> None:
    """Make room for adapters to come, so that putting them moves none that are there (and compiles nothing anew).

    Args:
        slots: how many adapters, those on the model included, in layers that get their first one later, too. None:
            forget it; what was made stays.
        rank: the largest of theirs.

    Raises:
        LoRAStateError: `slots` or `rank` is no positive number.
    """
    if slots is None or rank is None:
        vars(model).pop(RESERVED, None)
        return
    for name, value in (("slots", slots), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LoRAStateError(
                f"{name}={value!r}: room is reserved for one adapter of rank 1 at least.",
                name=name,
                value=value,
                remedy="Give a positive whole number.",
            )
    vars(model)[RESERVED] = (slots, rank)
    state = state_of(model)
    if state is None:
        return
    with state.lock, torch.inference_mode(False):
        for module in modules_of(model).values():
            held = module._modules.get("lora_slots")
            if isinstance(held, LoRASlots) and any(slot.rank for slot in held.slots.values()):
                held.reserve(slots, rank)
