"""The mathematics of LoRA on plain tensors: no modules, no state, no names.

    h = x W^T + s · (x A^T) B^T        A: (R, in), B: (out, R), s: scaling        (Hu et al., 2021, section 4.1)

Each fast form stands beside the plain reference that says what it computes; the tests hold one against the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "embed_low_rank",
    "grouped_low_rank",
    "grouped_low_rank_reference",
    "low_rank",
    "place_blocks",
]


def low_rank(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """(x A^T) B^T, through the rank and never through an (out, in) matrix.

    Args:
        x: (..., in).
        A: (R, in), in x's dtype unless autocast is on.
        B: (out, R), the scaling already in it.

    Returns:
        (..., out).
    """
    return F.linear(F.linear(x, A), B)


def embed_low_rank(ids: Tensor, A: Tensor, B: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of ΔW^T for the tokens: A^T[ids] B^T.

    Args:
        ids: (...), integer.
        A: (R, V). B: (d, R), the scaling already in it.
        padding_idx: this token's column of A gets no gradient, as in `torch.nn.functional.embedding`.

    Returns:
        (..., d).
    """
    return F.linear(F.embedding(ids, A.T, padding_idx=padding_idx), B)


def grouped_low_rank(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Each row of the batch through its own pair, as two batched products.

    Args:
        x: (N, ..., in).
        A: (N, R, in). B: (N, out, R), scaled; ranks below R are padded with zeros, a row without adapter is all zero.

    Returns:
        (N, ..., out).
    """
    flat = x.reshape(x.shape[0], -1, x.shape[-1])  # (N, T, in)
    h = torch.bmm(flat, A.transpose(1, 2))  # (N, T, R)
    return torch.bmm(h, B.transpose(1, 2)).reshape(*x.shape[:-1], B.shape[1])


def grouped_low_rank_reference(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """What `grouped_low_rank` computes, one row at a time."""
    return torch.stack([low_rank(row, a, b) for row, a, b in zip(x, A, B, strict=True)])


def place_blocks(compact: Tensor, rows: Tensor, columns: Tensor, out_features: int, rank: int) -> Tensor:
    """The dense B of a fused layer from the rows that its roles own; every other entry is zero.

    Args:
        compact: (n, r), the rows of all blocks one after another.
        rows: (n, 1), the output row of each. columns: (n, r), the columns of each (block i owns i·r … (i+1)·r).
        out_features: rows of the fused layer. rank: R = blocks · r.

    Returns:
        (out_features, R), differentiable in `compact`.
    """
    return compact.new_zeros(out_features, rank).index_put((rows, columns), compact)
