"""The singular values of ΔW from its factors alone: never a dense ΔW."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .values import Factors

__all__ = ["decompose", "delta_norm", "effective_rank", "parts", "singular_values"]


def singular_values(factors: Factors) -> Tensor:
    """Singular values of ΔW = scaling·B·A, largest first: (min(R, in, out),) float64.

    With thin QR, B = Q_b R_b and Aᵀ = Q_a R_a, they are those of scaling·R_b R_aᵀ, which is R × R.
    """
    a, b = (tensor.detach().to("cpu", torch.float64) for tensor in (factors.A, factors.B))
    left = torch.linalg.qr(b, mode="r").R
    right = torch.linalg.qr(a.T, mode="r").R
    return torch.linalg.svdvals(left @ right.T) * factors.scaling


def decompose(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of ΔW = U diag(σ) Vᵀ: U (out, k), σ (k,) largest first, Vᵀ (k, in), k = min(R, in, out); float64.

    As in `singular_values`, with U and V through Q_b and Q_a.
    """
    a, b = (tensor.detach().to("cpu", torch.float64) for tensor in (factors.A, factors.B))
    q_b, left = torch.linalg.qr(b)
    q_a, right = torch.linalg.qr(a.T)
    u, values, vt = torch.linalg.svd(left @ right.T, full_matrices=False)
    return q_b @ u, values * factors.scaling, vt @ q_a.T


def parts(factors: Factors) -> list[tuple[str, Factors]]:
    """The factors of each role's rows in a fused layer, (role, factors); of a whole layer [("", factors)].

    Each part's ΔW is that of its rows alone: (len(block), in).
    """
    if not factors.blocks:
        return [("", factors)]
    rank = factors.rank // len(factors.blocks)
    alpha = factors.scaling * (math.sqrt(rank) if factors.use_rslora else rank)
    like: dict[str, Any] = {"alpha": alpha, "use_rslora": factors.use_rslora, "kernel": factors.kernel}
    return [(block.role, Factors(factors.kind, a, b, **like)) for block, a, b in factors.split()]


def delta_norm(factors: Factors) -> float:
    """‖ΔW‖ (Frobenius) = scaling · √tr((BᵀB)(AAᵀ)), in float64; costs R²(in + out)."""
    a, b = (tensor.detach().to("cpu", torch.float64) for tensor in (factors.A, factors.B))
    squared = ((b.T @ b) * (a @ a.T)).sum()
    return float(squared.clamp_min(0).sqrt()) * factors.scaling


def effective_rank(values: Tensor) -> float:
    """exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ: how many directions ΔW uses; 0 if all are zero.

    Args:
        values: singular values, (n,).

    Source: Roy & Vetterli 2007, "The effective rank".
    """
    total = values.sum()
    if not total > 0:
        return 0.0
    p = values / total
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))
