"""A and B random and orthogonal to each other, so that both train from the first step and B·A is zero.

    A = (X Q_odd)ᵀ / 10, B = Y Q_even / 10      Q: a random orthogonal (r, r) matrix; X, Y: normal

Source: datta0.github.io/posts/rethink-lora-init.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LoRAConfigError
from .base import Init, Layer, Settings

__all__ = ["ORTHOGONAL"]


def _orthogonal(layer: Layer, settings: Settings) -> tuple[Tensor, Tensor]:
    r = layer.rank
    if r % 2:
        raise LoRAConfigError(
            f'{layer.path}: r={r} is odd, and init="orthogonal" halves it.',
            name="r",
            value=r,
            expected="an even rank",
            remedy=f"Give r={r + 1}.",
        )
    Q, _ = torch.linalg.qr(torch.randn(r, r, dtype=layer.dtype))
    A = (torch.randn(layer.in_features, r // 2, dtype=layer.dtype) @ Q[0::2]).T / 10
    return A, torch.randn(r // 2, layer.out_features, dtype=layer.dtype).T @ Q[1::2] / 10


ORTHOGONAL = Init(_orthogonal, embeddings=False)
