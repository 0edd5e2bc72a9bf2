"""Sums and best approximations of one layer's factors: concatenation, PEFT's linear, dense merges, truncation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .spectrum import decompose, parts
from .values import Block, Factors

__all__ = [
    "Merge",
    "Terms",
    "assembled",
    "averaged",
    "concatenated",
    "cut",
    "enough",
    "largest_rank",
    "merged",
    "reduced",
]

Terms = list[tuple[float, Factors]]
"""One layer's: the weight and the factors of every adapter that has it."""
Merge = Callable[[list[tuple[float, Tensor]]], Tensor]
"""From weights and dense ΔWᵢ, all of one shape, to a dense ΔW."""
Piece = list[tuple[float, float, Tensor, Tensor]]  # w, scaling, A (r, in), B (rows, r) of every adapter


def _blocks(terms: Terms) -> tuple[Block, ...]:
    """The blocks that all share, in the first one's order; else none: the layer is taken whole."""
    blocks = terms[0][1].blocks
    return blocks if all(set(f.blocks) == set(blocks) for _, f in terms) else ()


def _pieces(terms: Terms) -> list[Piece]:
    """The factors of each of `_blocks(terms)`, or of the whole layer, on the first's device."""
    blocks, device = _blocks(terms), terms[0][1].A.device
    pieces: list[Piece] = [[] for _ in blocks or (None,)]
    for weight, f in terms:
        own = {block: (a, b) for block, a, b in f.split()} if blocks else {}
        for piece, (a, b) in zip(pieces, [own[block] for block in blocks] or [(f.A, f.B)], strict=True):
            piece.append((weight, f.scaling, a.detach().to(device), b.detach().to(device)))
    return pieces


def assembled(
    like: Factors,
    blocks: tuple[Block, ...],
    pairs: Sequence[tuple[Tensor, Tensor]],
    scaling: float,
    use_rslora: bool = False,
) -> Factors:
    """Factors of (A, B) for each block, or of the one pair of a whole layer; all of one rank."""
    rank = pairs[0][0].shape[0]
    alpha = scaling * (math.sqrt(rank) if use_rslora else rank)
    if not blocks:
        return Factors(like.kind, *pairs[0], alpha, use_rslora, kernel=like.kernel)
    stacked = [(block, a, b) for block, (a, b) in zip(blocks, pairs, strict=True)]
    out, kind, kernel = like.out_features, like.kind, like.kernel
    return Factors.stack(stacked, out_features=out, alpha=alpha, use_rslora=use_rslora, kind=kind, kernel=kernel)


def largest_rank(terms: Terms) -> int:
    """The layer's largest rank in an adapter; of a role, where all share its roles."""
    return max(f.rank for _, f in terms) // max(len(_blocks(terms)), 1)


def concatenated(terms: Terms, largest: float, dtype: torch.dtype) -> Factors:
    """[B₁c₁ | B₂c₂ | …] [A₁; A₂; …] with scaling `largest` and cᵢ = wᵢsᵢ/largest, so that |cᵢ| ≤ 1."""
    pairs = [
        (
            torch.cat([a.to(dtype) for _, _, a, _ in piece]),
            torch.cat([b.to(dtype) * (weight * scaling / largest) for weight, scaling, _, b in piece], dim=1),
        )
        for piece in _pieces(terms)
    ]
    return assembled(terms[0][1], _blocks(terms), pairs, largest)


def averaged(terms: Terms, dtype: torch.dtype) -> Factors:
    """PEFT's "linear": A = Σ ±√|wᵢsᵢ| Aᵢ, which takes the sign, and B = Σ √|wᵢsᵢ| Bᵢ."""
    pairs = []
    for piece in _pieces(terms):
        scales = [weight * scaling for weight, scaling, _, _ in piece]
        a = [math.copysign(abs(c) ** 0.5, c) * a.to(dtype) for c, (_, _, a, _) in zip(scales, piece, strict=True)]
        b = [abs(c) ** 0.5 * b.to(dtype) for c, (_, _, _, b) in zip(scales, piece, strict=True)]
        pairs.append((torch.stack(a).sum(dim=0), torch.stack(b).sum(dim=0)))
    return assembled(terms[0][1], _blocks(terms), pairs, 1.0)


def merged(terms: Terms, merge: Merge, rank: int, energy: float | None, dtype: torch.dtype) -> Factors:
    """The best factors, of `rank` or of the smallest that keeps `energy`, of what `merge` makes of the dense ΔWᵢ."""
    svds = []
    for piece in _pieces(terms):
        deltas = [(weight, (b.to(dtype) @ a.to(dtype)) * scaling) for weight, scaling, a, b in piece]
        svds.append(torch.linalg.svd(merge(deltas), full_matrices=False))
    if energy is not None:
        rank = max(enough(values, energy) for _, values, _ in svds)
    return assembled(terms[0][1], _blocks(terms), cut(svds, rank, 1.0), 1.0)


def reduced(factors: Factors, rank: int, energy: float | None = None) -> Factors:
    """The best approximation of at most `rank`, or of the smallest rank that keeps `energy`, of each role by itself.

    `factors` themselves if they have no higher rank.
    """
    pieces = [piece for _, piece in parts(factors)]
    if energy is None and rank >= pieces[0].rank:
        return factors
    svds = [decompose(piece) for piece in pieces]
    if energy is not None:
        rank = max(enough(values, energy) for _, values, _ in svds)
        if rank >= pieces[0].rank:
            return factors
    pairs = [(a.to(factors.A), b.to(factors.B)) for a, b in cut(svds, rank, factors.scaling)]
    return assembled(factors, factors.blocks, pairs, factors.scaling, factors.use_rslora)


def enough(values: Tensor, energy: float) -> int:
    """The smallest rank whose singular values hold the share `energy` of Σσ²; at least 1."""
    held = values.double().square().cumsum(0)
    return int((held < energy * held[-1]).sum()) + 1


def cut(svds: Sequence[tuple[Tensor, Tensor, Tensor]], rank: int, scaling: float) -> list[tuple[Tensor, Tensor]]:
    """(A, B) with scaling·B·A = U_k diag(σ_k) V_kᵀ for each, all of one rank k ≤ `rank`.

    A is √σ₁ Vᵀ and B is U diag(σ)/√σ₁: of one size in the first direction, and no row of A is zero, so that a direction
    which does nothing yet can still be trained.
    """
    rank = min(rank, max(len(values) for _, values, _ in svds))
    pairs = []
    for u, values, vt in svds:
        k = min(rank, len(values))
        size = (float(values[0]) / scaling) ** 0.5 or 1.0
        a, b = vt[:k] * size, u[:, :k] * (values[:k] / (scaling * size))
        pairs.append((pad(a, (0, 0, 0, rank - k)), pad(b, (0, rank - k))))  # a role with fewer rows than the rank
    return pairs
