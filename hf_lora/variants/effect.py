"""What factors and a variant's vectors come to on a layer, whatever the variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import functional

__all__ = ["Base", "Effect", "Variant"]


@dataclass(frozen=True, eq=False)
class Effect:
    """h = gain ∘ (x W^T + x A^T B^T) + b + offset.

    Attributes:
        A: (R, in). B: (out, R), the scaling in it, the gain not.
        gain: (out,), or None for 1. float32 or wider.
        offset: (out,), or None for 0.
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None = None
    offset: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Base:
    """The base's weight, as a variant needs it.

    Attributes:
        weight: (out, in), a view; an embedding's is (d, V).
        squares: ‖W‖² of each row, (out,), if it is known; W + B A is then taken through the rank.
    """

    weight: Tensor
    squares: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, layer: type[nn.Module], squares: Tensor | None = None) -> Base:
        """The weight of a layer of this class; an embedding's and a Conv1D's are (in, out), and are turned."""
        turned = issubclass(layer, nn.Embedding) or any(own.__name__ == "Conv1D" for own in layer.__mro__)
        return cls(weight.T if turned else weight, squares)

    def squares_of_rows(self) -> Tensor:
        """‖W‖² of each row, (out,), at least float32."""
        return functional.row_squares(self.weight) if self.squares is None else self.squares

    def norms(self, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
        """‖W + B A‖ of each row, (out,), at least float32; never 0. B: (out, R), scaled."""
        if A is None or B is None:
            squares = self.squares_of_rows()
        elif self.squares is None:
            squares = functional.row_squares(self.weight, A, B)
        else:
            squares = functional.row_squares_factored(self.squares, self.weight, A, B)
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


class Variant(Protocol):
    """The strategy of one vector: its first value, and what it makes of an effect."""

    def initial(self, base: Base | None, A: Tensor, B: Tensor, scaling: float, *, random: bool) -> Tensor:
        """The value with which the layer computes what it did before; or a random one, for debugging.

        Args:
            base: given where the variant depends on the weight.
            A: (R, in). B: (out, R), unscaled.
        """
        ...

    def apply(self, effect: Effect, vector: Tensor, base: Base | None, scaling: float) -> Effect:
        """The effect with this vector; differentiable in it."""
        ...
