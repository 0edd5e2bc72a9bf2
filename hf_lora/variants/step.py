"""What a variant does to a layer while it trains, and to nothing else: how the input goes through A."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Narrow", "TrainingStep"]

Narrow = Callable[[Tensor, Tensor], Tensor]
"""From x (..., in) and A (R, in) to x Aᵀ (..., R)."""


class TrainingStep(Protocol):
    """The strategy of a variant that the trained adapter has no part of."""

    def initial(self, A: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """The first values of its vectors, by name. A: (R, in)."""
        ...

    def scratch(self, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it writes down in a forward for the loss of that step, by name: not a part of the adapter."""
        ...

    def narrow(self, inner: Narrow, held: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Narrow:
        """How the input goes through A in training, made of how it went before.

        Args:
            held: its vectors and its scratch.
            settings: of its config field.
        """
        ...
