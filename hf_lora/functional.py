"""The mathematics of LoRA on plain tensors: no modules, no state, no names.

    h = x W^T + s · (x A^T) B^T        A: (R, in), B: (out, R), s: scaling        (Hu et al., 2021, section 4.1)

Each fast form stands beside the plain reference that says what it computes; the tests hold one against the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "add_grouped_low_rank",
    "add_low_rank",
    "add_wide",
    "embed_low_rank",
    "embed_scaled",
    "grouped_low_rank",
    "grouped_low_rank_reference",
    "low_rank",
    "place_blocks",
    "row_squares",
    "row_squares_factored",
]

_PIECE = 1 << 20  # elements of a weight that are looked at together
_LONG = 8  # positions of a row from which on its product with A is computed the other way round


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


def add_low_rank(
    output: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, *, in_place: bool = False
) -> Tensor:
    """`output` + scale · (x A^T) B, as two products of which the second adds.

    Args:
        output: (..., out). x: (..., in).
        A: (R, in). B: (R, out). All of one dtype.
        scale: a number.
        in_place: write into `output`, which nobody else may hold.
    """
    return add_wide(output, F.linear(x, A), B, scale, in_place=in_place)


def add_wide(output: Tensor, h: Tensor, B: Tensor, scale: float = 1.0, *, in_place: bool = False) -> Tensor:
    """`output` + scale · h B, the second of `add_low_rank`'s products. h: (..., R). B: (R, out)."""
    h = h.view(-1, B.shape[0])
    flat = output.reshape(-1, B.shape[1])
    if in_place and flat.data_ptr() == output.data_ptr():
        flat.addmm_(h, B, alpha=scale)
        return output
    return torch.addmm(flat, h, B, alpha=scale).view(output.shape)


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
        A: (N, R, in). B: (N, R, out), scaled; ranks below R are padded with zeros, a row without adapter is all zero.

    Returns:
        (N, ..., out).
    """
    flat = x.reshape(x.shape[0], -1, x.shape[-1])  # (N, T, in)
    h = torch.bmm(flat, A.transpose(1, 2))  # (N, T, R)
    return torch.bmm(h, B).reshape(*x.shape[:-1], B.shape[2])


def add_grouped_low_rank(output: Tensor, x: Tensor, A: Tensor, B: Tensor, *, in_place: bool = False) -> Tensor:
    """`output` + each row of the batch through its own pair, as two batched products of which the second adds.

    Args:
        output: (N, ..., out). x: (N, ..., in).
        A: (N, R, in). B: (N, R, out), scaled; ranks below R are padded with zeros. All of one dtype.
        in_place: write into `output`, which nobody else may hold.
    """
    if x.dim() != 3:
        rows, wide = x.reshape(x.shape[0], -1, x.shape[-1]), output.reshape(x.shape[0], -1, B.shape[2])
        return add_grouped_low_rank(wide, rows, A, B, in_place=in_place).view(output.shape)
    # (N, T, R); for long rows a wide product is faster than a tall one
    long = x.shape[1] >= _LONG
    h = torch.bmm(A, x.transpose(1, 2)).transpose(1, 2) if long else torch.bmm(x, A.transpose(1, 2))
    return output.baddbmm_(h, B) if in_place else torch.baddbmm(output, h, B)


def grouped_low_rank_reference(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """What `grouped_low_rank` computes, one row at a time."""
    return torch.stack([low_rank(row, a, b.T) for row, a, b in zip(x, A, B, strict=True)])


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


def row_squares(weight: Tensor, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
    """‖W + B A‖² of each row, some rows at a time, so that no second matrix of W's size is made.

    Args:
        weight: (out, in), any floating dtype; a view will do.
        A: (R, in). B: (out, R), the scaling already in it. None: of W alone.

    Returns:
        (out,), float32 or wider.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    step = max(_PIECE // max(weight.shape[1], 1), 1)
    found = []
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step].to(wide).contiguous()  # one order of summing, whatever the view
        if A is not None and B is not None:
            rows = torch.addmm(rows, B[start : start + step].to(wide), A.to(wide))
        found.append(rows.square().sum(1))
    return torch.cat(found)


def row_squares_factored(squares: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The same from ‖W‖², through the rank: ‖W‖² + 2 (W A^T) ∘ B + (B A A^T) ∘ B, summed over each row.

    W A^T is taken in W's dtype, so that W is not copied. With a B of zero it is `squares`, bit for bit.

    Args:
        squares: (out,), of `row_squares(weight)`.
        weight: (out, in). A: (R, in). B: (out, R), the scaling already in it.

    Returns:
        (out,), in `squares`' dtype; 0 where rounding would make it negative.
    """
    wide = squares.dtype
    crossed = torch.mm(weight, A.to(weight.dtype).T).to(wide)
    A, B = A.to(wide), B.to(wide)
    grown = torch.mm(B, torch.mm(A, A.T))
    return (squares + ((grown + 2 * crossed) * B).sum(1)).clamp_min(0)


def embed_scaled(rows: Tensor, base: nn.Module) -> Tensor:
    """What an embedding makes of rows that it looked up: Gemma's and BART's multiply them."""
    scale = getattr(base, "embed_scale", None)
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
