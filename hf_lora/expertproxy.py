"""What stands for a 3-D expert parameter while its module's forward runs: W + Σ B·A, of which no sum is ever made.

An experts' forward asks of its parameter one expert (`W[e]`), some (`W[ids]`), or a product of all (`grouped_mm`,
`bmm`), and of an expert a product with its tokens. Each is computed as the base's product and the two thin ones of the
pair, through the pairs of the experts that are there: an expert that no token reaches costs nothing.

    x · (W + L·R) = x·W + (x·L)·R          (W + L·R) · x = W·x + L·(R·x)

Whatever else is asked of it is an error: it is never W alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import LoRAUnsupportedError

__all__ = ["Adapted", "Pair"]

_ALIGNED = 8  # numbers, 16 bytes in half precision: grouped_mm takes no rows that begin elsewhere


class Pair:
    """One adapter's pairs of all experts of a parameter.

    Args:
        A: (E, r, in). B: (E, r, out).
        scaling: what B is multiplied by.
        turned: the parameter is (E, in, out), otherwise (E, out, in).
    """

    def __init__(self, A: Tensor, B: Tensor, scaling: float, turned: bool) -> None:
        self.A, self.B, self.scaling, self.turned = A, B, scaling, turned
        self.each: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def of(self, index: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """L (…, rows, r) and R (…, r, columns) of an expert, of some, or of all (`index` None)."""
        if index is None:
            a, b = self.A, self.B
        elif isinstance(index, Tensor) and index.dim():
            a, b = self.A[index], self.B[index]
        elif self.A.requires_grad or self.B.requires_grad:
            # The gradient of A[e] is as large as A, for each expert; that of what unbind gives is A once.
            if self.each is None:
                self.each = self.A.unbind(0), self.B.unbind(0)
            a, b = self.each[0][int(index)], self.each[1][int(index)]
        else:
            a, b = self.A[index], self.B[index]
        a, b = a.to(dtype), (b if self.scaling == 1 else b * self.scaling).to(dtype)
        return (a.mT, b) if self.turned else (b.mT, a)


class Adapted:
    """A parameter, or a part of it, with what adapters add to it.

    Args:
        weight: W, or W of one expert, of some, or turned.
        pairs: of each adapter L and R, or how to get them.
        name: for messages.
    """

    def __init__(self, weight: Tensor, pairs: Sequence[Pair], name: str) -> None:
        self.weight, self.name = weight, name
        self._pairs = pairs
        self._parts: list[tuple[Tensor, Tensor]] | None = None

    def _part(self, weight: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Adapted:
        part = Adapted(weight, (), self.name)
        part._parts = parts
        return part

    @property
    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """L (…, rows, r) and R (…, r, columns) of each adapter, in W's dtype."""
        if self._parts is None:
            self._parts = [pair.of(None, self.weight.dtype) for pair in self._pairs]
        return self._parts

    # -- what may be asked of it ---------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Adapted:
        number = isinstance(index, int) or (isinstance(index, Tensor) and index.dtype == torch.int64)
        if not number or isinstance(index, bool) or self._parts is not None or self.weight.dim() != 3:
            _refuse(self, f"indexing it with {index!r}")
        dtype = self.weight.dtype
        return self._part(self.weight[index], [pair.of(index, dtype) for pair in self._pairs])

    def transpose(self, dim0: int, dim1: int) -> Adapted:
        """Rows and columns in each other's place."""
        n = self.weight.dim()
        if {dim0 % n, dim1 % n} != {n - 2, n - 1}:
            _refuse(self, f"transpose({dim0}, {dim1})")
        return self._part(self.weight.mT, [(right.mT, left.mT) for left, right in self.parts])

    @property
    def mT(self) -> Adapted:
        """As `transpose(-2, -1)`."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> Adapted:
        """The transpose of one expert's."""
        if self.weight.dim() != 2:
            _refuse(self, ".T")
        return self.transpose(0, 1)

    def size(self, dim: int | None = None) -> Any:
        """W's."""
        return self.weight.shape if dim is None else self.weight.shape[dim]

    def dim(self) -> int:
        """W's."""
        return self.weight.dim()

    def data_ptr(self) -> int:
        """W's: transformers looks whether it is aligned."""
        return self.weight.data_ptr()

    def __matmul__(self, other: Any) -> Tensor:
        return _product(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return _product(other, self)

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "device", "ndim", "is_cuda", "is_meta", "layout"):
            return getattr(self.weight, name)
        if name.startswith("__"):
            raise AttributeError(name)
        return _refuse(self, f".{name}")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", None) or str(func)
        compute = _COMPUTED.get(name.removeprefix("__").removesuffix("__"))
        if compute is None:
            given = (*args, *(kwargs or {}).values())
            _refuse(next((a for a in given if isinstance(a, Adapted)), None), f"torch's {name}")
        return compute(func, *args, **(kwargs or {}))


def _refuse(own: Adapted | None, what: str) -> NoReturn:
    name = "experts" if own is None else own.name  # it may stand in a list
    raise LoRAUnsupportedError(
        f"{name}: this model's forward asks of the experts' parameter what is not computed with a LoRA: {what}.",
        name=name,
        value=what,
        remedy='Use experts_implementation="eager", "grouped_mm" or "batched_mm", or merge_lora() and run it merged.',
    )


def _product(x: Any, y: Any) -> Tensor:
    if isinstance(x, Adapted):
        if isinstance(y, Adapted):
            _refuse(x, "a product with another")
        found: Tensor = x.weight @ y
        for left, right in x.parts:
            found = found + left @ (right @ y)
        return found
    found = x @ y.weight
    for left, right in y.parts:
        found = found + (x @ left) @ right
    return found


def _matmul(func: Any, input: Any, other: Any) -> Tensor:  # noqa: A002
    return _product(input, other)


def _linear(func: Any, input: Any, weight: Any, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    if not isinstance(weight, Adapted) or isinstance(input, Adapted) or isinstance(bias, Adapted):
        _refuse(next(a for a in (input, bias, weight) if isinstance(a, Adapted)), "F.linear with it as the input")
    found = F.linear(input, weight.weight, bias)
    for left, right in weight.parts:
        found = found + F.linear(F.linear(input, right), left)
    return found


def _grouped(func: Any, input: Any, weight: Any, offs: Any, **options: Any) -> Tensor:  # noqa: A002
    """X (S, in) sorted by expert, W (E, in, out)."""
    if isinstance(input, Adapted) or options.get("bias") is not None or weight.weight.dim() != 3:
        _refuse(input if isinstance(input, Adapted) else weight, "grouped_mm of this form")
    call = (lambda a, b: func(a, b, offs)) if "fallback" in str(func) else lambda a, b: func(a, b, offs=offs, **options)
    found: Tensor = call(input, weight.weight)
    for left, right in weight.parts:
        found = found + call(call(input, _aligned(left, -1)), _aligned(right, -2))
    return found


def _aligned(part: Tensor, dim: int) -> Tensor:
    """With its rank padded to whole 16 bytes, and laid out so."""
    more = -part.shape[dim] % _ALIGNED
    if more:
        part = F.pad(part, (0, more) if dim == -1 else (0, 0, 0, more))
    return part.contiguous()


_COMPUTED: Mapping[str, Callable[..., Tensor]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    "rmatmul": lambda func, own, other: _product(other, own),
    **dict.fromkeys(
        ("grouped_mm", "_grouped_mm", "transformers::grouped_mm_fallback", "grouped_mm_fallback"), _grouped
    ),
}
