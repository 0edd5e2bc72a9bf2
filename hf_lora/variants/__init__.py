"""The strategies by which an adapter changes a layer: one small file each, looked up by name.

`Plain` adds a pair of factors to the output. A variant (DoRA, lora_bias) is one more vector, and what it makes of the
pair's effect; an adapter may have several. VeLoRA and MonteCLoRA are steps of training: they change how an input goes
through A there, and the trained adapter is a plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..extras import EXTRAS
from .dora import DoRA
from .effect import Base, Effect, Variant
from .kasa import KaSA
from .lora_bias import LoRABiasTerm
from .monteclora import MonteCLoRA
from .plain import Plain
from .step import Narrow, TrainingStep
from .velora import VeLoRA

__all__ = [
    "PLAIN",
    "STEPS",
    "VARIANTS",
    "Base",
    "Effect",
    "Narrow",
    "Plain",
    "TrainingStep",
    "Variant",
    "effect_of",
    "initial_extras",
    "initial_steps",
    "narrowing",
    "scratch_of",
]

PLAIN = Plain()
# By the name of its vector in `extras.EXTRAS`, in the order in which they are applied.
VARIANTS: Mapping[str, Variant] = {"diagonal": KaSA(), "magnitude": DoRA(), "offset": LoRABiasTerm()}

# By the config's field. Each is given what those before it made of x Aᵀ.
STEPS: Mapping[str, TrainingStep] = {"velora_config": VeLoRA(), "monteclora_config": MonteCLoRA()}


def effect_of(extras: Mapping[str, Tensor], A: Tensor, B: Tensor, scaling: float, base: Callable[[], Base]) -> Effect:
    """What a pair and its vectors come to on a layer; differentiable in all of them.

    Args:
        extras: the vectors, by name.
        A: (R, in). B: (out, R), unscaled.
        base: the layer's weight, asked for if a variant depends on it.
    """
    held = base() if any(EXTRAS[name].weight for name in extras) else None
    effect = Effect(A, B if scaling == 1 else B * scaling)
    for name, variant in VARIANTS.items():
        if name in extras:
            effect = variant.apply(effect, extras[name], held, scaling)
    return effect


def initial_extras(
    names: tuple[str, ...], A: Tensor, B: Tensor, scaling: float, base: Callable[[], Base], *, random: bool = False
) -> dict[str, Tensor]:
    """The first values of a new adapter's vectors on a layer, in A's dtype."""
    names = tuple(name for name in names if name in VARIANTS)
    held = base() if any(EXTRAS[name].weight for name in names) else None
    return {name: VARIANTS[name].initial(held, A, B, scaling, random=random).to(A.device, A.dtype) for name in names}


def initial_steps(settings: Mapping[str, Mapping[str, Any]], A: Tensor) -> dict[str, Tensor]:
    """The first values of the vectors of the steps of training. settings: by the config's field. A: (R, in)."""
    return {name: own for field, given in settings.items() for name, own in STEPS[field].initial(A, given).items()}


def scratch_of(settings: Mapping[str, Mapping[str, Any]], extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the steps of training write down in a forward, by name."""
    return {name: own for field in settings for name, own in STEPS[field].scratch(extras).items()}


def narrowing(settings: Mapping[str, Mapping[str, Any]], held: Mapping[str, Tensor]) -> Narrow:
    """How an input goes through A in training. held: the steps' vectors and scratch, by name."""
    through: Narrow = F.linear
    for field, step in STEPS.items():
        if field in settings:
            through = step.narrow(through, held, settings[field])
    return through
