"""MonteCLoRA: A is drawn anew in each forward of training, around what is learned.

    A' = A + s · Σₖ wₖ Zₖ √Σ      Zₖ ~ N(0, 1), (R, in)       Σ = diag(e^{2σ} ∘ χ²), χ²: of a Wishart's diagonal
    w = softmax(log α − mean + √D ∘ ε)      α = e^π, D: the log-normal fit to Dirichlet(α)

σ (R,) and π (n,) are learned. The covariances are diagonal, so a Cholesky factor is a root; the diagonal of a Wishart
matrix of R degrees of freedom and the identity is R independent sums of R squared normals; and Σₖ wₖ Zₖ of independent
normals is ‖w‖ · Z with one of them. So a draw costs one normal for each number of A, whatever n is, and has the same
law, and the same expected gradients, as n of them. (Sengupta et al., 2024, arXiv:2411.04358.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .step import Narrow

__all__ = ["MonteCLoRA", "draw", "expert_weights", "variances"]

_LEAST_VARIANCE, _LEAST_ALPHA = 1e-3, 1e-6  # PEFT's


def variances(deviation: Tensor, chi: Tensor) -> Tensor:
    """The diagonal of Σ, (R,): e^{2σ} ∘ χ², at least 1e-3."""
    return (torch.exp(2 * deviation) * chi).clamp(min=_LEAST_VARIANCE)


def expert_weights(experts: Tensor, noise: Tensor) -> Tensor:
    """w, (n,), which sum to 1. noise: (n,), normal."""
    alpha, n = torch.exp(experts).clamp(min=_LEAST_ALPHA), len(experts)
    spread = (1 / alpha * (1 - 2 / n) + (1 / alpha).sum() / n**2).clamp(min=_LEAST_ALPHA) + _LEAST_ALPHA
    logarithms = torch.log(alpha)
    return torch.softmax(logarithms - logarithms.mean() + spread.sqrt() * noise, -1)


def draw(A: Tensor, deviation: Tensor, experts: Tensor, z: Tensor, noise: Tensor, scale: float) -> Tensor:
    """A', (R, in), differentiable in A, σ and π.

    Args:
        z: (R, in), normal. noise: (R + n,), χ² and the experts' normal numbers.
        scale: s.
    """
    chi, own = noise.split([len(deviation), len(experts)])
    size = torch.linalg.vector_norm(expert_weights(experts, own)) * scale
    return A + (size * variances(deviation, chi).sqrt())[:, None] * z


class MonteCLoRA:
    """The step of training that draws A."""

    def initial(self, A: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """σ (R,) and π (n,), uniform in [0, 1)."""
        n = settings["num_samples"]
        return {"deviation": torch.rand_like(A[:, 0]), "experts": torch.rand(n, dtype=A.dtype, device=A.device)}

    def scratch(self, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was drawn beside Z, (R + n,); zero before the first forward, which no draw is."""
        return {"noise": extras["deviation"].new_zeros(len(extras["deviation"]) + len(extras["experts"]))}

    def narrow(self, inner: Narrow, held: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Narrow:
        """Through the A' that is drawn."""

        def through(x: Tensor, A: Tensor) -> Tensor:
            deviation, experts, kept = held["deviation"], held["experts"], held["noise"]
            rank, wide = len(deviation), deviation.dtype
            with torch.no_grad():  # from torch's own generator: a recompute and a resumed run draw the same
                chi = torch.randn(rank, rank, dtype=wide, device=A.device).square().sum(0)
                noise = torch.cat([chi, torch.randn(len(experts), dtype=wide, device=A.device)])
                z = torch.randn(A.shape, dtype=wide, device=A.device)
                kept.copy_(noise)
            return inner(x, draw(A.to(wide), deviation, experts, z, noise, settings["sample_scaler"]).to(A.dtype))

        return through
