"""What the active adapters add to a convolution's output."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from . import convolution
from .dropout import dropout as dropped_out
from .slots import LoRASlots
from .variants import Narrow

__all__ = ["LoRAConvSlots"]


class LoRAConvSlots(LoRASlots):
    """The adapters of an nn.Conv1d, Conv2d or Conv3d; A (R, in·∏k) is a matrix here as in every other layer."""

    def __init__(self, *args: Any, row_map: str = "batch", **kwargs: Any) -> None:
        # The other ways in which rows lie in a batch are of sequences (T, d), which no convolution reads.
        row_map = row_map if row_map == "batch" or ":" in row_map else "inner"
        super().__init__(*args, row_map=row_map, **kwargs)

    def add(self, x: Tensor, output: Tensor, base: nn.Module) -> Tensor:
        """`output` + what the active adapters add to it. x: (N, C, …), or (C, …). output: (N, out, …), or (out, …)."""
        if x.dim() == len(cast(Any, base).kernel_size) + 1:
            return super().add(x[None], output[None], base)[0]
        return super().add(x, output, base)

    def _fused(self, x: Tensor, output: Tensor, index: int, dropout: float) -> tuple[Tensor, Tensor] | None:
        return None

    def _scaled_delta(self, x: Tensor, A: Tensor, B: Tensor, base: nn.Module, dropout: float) -> Tensor:
        return convolution.low_rank(dropped_out(x, dropout) if dropout else x, A, B, base)

    def _widened(self, x: Tensor, A: Tensor, B: Tensor, base: nn.Module, narrow: Narrow) -> Tensor:
        return convolution.low_rank(x, A, B, base)

    def _grouped(self, x: Tensor, A: Tensor, B: Tensor, base: nn.Module) -> Tensor:
        return convolution.grouped_low_rank(x, A, B, base)
