"""PiSSA: the pair begins as the weight's principal part.

    W = U Σ Vᵀ        s · B₀ A₀ = U_r Σ_r V_rᵀ        B₀ = U_r √(Σ_r/s), A₀ = √(Σ_r/s) V_rᵀ

Source: Meng, Wang & Zhang 2024 (arXiv:2404.02948) §3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Init, Layer, Settings

__all__ = ["PISSA"]


def _pissa(layer: Layer, settings: Settings) -> tuple[Tensor, Tensor]:
    """`niter` power iterations on a random start (Halko et al. 2009), or the exact decomposition if that is 0."""
    layer.require_rank("pissa")
    W, r = layer.weight(), layer.rank
    if settings["niter"]:
        U, values, V = torch.svd_lowrank(W, r, niter=settings["niter"])
        Vt = V.T
    else:
        U, values, Vt = torch.linalg.svd(W, full_matrices=False)
    root = (values[:r] / layer.scaling).sqrt()
    return root[:, None] * Vt[:r], U[:, :r] * root


PISSA = Init(_pissa, anchored=True)
