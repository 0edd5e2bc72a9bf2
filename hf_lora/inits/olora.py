"""OLoRA: B begins with orthonormal columns, from the weight's QR decomposition.

    W = Q R        B₀ = Q[:, :r], A₀ = R[:r]

Source: Büyükakyüz 2024 (arXiv:2406.01775) §3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Init, Layer, Settings

__all__ = ["OLORA"]


def _olora(layer: Layer, settings: Settings) -> tuple[Tensor, Tensor]:
    layer.require_rank("olora")
    Q, R = torch.linalg.qr(layer.weight())
    return R[: layer.rank], Q[:, : layer.rank]


OLORA = Init(_olora, anchored=True)
