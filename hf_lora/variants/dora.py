"""DoRA: each output's magnitude is learned apart from its direction (Liu et al., 2024, equation 5).

    W' = m ∘ (W + s·B·A) / ‖W + s·B·A‖        m: (out,), the norm is each row's

The norm counts as a constant in the backward pass (section 4.3). m begins as ‖W‖, so that W' = W.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .effect import Base, Effect

__all__ = ["DoRA"]


class DoRA:
    """A gain on the layer's output: m / ‖W + s·B·A‖."""

    def initial(self, base: Base | None, A: Tensor, B: Tensor, scaling: float, *, random: bool) -> Tensor:
        """‖W + s·B·A‖, (out,): the gain is 1."""
        assert base is not None
        return base.norms() if not B.is_meta and not B.any() else base.norms(A, B * scaling)

    def apply(self, effect: Effect, vector: Tensor, base: Base | None, scaling: float) -> Effect:
        """The effect with the gain."""
        assert base is not None
        with torch.no_grad(), torch.autocast(effect.A.device.type, enabled=False):
            norms = base.norms(*effect.pair)
        return dataclasses.replace(effect, gain=vector.to(norms.dtype) / norms)
