"""How strongly ΔW amplifies directions that W hardly uses: the paper's §7.3, Table 7."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..spectrum import decompose, delta_norm
from ..values import AdapterValue
from .base import Base, BaseWeights
from .places import LayerResult, Place, Result, numerical_rank, places, refuse_zero

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Amplification", "LayerAmplification", "amplification_factor"]


@dataclass(frozen=True, eq=False)
class LayerAmplification(LayerResult):
    """One layer's row of the paper's Table 7. All norms are Frobenius.

    Args:
        rank: k, the number of directions of ΔW.
        delta_norm: ‖ΔW‖.
        base_norm: ‖W‖.
        projected: ‖UᵀWV‖ with U (out, k), V (in, k) the singular directions of ΔW.
        own: the same with the k largest singular directions of W itself.
        random: the same with k random directions: √E‖UᵀWV‖² = k‖W‖/√(out·in).
    """

    rank: int
    delta_norm: float
    base_norm: float
    projected: float
    own: float
    random: float

    @property
    def factor(self) -> float:
        """‖ΔW‖ / ‖UᵀWV‖; infinite where W has nothing in ΔW's directions."""
        return self.delta_norm / self.projected if self.projected else math.inf


@dataclass(frozen=True, eq=False)
class Amplification(Result[LayerAmplification]):
    """The amplification factor of every layer."""

    def plot(self) -> Figure:
        """The factor of each layer, a line for each role. Needs matplotlib."""
        from .figures import amplification_figure

        return amplification_figure(self)


def amplification_factor(adapter: AdapterValue, base: Base, *, only: Iterable[str] | None = None) -> Amplification:
    """‖ΔW‖ / ‖UᵀWV‖ (Frobenius) with U, V the singular directions of ΔW: how much stronger ΔW is there than W.

    Computed in float64, one W at a time; ΔW stays in factors. Beside it stand W's own directions and random ones.

    Args:
        adapter: a `LoRAAdapter`; in a fused layer each role's rows are a layer.
        base: what it was trained on: a model, the folder or id of one with safetensors, or module path → W (out, in).
        only: roles, module paths or their endings; None is all.

    Raises:
        LoRAMismatchError: the base lacks a layer or has another shape there, something is not finite, or ΔW is zero.
        LoRAUnsupportedError: the base is quantised, or its weights are not in memory. LoRAFileError: no such base.

    Source: Hu et al. 2021 (arXiv:2106.09685) §7.3.
    """
    found = places(adapter, only)
    weights = BaseWeights(base, adapter, found)
    return Amplification(tuple(amplified(found, weights)))


def amplified(found: tuple[Place, ...], weights: BaseWeights) -> list[LayerAmplification]:
    """The rows of `amplification_factor`."""
    svds = [decompose(place.factors) for place in found]
    ranks = [
        numerical_rank(values, (place.factors.out_features, place.factors.in_features))
        for place, (_, values, _) in zip(found, svds, strict=True)
    ]
    refuse_zero([str(place) for place, rank in zip(found, ranks, strict=True) if not rank], len(found))
    layers = []
    for place, (u, _, vt), k in zip(found, svds, ranks, strict=True):
        w = weights.of(place)
        norm = float(torch.linalg.matrix_norm(w))
        layers.append(
            LayerAmplification(
                place.path,
                place.role,
                rank=k,
                delta_norm=delta_norm(place.factors),
                base_norm=norm,
                projected=float(torch.linalg.matrix_norm(u[:, :k].T @ w @ vt[:k].T)),
                own=_largest(w, k),
                random=k * norm / math.sqrt(w.numel()),
            )
        )
    return layers


def _largest(w: Tensor, k: int) -> float:
    """√(σ₁² + … + σ_k²) of W; from the smaller Gram matrix, whose large eigenvalues are exact enough."""
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    return math.sqrt(float(torch.linalg.eigvalsh(gram)[-k:].clamp_min(0).sum()))
