"""What a variant of LoRA adds to a layer's factors: small vectors, the config field, and PEFT's names for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["EXTRAS", "FORWARD", "SCRATCH", "Extra", "asked_for", "beside"]


@dataclass(frozen=True)
class Extra:
    """One tensor of a variant, beside A and B.

    Attributes:
        name: what it is called here.
        field: the field of `LoRAConfig` that asks for it.
        key: PEFT's name for it, after the module's path.
        size: its length: the layer's outputs, the rank, or as the field's settings say (see `length`).
        kinds: the kinds of layer that can have it.
        weight: whether what it computes depends on the base's weight.
        gain: whether it multiplies the layer's output.
        training: whether only training reads it: the layer then computes what it does without.
        trains: whether it has a gradient.
    """

    name: str
    field: str
    key: str
    size: Literal["out", "rank", "group", "samples"]
    kinds: tuple[str, ...] = ("linear",)
    weight: bool = False
    gain: bool = False
    training: bool = False
    trains: bool = True

    def length(self, config: Any, in_features: int, out_features: int, rank: int) -> int:
        """How many numbers it has in a layer of these sizes."""
        if self.size == "group":
            return -(-in_features // int(getattr(config, self.field)["num_groups"]))
        if self.size == "samples":
            return int(getattr(config, self.field)["num_samples"])
        return out_features if self.size == "out" else rank


# In the order in which they are applied.
EXTRAS: Mapping[str, Extra] = {
    extra.name: extra
    for extra in (
        Extra("diagonal", "kasa_config", "lora_diag", "rank", weight=True),
        Extra(
            "magnitude",
            "use_dora",
            "lora_magnitude_vector",
            "out",
            ("linear", "embedding", "conv"),
            weight=True,
            gain=True,
        ),
        Extra("offset", "lora_bias", "lora_B.bias", "out", ("linear", "conv")),
        Extra("projection", "velora_config", "lora_velora_embed", "group", training=True, trains=False),
        Extra("deviation", "monteclora_config", "lora_monteclora_sampler.std_prior", "rank", training=True),
        Extra("experts", "monteclora_config", "lora_monteclora_sampler.expert_weights_prior", "samples", training=True),
    )
}


def asked_for(config: Any) -> tuple[str, ...]:
    """The names of the extras that a config asks for, on every layer that it adapts."""
    return tuple(extra.name for extra in EXTRAS.values() if getattr(config, extra.field) not in (None, False))


# Those that the layer's output depends on.
FORWARD = tuple(name for name, extra in EXTRAS.items() if not extra.training)

# What PEFT's modules hold beside the vectors and overwrite before they read it, by name, and the vector that it is of.
SCRATCH: Mapping[str, str] = {
    "lora_monteclora_sampler.gaussian_var_prior": "deviation",
    "lora_monteclora_sampler.expert_weights": "experts",
}


def beside(extras: Mapping[str, Any]) -> dict[str, Any]:
    """The `SCRATCH` of a layer with these vectors, by PEFT's name, as PEFT begins it."""
    made: dict[str, Callable[[Any], Any]] = {
        "deviation": lambda vector: vector.new_ones(len(vector)).diag(),
        "experts": lambda vector: vector.new_full((len(vector),), 1 / len(vector)),
    }
    return {key: made[name](extras[name].detach()) for key, name in SCRATCH.items() if name in extras}
