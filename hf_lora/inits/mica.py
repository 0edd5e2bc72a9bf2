"""MiCA: B is the weight's minor directions and stays; A begins at zero and trains.

    W = U Σ Vᵀ        B = U[:, -r:], A₀ = 0

Source: arXiv:2604.01694.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Init, Layer, Settings

__all__ = ["MICA"]


def _mica(layer: Layer, settings: Settings) -> tuple[Tensor, Tensor]:
    layer.require_rank("mica")
    U, _, _ = torch.linalg.svd(layer.weight(), full_matrices=False)
    return U.new_zeros(layer.rank, layer.in_features), U[:, -layer.rank :]


MICA = Init(_mica, still=("B",))
