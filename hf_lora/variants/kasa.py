"""KaSA: the weight without its smallest singular values, and singular values of the change that are learned.

    W' = W_k + s·B·diag(σ)·A        W_k: W without its R smallest singular values; σ: (R,)

(Wang et al., 2024, arXiv:2412.06071.) The base stays as it is: what W lacks in W_k is a product of rank R, which the
adapter takes away. σ begins at random and B at zero, so that the layer begins as W_k.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .effect import Base, Effect

__all__ = ["KaSA"]


class KaSA:
    """A diagonal between the factors, and the part of W that is left out."""

    def initial(self, base: Base | None, A: Tensor, B: Tensor, scaling: float, *, random: bool) -> Tensor:
        """σ: normal, (R,)."""
        return torch.randn(A.shape[0], dtype=A.dtype, device=A.device)

    def apply(self, effect: Effect, vector: Tensor, base: Base | None, scaling: float) -> Effect:
        """The effect with the diagonal in B, less the smallest singular values of W."""
        assert base is not None
        vt, u = base.tail(effect.A.shape[0])
        return dataclasses.replace(effect, B=effect.B * vector, fixed=(vt, -u))
