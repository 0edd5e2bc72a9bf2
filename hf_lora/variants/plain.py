"""Plain LoRA: h = x W^T + s · dropout(x) A^T B^T (Hu et al., 2021, section 4.1)."""

from __future__ import annotations

from torch import Tensor

from .. import functional, fused
from ..dropout import dropout as dropped_out

__all__ = ["Plain"]


class Plain:
    """The paper's update; the factors' product is added to the layer's output or, merged, to its weight."""

    name = "plain"

    def delta(self, x: Tensor, A: Tensor, B: Tensor, *, kind: str, dropout: float, padding_idx: int | None) -> Tensor:
        """What the pair adds to the layer's output.

        Args:
            x: (..., in), or token ids (...) where `kind` is "embedding".
            A: (R, in). B: (out, R), scaled. Both in the compute dtype.
            dropout: probability, 0 outside training. Token ids take none.
            padding_idx: of an embedding.
        """
        if kind == "embedding":
            return functional.embed_low_rank(x, A, B, padding_idx)
        return functional.low_rank(dropped_out(x, dropout) if dropout else x, A, B)

    def add(self, output: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: float, *, in_place: bool) -> Tensor:
        """`output` + weight · what the pair adds, fused. A: (R, in). B: (R, out), scaled. All of one dtype."""
        return functional.add_low_rank(output, x, A, B, weight, in_place=in_place)

    def whole(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, *, dropout: float
    ) -> Tensor:
        """A frozen dense layer's output and what the pair adds to it, fused. A: (R, in). B: (out, R), unscaled."""
        return fused.lora_linear(x, weight, bias, A, B, scale, p=dropout)
