"""The form of a factor: how one that is stored, and trained, in a smaller shape stands for a plain A or B.

A form is data about one layer's pair: the shapes of what is stored, and how it expands, differentiably. Everything but
the Parameters and the files has the plain pair, so that routes, mixtures, merges and arithmetic know of no form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import LoRAConfigError

__all__ = ["Form", "form_of", "forms_asked"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """How a stored pair stands for a plain one, A (R, in) and B (out, R).

    Attributes:
        field: the field of `LoRAConfig` that asks for it. "use_bdlora": n equal blocks on the diagonal of a factor,
            stored one below the other. "use_qalora": A reads the mean of each n inputs, times in/n, so that each
            stored column stands for n equal ones.
        side: which factor it is. It is stored with n times fewer columns.
        n: see above.
    """

    field: str
    side: Literal["A", "B"]
    n: int

    @property
    def pooled(self) -> bool:
        """Whether inputs are pooled."""
        return self.field == "use_qalora"

    @property
    def spread(self) -> float:
        """What the bound of a kaiming A is multiplied by: PEFT draws blocks within √(6/columns)."""
        return math.sqrt(6) if self.field == "use_bdlora" and self.side == "A" else 1.0

    def factor(self, in_features: int) -> float:
        """What the layer's scaling is multiplied by: of means times in/n, where the plain A sums, in/n²."""
        return (in_features // self.n) / self.n if self.pooled else 1.0

    def columns(self, in_features: int) -> int:
        """Columns of the stored A."""
        return in_features // self.n if self.side == "A" else in_features

    def whole(self, a: Shape, b: Shape) -> tuple[Shape, Shape]:
        """The shapes of the plain pair, from those of the stored one."""
        return ((a[0], a[1] * self.n), b) if self.side == "A" else (a, (b[0], b[1] * self.n))

    def problem(self, rank: int, in_features: int, out_features: int) -> str | None:
        """Why a layer of these sizes cannot have it."""
        size = ("number of inputs", in_features) if self.side == "A" else ("number of outputs", out_features)
        setting = "qalora_group_size" if self.pooled else "use_bdlora: nblocks"
        for what, value in (size,) if self.pooled else (size, ("rank", rank)):
            if value % self.n:
                return f"{setting}={self.n} does not divide its {what}, {value}"
        return None

    def stored(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The stored pair of a plain one, bit for bit."""
        pack, _ = _SHAPES[self.field]
        return (pack(A, self.n), B) if self.side == "A" else (A, pack(B, self.n))

    def plain(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The plain pair of a stored one; differentiable."""
        _, unpack = _SHAPES[self.field]
        return (unpack(A, self.n), B) if self.side == "A" else (A, unpack(B, self.n))

    def read(self, x: Tensor) -> Tensor | None:
        """What a stored A reads, where that is narrower than x (..., in): the sums of n inputs each; else None."""
        return x.unflatten(-1, (-1, self.n)).sum(-1) if self.pooled else None

    def begun(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The plain pair of A as it is stored, and of a whole B, of which the form's part stays."""
        return self.plain(*((A, B) if self.side == "A" else self.stored(A, B)))


def _blocks(whole: Tensor, n: int) -> Tensor:
    rows, columns = whole.shape
    found = whole.reshape(n, rows // n, n, columns // n).diagonal(dim1=0, dim2=2)
    return found.permute(2, 0, 1).reshape(rows, columns // n)


def _on_diagonal(blocks: Tensor, n: int) -> Tensor:
    return torch.block_diag(*blocks.chunk(n)) if n > 1 else blocks


def _first_of_each(whole: Tensor, n: int) -> Tensor:
    return whole[:, ::n].contiguous()


def _repeated(pooled: Tensor, n: int) -> Tensor:
    return pooled.repeat_interleave(n, dim=1)


_Change = Callable[[Tensor, int], Tensor]
# From the whole factor to what is stored, and back.
_SHAPES: Mapping[str, tuple[_Change, _Change]] = {
    "use_bdlora": (_blocks, _on_diagonal),
    "use_qalora": (_first_of_each, _repeated),
}


# ---- which layer has which -------------------------------------------------------------------------------------------


def _block_diagonal(config: Any, path: str) -> Form | None:
    """As in PEFT: a layer whose path holds one of the patterns, anywhere in it."""
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
    return Form("use_bdlora", "A", n) if a else Form("use_bdlora", "B", n) if b else None


def _pooled(config: Any, path: str) -> Form | None:
    return Form("use_qalora", "A", config.qalora_group_size)


# By the field of `LoRAConfig` that asks for it.
_OF: Mapping[str, Callable[[Any, str], Form | None]] = {"use_bdlora": _block_diagonal, "use_qalora": _pooled}


def forms_asked(config: Any) -> tuple[str, ...]:
    """The fields by which a config asks for forms; one at most."""
    return tuple(field for field in _OF if getattr(config, field) not in (None, False))


def form_of(config: Any, path: str) -> Form | None:
    """The form of a new pair on the layer at `path`; None for a plain one.

    Raises:
        LoRAConfigError: use_bdlora does not say which.
    """
    for field in forms_asked(config):
        return _OF[field](config, path)
    return None
