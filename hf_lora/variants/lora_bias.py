"""lora_bias: B has a bias of its own, as a Linear layer has.

    h = x W^T + b + s · (x A^T B^T + β)        β: (out,)

It holds the change of a bias where an adapter was extracted from a model that was tuned whole. β begins as 0.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .effect import Base, Effect

__all__ = ["LoRABiasTerm"]


class LoRABiasTerm:
    """An offset of the layer's output: s·β."""

    def initial(self, base: Base | None, A: Tensor, B: Tensor, scaling: float, *, random: bool) -> Tensor:
        """β: zero; uniform within 1/√R as that of a Linear layer, if random. (out,)."""
        beta = torch.zeros(B.shape[0], dtype=B.dtype, device=B.device)
        return beta.uniform_(-1, 1) / B.shape[1] ** 0.5 if random else beta

    def apply(self, effect: Effect, vector: Tensor, base: Base | None, scaling: float) -> Effect:
        """The effect with the offset; DoRA's gain leaves it alone, as it leaves the layer's own bias."""
        return dataclasses.replace(effect, offset=vector if scaling == 1 else vector * scaling)
