"""Room for adapters to come: putting them then moves no bank and changes no class; a compiled graph stays valid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .attachment import state_of
from .config import LoRAConfig
from .errors import LoRAStateError
from .expertlayers import ExpertSlots
from .layerinfo import modules_of
from .layers import LoRALinear, restore
from .slots import LoRASlots
from .targeting import resolve

__all__ = ["Room", "note", "release", "reserved"]

_RESERVED = "_lora_reserved"


@dataclass(frozen=True)
class Room:
    """What is reserved: slots and rank of the banks, and the layers that have them without an adapter, too."""

    slots: int
    rank: int
    paths: tuple[str, ...] = ()


def reserved(model: nn.Module) -> Room | None:
    """What is reserved on the model."""
    room: Room | None = vars(model).get(_RESERVED)
    return room


def note(
    model: nn.Module, slots: int | None, rank: int | None = None, targets: str | Sequence[str] | None = None
) -> None:
    """Write down what is reserved, and let the banks that are there hold it; see `model.reserve`."""
    if slots is None:
        vars(model).pop(_RESERVED, None)
        release(model)
        return
    for name, value in (("slots", slots), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LoRAStateError(
                f"{name}={value!r}: room is reserved for one adapter of rank 1 at least.",
                name=name,
                value=value,
                remedy="Give a positive whole number.",
            )
    assert rank is not None
    paths: tuple[str, ...] = ()
    if targets is not None:
        found = resolve(model, LoRAConfig(r=1, target_modules=targets))
        paths = tuple(target.path for target in found.targets)
    vars(model)[_RESERVED] = Room(slots, rank, paths)
    state = state_of(model)
    if state is None:
        return
    with state.lock, torch.inference_mode(False):
        for module in modules_of(model).values():
            held = module._modules.get("lora_slots")
            if isinstance(held, LoRASlots) and any(slot.rank for slot in held.slots.values()):
                held.reserve(slots, rank)
            for bank in held.banks().values() if isinstance(held, ExpertSlots) else ():
                bank.reserve_experts(slots, rank)


def release(model: nn.Module) -> None:
    """Give layers that hold no adapter their classes back."""
    for module in modules_of(model).values():
        if isinstance(module, LoRALinear) and module.lora_slots.kept:
            module.lora_slots.kept = False
            if not module.lora_slots.slots:
                restore(module)  # the class first: see LoRALinear.forward
                del module.lora_slots
