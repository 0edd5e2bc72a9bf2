"""What a variant of LoRA adds to a layer's factors: one small vector, its config field, and PEFT's name for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["EXTRAS", "Extra", "asked_for"]


@dataclass(frozen=True)
class Extra:
    """One tensor of a variant, beside A and B.

    Attributes:
        name: what it is called here.
        field: the field of `LoRAConfig` that asks for it.
        key: PEFT's name for it, after the module's path.
        size: its length: the layer's outputs, or the rank.
        kinds: the kinds of layer that can have it.
        weight: whether what it computes depends on the base's weight.
        gain: whether it multiplies the layer's output.
    """

    name: str
    field: str
    key: str
    size: Literal["out", "rank"]
    kinds: tuple[str, ...] = ("linear",)
    weight: bool = False
    gain: bool = False


# In the order in which they are applied.
EXTRAS: Mapping[str, Extra] = {
    extra.name: extra
    for extra in (
        Extra("diagonal", "kasa_config", "lora_diag", "rank", weight=True),
        Extra("magnitude", "use_dora", "lora_magnitude_vector", "out", ("linear", "embedding"), weight=True, gain=True),
        Extra("offset", "lora_bias", "lora_B.bias", "out"),
    )
}


def asked_for(config: Any) -> tuple[str, ...]:
    """The names of the extras that a config asks for, on every layer that it adapts."""
    return tuple(extra.name for extra in EXTRAS.values() if getattr(config, extra.field) not in (None, False))
