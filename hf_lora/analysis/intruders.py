"""Intruder dimensions: large singular directions of W + ΔW that are unlike any of W."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .. import fields
from ..errors import LoRAConfigError
from ..values import AdapterValue
from .base import Base, BaseWeights
from .places import Array, LayerResult, Place, Result, array, places

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Intruders", "LayerIntruders", "intruder_dimensions"]

Side = Literal["A", "B"]


@dataclass(frozen=True, eq=False)
class LayerIntruders(LayerResult):
    """The largest singular directions of W + ΔW, held against those of W.

    Args:
        similarity: max over i of |cos(uᵢ of W, uⱼ of W + ΔW)|, for the k largest j: (k,) float64.
        values: the singular values of W + ΔW: (k,) float64, largest first.
        intruders: the j, from 0, whose similarity is below the threshold.
    """

    similarity: Array
    values: Array
    intruders: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Intruders(Result[LayerIntruders]):
    """Intruder dimensions by layer.

    Args:
        k, threshold, side: as they were asked for.
    """

    k: int
    threshold: float
    side: Side

    @property
    def count(self) -> int:
        """How many there are in all layers."""
        return sum(len(layer.intruders) for layer in self.layers)

    def plot(self) -> Figure:
        """How many each layer has, a line for each role. Needs matplotlib."""
        from .figures import intruders_figure

        return intruders_figure(self)


def intruder_dimensions(
    base: Base,
    adapter: AdapterValue,
    k: int = 10,
    threshold: float = 0.5,
    *,
    side: Side = "B",
    only: Iterable[str] | None = None,
) -> Intruders:
    """Singular vectors among the k largest of W + ΔW whose largest |cosine| to all of W's is below a threshold.

    Costs an eigendecomposition of W and of W + ΔW, in float64: one layer is dense at a time.

    Args:
        base: what it was trained on: a model, the folder or id of one with safetensors, or module path → W (out, in).
        adapter: a `LoRAAdapter`; in a fused layer each role's rows are a layer.
        k: how many of W + ΔW's directions are looked at; fewer where the matrix is smaller.
        threshold: ε, in (0, 1].
        side: "B": left-singular vectors (output side), as in the paper; "A": right-singular ones (input side).
        only: roles, module paths or their endings; None is all.

    Raises:
        LoRAConfigError: `k`, `threshold` or `side` is out of range. Otherwise as `amplification_factor`; a ΔW of zero
            has no intruders.

    Source: Shuttleworth et al. 2024 (arXiv:2410.21228), algorithm 1.
    """
    check_options(k, threshold)
    fields.one_of("side", side, ("A", "B"))
    found = places(adapter, only)
    weights = BaseWeights(base, adapter, found)
    return Intruders(tuple(looked_at(found, weights, k, threshold, side)), k, float(threshold), side)


def check_options(k: int, threshold: float) -> None:
    """Raise `LoRAConfigError` for what is out of range."""
    fields.integer("k", k, least=1)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise LoRAConfigError(
            f"threshold={threshold!r} is no number in (0, 1].",
            name="threshold",
            value=threshold,
            expected="a number in (0, 1]",
            remedy="Give the cosine below which a direction is an intruder: threshold=0.5.",
        )


def looked_at(
    found: tuple[Place, ...], weights: BaseWeights, k: int, threshold: float, side: Side
) -> list[LayerIntruders]:
    """The rows of `intruder_dimensions`."""
    layers = []
    for place in found:
        f = place.factors
        w = weights.of(place)
        a, b = (tensor.detach().to("cpu", torch.float64) for tensor in (f.A, f.B))
        before, after = w, torch.addmm(w, b, a, alpha=f.scaling)
        if side == "A":
            before, after = before.T, after.T
        old, _ = _left(before)
        new, values = _left(after, k)
        similarity = (old.T @ new).abs().amax(dim=0).clamp(0, 1)
        below = tuple(int(j) for j in (similarity < threshold).nonzero().flatten())
        layers.append(LayerIntruders(place.path, place.role, array(similarity), array(values), below))
    return layers


def _left(matrix: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """The k largest left-singular vectors (n, k) and values (k,), largest first; None: min(n, m) of them.

    A wide matrix (an embedding's, say) goes through its Gram matrix: in float64 that tells singular values apart down
    to 1e-8 σ₁, as far as float32 weights do.
    """
    n, m = matrix.shape
    k = min(n, m) if k is None else min(k, n, m)
    if n > m:
        u, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :k], values[:k]
    squared, u = torch.linalg.eigh(matrix @ matrix.T)
    return u.flip(1)[:, :k], squared.flip(0)[:k].clamp_min(0).sqrt()
