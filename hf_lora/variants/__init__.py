"""The strategies by which an adapter changes a layer: one small file each, looked up by name.

`Plain` adds a pair of factors to the output. A variant (DoRA, lora_bias) is one more vector, and what it makes of the
pair's effect; an adapter may have several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..extras import EXTRAS
from .dora import DoRA
from .effect import Base, Effect, Variant
from .kasa import KaSA
from .lora_bias import LoRABiasTerm
from .plain import Plain

__all__ = ["PLAIN", "VARIANTS", "Base", "Effect", "Plain", "Variant", "effect_of", "initial_extras"]

PLAIN = Plain()
# By the name of its vector in `extras.EXTRAS`, in the order in which they are applied.
VARIANTS: Mapping[str, Variant] = {"diagonal": KaSA(), "magnitude": DoRA(), "offset": LoRABiasTerm()}


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
    held = base() if any(EXTRAS[name].weight for name in names) else None
    return {name: VARIANTS[name].initial(held, A, B, scaling, random=random).to(A.device, A.dtype) for name in names}
