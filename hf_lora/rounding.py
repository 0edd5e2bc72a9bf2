"""A weight as a quantised base holds it, and what stands for it under an adapter that was made for such a base (LoftQ).

    Q = round(W − B A), B A = SVD_r(W − Q), alternately        h = x Qᵀ + s · x Aᵀ Bᵀ

Rounding is that of bitsandbytes: NormalFloat in blocks of 64 (4 bits; 2 bits likewise), or int8 by rows (8 bits).

Source: Li et al. 2023 (arXiv:2310.08659) algorithm 1; NormalFloat: Dettmers et al. 2023 (arXiv:2305.14314) appendix E.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["BITS", "Rounding", "low_rank", "normal_float", "rounded", "rounding_of"]

BITS = (2, 4, 8)
_BLOCK = 64
_PIECE = _BLOCK << 16  # numbers that are rounded at once
_OFFSET = 0.9677083  # the quantile of ±1 before normalising: 1 − (1/32 + 1/30)/2, also of two bits, as in LoftQ


@dataclass(frozen=True)
class Rounding:
    """How an adapter's layers are rounded.

    Attributes:
        bits: 2, 4 or 8.
        iterations: how often rounding and decomposition alternate; 1 rounds W itself.
    """

    bits: int
    iterations: int

    def key(self, rank: int) -> str:
        """The same for adapters whose layer is rounded to the same numbers."""
        return f"{self.bits}" if self.iterations == 1 else f"{self.bits}_{self.iterations}_{rank}"

    @torch.no_grad()
    def stand_in(self, weight: Tensor, rank: int) -> Tensor:
        """Q, (out, in), in float32 or wider.

        Args:
            weight: (out, in).
            rank: of the adapter; it matters where there are several iterations.
        """
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        Q = rounded(wide, self.bits)
        for _ in range(self.iterations - 1):
            A, B = low_rank(wide - Q, rank)
            Q = rounded(wide - B @ A, self.bits)
        return Q


def rounding_of(config: Any) -> Rounding | None:
    """What a `LoRAConfig` says of its layers' weights; None where they stay as they are."""
    if config.init != "loftq":
        return None
    settings = config.init_settings
    return Rounding(settings["loftq_bits"], settings["loftq_iter"])


def low_rank(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r): B·A is the residual's best approximation of this rank, halves of Σ in each."""
    U, values, Vt = torch.linalg.svd(residual, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * Vt[:rank], U[:, :rank] * root


@functools.cache
def normal_float(bits: int) -> Tensor:
    """The 2^bits numbers of NormalFloat, ascending from −1 to 1, 0 among them; float32.

    They are quantiles of the normal distribution, one more above zero than below.
    """
    half = 1 << (bits - 1)
    above = torch.special.ndtri(torch.linspace(_OFFSET, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(_OFFSET, 0.5, half, dtype=torch.float64)[:-1])
    found = torch.cat([above, below, above.new_zeros(1)]).sort().values
    return (found / found.max()).to(torch.float32)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The weight, rounded and read back; its shape and dtype.

    Args:
        weight: (out, in), in float32 or wider.
        bits: 2 or 4: the nearest NormalFloat of a block, times the block's largest |w|. 8: the nearest of 127 steps
            up to the row's largest |w|, of the weight in float16, as bitsandbytes has it.
    """
    if bits == 8:
        half = weight.to(torch.float16).float()
        largest = half.abs().amax(1, keepdim=True)
        steps = torch.round(half * torch.where(largest > 0, 127.0 / largest, 0.0))
        return (steps * (largest / 127.0)).to(weight.dtype)
    code = normal_float(bits).to(weight.device)
    between = (code[1:] + code[:-1]) / 2
    flat = weight.detach().to(torch.float32).reshape(-1)
    out = torch.empty_like(flat)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        blocks = torch.nn.functional.pad(piece, (0, -len(piece) % _BLOCK)).view(-1, _BLOCK)
        largest = blocks.abs().amax(1, keepdim=True)
        places = torch.bucketize(blocks / largest.clamp_min(torch.finfo(torch.float32).tiny), between, out_int32=True)
        out[start : start + _PIECE] = (code[places] * largest).view(-1)[: len(piece)]
    return out.view(weight.shape).to(weight.dtype)
