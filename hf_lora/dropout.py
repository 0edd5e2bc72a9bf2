"""Dropout that stores no mask: what is dropped follows from a seed, and is drawn again for the backward.

As in `torch.nn.functional.dropout` each entry is dropped with probability p, independently, and the rest is divided by
1 − p. The seed is one number from torch's default generator, so `torch.manual_seed`, and the recompute of a
checkpointed region, give the same mask. A mask of n bits costs n draws; on the CPU the gaps between dropped entries
are drawn instead, which are geometric and cost p·n.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_kept", "draw_seed", "dropout", "dropout_reference", "dropped", "seedable", "zeroed"]

_SPARSE = 0.25  # probability up to which gaps are cheaper than bits
_SEEDED = ("cpu", "cuda", "mps", "xpu")  # devices that torch.Generator is known for


def draw_seed() -> int:
    """A number from torch's default generator of the CPU."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def seedable(x: Tensor) -> bool:
    """Whether x has numbers, on a known device: not on meta, not traced, no vmap and no forward-mode derivative."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type in _SEEDED
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._is_tracing()
    )


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """Which entries of x are dropped: their places in its flattened form, ascending (int64); or a mask of its shape."""
    if x.is_meta:
        return torch.empty(int(p * x.numel()), dtype=torch.int64, device="meta")
    if x.device.type != "cpu" or p > _SPARSE:
        generator = torch.Generator(x.device).manual_seed(seed)
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(p, generator=generator)
    return _places(x.numel(), p, torch.Generator().manual_seed(seed))


def _places(n: int, p: float, generator: torch.Generator) -> Tensor:
    """Where of n Bernoulli draws are the hits, ascending."""
    rate, last = math.log1p(-p), -1
    found: list[Tensor] = []
    while not found or last < n - 1:
        expected = (n - 1 - last) * p
        uniform = torch.rand(int(expected + 4 * math.sqrt(expected)) + 8, dtype=torch.float64, generator=generator)
        # P(floor(log(u) / log(1 − p)) ≥ k) = (1 − p)^k: how many are kept before the next hit.
        gaps = uniform.log_().div_(rate).clamp_(max=n).to(torch.int64).add_(1)
        gaps[0] += last
        places = gaps.cumsum(0)
        last = int(places[-1])
        found.append(places)
    places = found[0] if len(found) == 1 else torch.cat(found)
    return places[: int(torch.searchsorted(places, n))]


def zeroed(x: Tensor, where: Tensor) -> Tensor:
    """A copy of x, contiguous, with zeros where `dropped` says."""
    copy = x.clone(memory_format=torch.contiguous_format)
    if where.dtype is torch.bool:
        return copy.masked_fill_(where, 0)
    copy.view(-1).index_fill_(0, where, 0)
    return copy


def add_kept(total: Tensor, left: Tensor, right: Tensor, where: Tensor) -> Tensor:
    """`total` + left right, except where `dropped` says. In place; total: (M, d), contiguous; left: (M, R)."""
    if where.dtype is torch.bool:
        return total.add_(torch.mm(left, right).masked_fill_(where.view(total.shape), 0))
    flat = total.view(-1)
    kept = flat.index_select(0, where)  # few: cheaper than a second (M, d)
    total.addmm_(left, right)
    flat.index_copy_(0, where, kept)
    return total


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return zeroed(x, dropped(x, p, seed)).div_(1 - p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Dropout.apply(grad, ctx.p, ctx.seed), None, None  # linear in x, with the same mask


def dropout(x: Tensor, p: float) -> Tensor:
    """`torch.nn.functional.dropout(x, p)`, 0 ≤ p < 1, of which the backward keeps a seed and no tensor."""
    if not seedable(x):
        return F.dropout(x, p)
    result: Tensor = _Dropout.apply(x, p, draw_seed())
    return result


def dropout_reference(x: Tensor, p: float, seed: int) -> Tensor:
    """What `dropout` computes with this seed: x · mask / (1 − p)."""
    where = dropped(x.detach(), p, seed)
    mask = where if where.dtype is torch.bool else torch.zeros(x.numel(), dtype=torch.bool).index_fill_(0, where, True)
    return x * ~mask.view(x.shape) / (1 - p)
