"""Do two adapters learn the same directions: φ of the paper's §7.2, and one number for two adapters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import fields
from ..spectrum import decompose, delta_norm
from ..values import AdapterValue, Factors
from .places import Array, LayerResult, Place, Result, array, numerical_rank, paired, refuse_zero

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "AdapterOverlap",
    "LayerOverlap",
    "LayerSimilarity",
    "SubspaceSimilarity",
    "compared",
    "cosine",
    "overlap",
    "random_similarity",
    "subspace_similarity",
]

Side = Literal["A", "B"]
Of = Literal["factors", "delta"]


@dataclass(frozen=True, eq=False)
class LayerSimilarity(LayerResult):
    """φ of one layer.

    Args:
        features: n, what the directions are vectors of: inputs (side "A") or outputs (side "B").
        phi: φ(i, j) at [i − 1, j − 1], in [0, 1]: (k_a, k_b) float64; k is r, or less where the rank is.
        baseline: the same of two Gaussian matrices of these sizes; None if it was not asked for.
    """

    features: int
    phi: Array
    baseline: Array | None

    @property
    def expected(self) -> Array:
        """The mean of φ over random subspaces, max(i, j)/n: (k_a, k_b)."""
        i, j = np.indices(self.phi.shape) + 1
        return array(np.maximum(i, j) / self.features)


@dataclass(frozen=True, eq=False)
class SubspaceSimilarity(Result[LayerSimilarity]):
    """φ of every layer.

    Args:
        side: "A" (input side) or "B" (output side).
        of: whose singular vectors: "factors" or "delta".
    """

    side: Side
    of: Of

    def mean(self, role: str | None = None, *, baseline: bool = False) -> Array:
        """φ, or the baseline, averaged over the layers of a role (None: all), for the i and j that all of them have."""
        chosen = [layer for layer in self.layers if role in (None, layer.role)]
        if not chosen:
            fields.one_of("role", role, tuple(self.by_role))
        found = [layer.baseline if baseline else layer.phi for layer in chosen]
        if any(each is None for each in found):
            raise fields.wrong("baseline", baseline, "there: it was not computed", "Leave random_baseline=True.")
        there = [each for each in found if each is not None]
        i, j = (min(each.shape[axis] for each in there) for axis in (0, 1))
        return array(np.mean([each[:i, :j] for each in there], axis=0))

    def plot(self) -> Figure:
        """The mean φ of each role beside its baseline, as in the paper's Figures 3 and 4. Needs matplotlib."""
        from .figures import similarity_figure

        return similarity_figure(self)


def subspace_similarity(
    a: AdapterValue,
    b: AdapterValue,
    *,
    side: Side = "A",
    of: Of = "factors",
    only: Iterable[str] | None = None,
    random_baseline: bool = True,
    seed: int = 0,
) -> SubspaceSimilarity:
    """φ(i, j) = ‖U_a[:, :i]ᵀ U_b[:, :j]‖² / min(i, j) (Frobenius): what the top i and top j directions share.

    1: the smaller subspace lies within the larger; 0: they are orthogonal. In a fused layer each role is a layer.

    Args:
        a, b: `LoRAAdapter`s of one base; their ranks may differ.
        side: "A": U are the right-singular vectors (input side); "B": the left-singular ones (output side).
        of: "factors", as in the paper: of A, or B. "delta": of ΔW itself, which does not depend on how it is factored.
        only: roles, module paths or their endings; None is all, and then both must have the same layers.
        random_baseline: also φ of two Gaussian matrices of each layer's sizes.
        seed: of the baseline.

    Raises:
        LoRAMismatchError: the adapters have different layers or shapes, are not finite, or have a factor of zeros.
        LoRAConfigError: `side` or `of` is neither. LoRATargetError: `only` names nothing.

    Source: Hu et al. 2021 (arXiv:2106.09685) §7.2, eq. 4.
    """
    fields.one_of("side", side, ("A", "B"))
    fields.one_of("of", of, ("factors", "delta"))
    fields.integer("seed", seed, least=0)
    pairs = [(mine, theirs) for mine, theirs in paired(a, b, only) if mine is not None and theirs is not None]
    return compared(pairs, side, of, seed if random_baseline else None)


def compared(pairs: Sequence[tuple[Place, Place]], side: Side, of: Of, seed: int | None) -> SubspaceSimilarity:
    """`subspace_similarity` of places side by side; `seed` of the baseline, None for none."""
    directions = [tuple(_directions(place.factors, side, of) for place in pair) for pair in pairs]
    zero = [
        f"{place}, of {letter}"
        for pair, both in zip(pairs, directions, strict=True)
        for letter, place, found in zip("ab", pair, both, strict=True)
        if not len(found)
    ]
    refuse_zero(zero, 2 * len(pairs), "ΔW" if of == "delta" else side)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    layers = []
    for (mine, _), (first, second) in zip(pairs, directions, strict=True):
        features = first.shape[1]
        gaussian = _gaussian(len(first), len(second), features, generator) if generator else None
        layers.append(LayerSimilarity(mine.path, mine.role, features, _phi(first, second), gaussian))
    return SubspaceSimilarity(tuple(layers), side, of)


def random_similarity(rank_a: int, rank_b: int, features: int, *, seed: int = 0) -> Array:
    """φ of the row spaces of two Gaussian matrices (rank_a, features) and (rank_b, features): near max(i, j)/features.

    Returns:
        (min(rank_a, features), min(rank_b, features)) float64.
    """
    for name, value in (("rank_a", rank_a), ("rank_b", rank_b), ("features", features)):
        fields.integer(name, value, least=1)
    return _gaussian(rank_a, rank_b, features, torch.Generator().manual_seed(fields.integer("seed", seed, least=0)))


def _gaussian(rank_a: int, rank_b: int, features: int, generator: torch.Generator) -> Array:
    # Q of a Gaussian matrix has the distribution of its singular vectors, in a fraction of the time.
    drawn = [torch.randn(features, rank, generator=generator, dtype=torch.float64) for rank in (rank_a, rank_b)]
    first, second = (torch.linalg.qr(each).Q.T for each in drawn)
    return _phi(first, second)


def _directions(factors: Factors, side: Side, of: Of) -> Tensor:
    """The singular vectors as rows, by falling singular value: (k, n) float64, k the rank."""
    if of == "delta":
        u, values, vt = decompose(factors)
        shape = (factors.out_features, factors.in_features)
    else:
        matrix = (factors.A if side == "A" else factors.B).detach().to("cpu", torch.float64)
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
        shape = (matrix.shape[0], matrix.shape[1])
    return (vt if side == "A" else u.T)[: numerical_rank(values, shape)]


def _phi(first: Tensor, second: Tensor) -> Array:
    """φ for every i and j, of orthonormal rows (k, n)."""
    shared = (first @ second.T).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, len(each) + 1, dtype=torch.float64) for each in (first, second))
    return array((shared / torch.minimum(i[:, None], j[None, :])).clamp(0, 1))


# ---- one number ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerOverlap(LayerResult):
    """How alike two ΔWs of one layer are. Where only one of the adapters has the layer, the other's ΔW is 0.

    Args:
        cosine: ⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖), in [−1, 1]; 0 where one is zero.
        input: φ of all input directions of ΔW_a and ΔW_b, in [0, 1]; 0 where one is zero.
        output: likewise of the output directions.
        norm_a, norm_b: ‖ΔW_a‖ and ‖ΔW_b‖ (Frobenius).
    """

    cosine: float
    input: float
    output: float
    norm_a: float
    norm_b: float


@dataclass(frozen=True, eq=False)
class AdapterOverlap(Result[LayerOverlap]):
    """How alike two adapters are.

    Args:
        cosine: Σ⟨ΔW_a, ΔW_b⟩ / √(Σ‖ΔW_a‖² Σ‖ΔW_b‖²) over all layers, in [−1, 1]: 1 the same up to a factor, −1 one
            undoes the other, 0 unrelated.
    """

    cosine: float

    def plot(self) -> Figure:
        """The cosine of each layer, a line for each role. Needs matplotlib."""
        from .figures import overlap_figure

        return overlap_figure(self)


def overlap(a: AdapterValue, b: AdapterValue, *, only: Iterable[str] | None = None) -> AdapterOverlap:
    """How alike two adapters are: the cosine of their ΔWs, as a whole and by layer, and the subspaces that they share.

    Nothing depends on how a ΔW is factored. Computed in float64 from the factors, never from a dense ΔW.

    Args:
        a, b: `LoRAAdapter`s of one base. A layer that one of them does not have counts as ΔW = 0.
        only: roles, module paths or their endings; None is all.

    Raises:
        LoRAMismatchError: no layer in common, different shapes, not finite, or ΔW is zero everywhere in one of them.
    """
    pairs = paired(a, b, only, missing=True)
    layers = [_overlap(mine, theirs) for mine, theirs in pairs]
    for letter in "ab":
        if not any(getattr(layer, f"norm_{letter}") for layer in layers):
            refuse_zero([f"{layer.path}, of {letter}" for layer in layers], len(layers))
    return AdapterOverlap(tuple(layers), cosine(layers))


def cosine(layers: Sequence[LayerOverlap]) -> float:
    """Of all these layers together: Σ⟨ΔW_a, ΔW_b⟩ / √(Σ‖ΔW_a‖² Σ‖ΔW_b‖²); 0 where one side is zero."""
    inner = math.fsum(layer.cosine * layer.norm_a * layer.norm_b for layer in layers)
    a, b = (math.hypot(*norms) for norms in ([x.norm_a for x in layers], [x.norm_b for x in layers]))
    return _clipped(inner / a / b) if a and b else 0.0


def _overlap(mine: Place | None, theirs: Place | None) -> LayerOverlap:
    norms = [delta_norm(place.factors) if place is not None else 0.0 for place in (mine, theirs)]
    place = mine or theirs
    assert place is not None
    if mine is None or theirs is None or not all(norms):
        return LayerOverlap(place.path, place.role, 0.0, 0.0, 0.0, norms[0], norms[1])
    one, two = mine.factors, theirs.factors
    a, b, c, d = (tensor.detach().to("cpu", torch.float64) for tensor in (one.A, one.B, two.A, two.B))
    # ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ)
    inner = float(((b.T @ d) * (a @ c.T)).sum()) * one.scaling * two.scaling
    shared = [_phi(*(_directions(f, side, "delta") for f in (one, two))) for side in _SIDES]
    into, out = (float(phi[-1, -1]) if phi.size else 0.0 for phi in shared)
    return LayerOverlap(place.path, place.role, _clipped(inner / norms[0] / norms[1]), into, out, *norms)


_SIDES: tuple[Side, Side] = ("A", "B")


def _clipped(cosine: Any) -> float:
    return min(max(float(cosine), -1.0), 1.0)
