"""What an initialisation is, and what it is told of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRAConfigError, LoRAUnsupportedError
from ..targeting import Target
from ..weights import dense_weight

__all__ = ["Init", "Layer", "Look", "Pair", "Settings", "dense"]

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """A layer that takes a pair, or the rows of a fused one that belong to one role.

    Attributes:
        path: the module's name.
        in_features, out_features: of these rows; an embedding's are (V, d).
        rank, scaling: r, and s of s·B·A.
        dtype: of the factors.
        weight: gives W, (out, in), float32 or wider; raises where it is quantised.
        seen: what `Init.look` found here.
        rows: these rows of the layer's output.
        module, model: the layer, and the model.
        whole: gives the W of the whole layer.
        quantised: whether any of the layers that take a pair is quantised.
    """

    path: str
    in_features: int
    out_features: int
    rank: int
    scaling: float
    dtype: torch.dtype
    embedding: bool
    weight: Callable[[], Tensor]
    rows: Tensor
    whole: Callable[[], Tensor]
    module: nn.Module
    model: nn.Module
    quantised: bool
    seen: Any = None

    def require_rank(self, init: str, most: int | None = None) -> None:
        """Raise `LoRAConfigError` if the rank is above what this initialisation can fill."""
        most = min(self.in_features, self.out_features) if most is None else most
        if self.rank > most:
            raise LoRAConfigError(
                f"{self.path}: r={self.rank}, but init={init!r} finds at most {most} directions in a weight "
                f"({self.out_features}, {self.in_features}).",
                name="r",
                value=self.rank,
                expected=most,
                remedy=f"Give r={most} or less there (rank_pattern), or leave the layer out.",
            )


Pair = Callable[[Layer, Settings], tuple[Tensor, Tensor]]
"""A (r, in) and B (out, r)."""
Look = Callable[[nn.Module, tuple[Target, ...], Iterable[Any], Settings], tuple[tuple[Target, ...], dict[str, Any]]]
"""From data: the targets with the ranks that they shall have, and what was seen at each path."""


@dataclass(frozen=True)
class Init:
    """One initialisation.

    Attributes:
        pair: the values that A and B begin with.
        anchored: B·A does not begin at zero, so ΔW is s·(B·A − B₀·A₀).
        still: "B" where B does not train.
        embeddings: whether it is for them, too.
        look: what it finds out from data.
    """

    pair: Pair
    anchored: bool = False
    still: tuple[str, ...] = field(default=())
    embeddings: bool = True
    look: Look | None = None


def dense(module: nn.Module, path: str, kind: str, dtype: torch.dtype) -> Tensor:
    """W, (out, in), in `dtype`, where the layer computes. An embedding's is (d, V).

    Raises:
        LoRAUnsupportedError: it is quantised, or not here.
    """
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        found = type(weight).__name__ if not isinstance(weight, Tensor) else str(weight.dtype)
        raise LoRAUnsupportedError(
            f"{path}: this initialisation decomposes the weight, which is {found} here.",
            name=path,
            value=found,
            expected="a dense float weight",
            remedy='Load the base without quantisation, or begin with init="kaiming".',
        )
    own = dense_weight(module)
    return (own.T if kind in ("conv1d", "embedding") else own.flatten(1)).to(dtype)
