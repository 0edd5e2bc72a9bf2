"""The form of a factor: how one that is stored, and trained, in a smaller shape stands for a plain A (R, in) or B (out, R).

A form is data about one layer's pair: the shapes of what is stored, and how it expands, differentiably. Everything but
the Parameters and the files has the plain pair, so that routes, mixtures, merges and arithmetic know of no form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .errors import LoRAConfigError

__all__ = ["FORM_FIELDS", "BlockA", "BlockB", "Form", "PooledA", "form_of", "forms_asked"]

Shape = tuple[int, ...]


class Form(Protocol):
    """How a stored pair stands for a plain one.

    Attributes:
        field: the field of `LoRAConfig` that asks for it.
        spread: what the plain kaiming bound of A is multiplied by at the start.
    """

    field: ClassVar[str]
    spread: ClassVar[float]

    def factor(self, in_features: int) -> float:
        """What the layer's scaling is multiplied by."""
        ...

    def columns(self, in_features: int) -> int:
        """Columns of the stored A."""
        ...

    def whole(self, a: Shape, b: Shape) -> tuple[Shape, Shape]:
        """The shapes of the plain pair, from those of the stored one."""
        ...

    def problem(self, rank: int, in_features: int, out_features: int) -> str | None:
        """Why a layer of these sizes cannot have it."""
        ...

    def begun(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The plain pair of A as it is stored and the plain B that an initialisation gave."""
        ...

    def stored(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The stored pair of a plain one, bit for bit."""
        ...

    def plain(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The plain pair of a stored one; differentiable."""
        ...


@dataclass(frozen=True)
class _Blocks:
    """n equal blocks on the diagonal of a factor; stored one below the other, (rows, columns/n)."""

    n: int

    field: ClassVar[str] = "use_bdlora"
    spread: ClassVar[float] = 1.0

    def factor(self, in_features: int) -> float:
        return 1.0

    def _problem(self, rank: int, what: str, size: int) -> str | None:
        for name, value in (("rank", rank), (what, size)):
            if value % self.n:
                return f"use_bdlora with nblocks={self.n} does not divide its {name}, {value}"
        return None

    def _stored(self, whole: Tensor) -> Tensor:
        rows, columns = whole.shape
        blocks = whole.view(self.n, rows // self.n, self.n, columns // self.n).diagonal(dim1=0, dim2=2)
        return blocks.permute(2, 0, 1).reshape(rows, columns // self.n)

    def _plain(self, blocks: Tensor) -> Tensor:
        return torch.block_diag(*blocks.chunk(self.n)) if self.n > 1 else blocks


class BlockA(_Blocks):
    """BD-LoRA with A block-diagonal: stored (R, in/n)."""

    spread: ClassVar[float] = math.sqrt(6)  # PEFT's blocks begin within √(6/columns), a plain A within √(1/columns)

    def columns(self, in_features: int) -> int:
        return in_features // self.n

    def whole(self, a: Shape, b: Shape) -> tuple[Shape, Shape]:
        return (a[0], a[1] * self.n), b

    def problem(self, rank: int, in_features: int, out_features: int) -> str | None:
        return self._problem(rank, "number of inputs", in_features)

    def begun(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain(A, B)

    def stored(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return self._stored(A), B

    def plain(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return self._plain(A), B


class BlockB(_Blocks):
    """BD-LoRA with B block-diagonal: stored (out, R/n)."""

    def columns(self, in_features: int) -> int:
        return in_features

    def whole(self, a: Shape, b: Shape) -> tuple[Shape, Shape]:
        return a, (b[0], b[1] * self.n)

    def problem(self, rank: int, in_features: int, out_features: int) -> str | None:
        return self._problem(rank, "number of outputs", out_features)

    def begun(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain(*self.stored(A, B))

    def stored(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return A, self._stored(B)

    def plain(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return A, self._plain(B)


@dataclass(frozen=True)
class PooledA:
    """QA-LoRA: A reads the mean of each g inputs, times in/g: stored (R, in/g), each column standing for g equal ones."""

    g: int

    field: ClassVar[str] = "use_qalora"
    spread: ClassVar[float] = 1.0

    def factor(self, in_features: int) -> float:
        return (in_features // self.g) / self.g

    def columns(self, in_features: int) -> int:
        return in_features // self.g

    def whole(self, a: Shape, b: Shape) -> tuple[Shape, Shape]:
        return (a[0], a[1] * self.g), b

    def problem(self, rank: int, in_features: int, out_features: int) -> str | None:
        if in_features % self.g:
            return f"qalora_group_size={self.g} does not divide its number of inputs, {in_features}"
        return None

    def begun(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain(A, B)

    def stored(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return A[:, :: self.g].contiguous(), B

    def plain(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return A.repeat_interleave(self.g, dim=1), B


# ---- which layer has which -------------------------------------------------------------------------------------------


def _blocks(config: Any, path: str) -> Form | None:
    """As PEFT: the layer whose path holds one of the patterns, anywhere in it."""
    given: Mapping[str, Any] = config.use_bdlora
    a, b = (
        any(pattern in path for pattern in given.get(key) or ())
        for key in ("target_modules_bd_a", "target_modules_bd_b")
    )
    if a == b and (a or given.get("match_strict", True)):
        raise LoRAConfigError(
            f"{path}: use_bdlora names it in {'both lists' if a else 'neither list'}, target_modules_bd_a and "
            "target_modules_bd_b.",
            name="use_bdlora",
            value=dict(given),
            expected="each target in one of them",
            remedy="Name it in one of them."
            if a
            else 'Name it in one of them; with "match_strict": False a layer that neither names is plain.',
        )
    n = given.get("nblocks", 1)
    return BlockA(n) if a else BlockB(n) if b else None


def _pooled(config: Any, path: str) -> Form | None:
    return PooledA(config.qalora_group_size)


# By the field of `LoRAConfig` that asks for it.
_OF: Mapping[str, Callable[[Any, str], Form | None]] = {"use_bdlora": _blocks, "use_qalora": _pooled}
FORM_FIELDS = tuple(_OF)


def forms_asked(config: Any) -> tuple[str, ...]:
    """The fields by which a config asks for a form."""
    return tuple(field for field in _OF if getattr(config, field) not in (None, False))


def form_of(config: Any, path: str) -> Form | None:
    """The form of a new pair on the layer at `path`; None for a plain one.

    Raises:
        LoRAConfigError: use_bdlora does not say which.
    """
    for field in forms_asked(config):
        return _OF[field](config, path)
    return None
