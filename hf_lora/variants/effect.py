"""What factors and a variant's vectors come to on a layer, whatever the variant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import functional

__all__ = ["Base", "Effect", "Variant"]


@dataclass(frozen=True, eq=False)
class Effect:
    """h = gain ∘ (x W^T + x A^T B^T + x C^T D^T) + b + offset.

    Attributes:
        A: (R, in). B: (out, R), the scaling in it, the gain not.
        fixed: C (n, in) and D (out, n), a change of W that is not trained and that dropout does not reach; or None.
        gain: (out,), or None for 1. float32 or wider.
        offset: (out,), or None for 0.
    """

    A: Tensor
    B: Tensor
    fixed: tuple[Tensor, Tensor] | None = None
    gain: Tensor | None = None
    offset: Tensor | None = None

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """One pair for A, B and what is fixed: (R + n, in), (out, R + n)."""
        if self.fixed is None:
            return self.A, self.B
        return torch.cat([self.A, self.fixed[0].to(self.A)]), torch.cat([self.B, self.fixed[1].to(self.B)], 1)


@dataclass(frozen=True, eq=False)
class Base:
    """The base's weight, as a variant needs it.

    Attributes:
        weight: (out, in), a view; an embedding's is (d, V).
        squares: ‖W‖² of each row, (out,), if it is known; W + B A is then taken through the rank.
        tails: what `tail` gave for a rank, kept for the next time.
    """

    weight: Tensor
    squares: Tensor | None = None
    tails: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        layer: type[nn.Module],
        squares: Tensor | None = None,
        tails: dict[int, tuple[Tensor, Tensor]] | None = None,
    ) -> Base:
        """The weight of a layer of this class, (out, in); an embedding's and a Conv1D's are turned."""
        turned = issubclass(layer, nn.Embedding) or any(own.__name__ == "Conv1D" for own in layer.__mro__)
        return cls(weight.T if turned else weight.flatten(1), squares, {} if tails is None else tails)

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

    def tail(self, rank: int) -> tuple[Tensor, Tensor]:
        """The part of W that its `rank` smallest singular values make: Vᵀ (rank, in) and U·diag(σ) (out, rank)."""
        if rank not in self.tails:
            with torch.no_grad():
                wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
                u, values, vt = torch.linalg.svd(wide, full_matrices=False)
                kept = len(values) - rank
                self.tails[rank] = vt[kept:].contiguous(), (u[:, kept:] * values[kept:]).contiguous()
        return self.tails[rank]


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
