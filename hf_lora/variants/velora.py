"""VeLoRA: of A's input only a rank-one projection is kept for its gradient (Miles et al., 2024, arXiv:2405.17991).

The input is cut into G groups of d numbers, and each is projected on one unit vector v:

    c = x v        (M, G)                     kept in the forward, instead of x
    x̂ = scale · c vᵀ                          what the backward takes for x
    dA = (g B)ᵀ x̂ = scale · ((g B)ᵀ c) vᵀ     (R, G) through d numbers each: x̂ itself is never made

The forward is plain LoRA's, and so is the gradient that reaches x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .step import Narrow

__all__ = ["VeLoRA", "velora"]


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, v: Tensor, scale: float) -> Tensor:
        need_x, need_A = ctx.needs_input_grad[:2]
        ctx.save_for_backward(_grouped(x, len(v)) @ v if need_A else None, A if need_x else None, v)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, A.dtype)
        return F.linear(x, A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        c, A, v = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])  # (M, R)
        dx = dA = None
        if A is not None:
            dx = (g @ A.to(g.dtype)).view(ctx.shape).to(ctx.dtypes[0])
        if c is not None:
            through = g.t() @ c.to(g.dtype)  # (R, G)
            whole = (through[:, :, None] * (v.to(g.dtype) * ctx.scale)).flatten(1)
            dA = whole[:, : ctx.shape[-1]].to(ctx.dtypes[1])
        return dx, dA, None, None


def velora(x: Tensor, A: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """The product x Aᵀ, keeping c = x v for the gradient of A.

    Args:
        x: (..., in), in A's dtype.
        A: (R, in).
        v: (d,), a unit vector in the same dtype; the last group is filled up with zeros.
        scale: what is put in for x is multiplied by it.

    Returns:
        (..., R).
    """
    output: Tensor = _Projected.apply(x, A, v, scale)
    return output


def _grouped(x: Tensor, d: int) -> Tensor:
    """(M, G, d), the last group filled up with zeros."""
    short = -x.shape[-1] % d
    return (F.pad(x, (0, short)) if short else x).reshape(-1, (x.shape[-1] + short) // d, d)


def _average(x: Tensor, d: int) -> Tensor:
    """The mean of all groups, of length 1, in float32 or wider: (d,). The even direction where it is zero."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = _grouped(x.reshape(-1, x.shape[-1]).mean(0, dtype=wide), d)[0].mean(0)
    return _unit(mean)


def _unit(vector: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(vector)
    return torch.where(norm > 0, vector / norm, torch.full_like(vector, len(vector) ** -0.5))


class VeLoRA:
    """The step of training that keeps less of A's input."""

    def initial(self, A: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """v, (d,): of random direction, or zero until it is the average of an input."""
        v = A.new_zeros(-(-A.shape[1] // settings["num_groups"]))
        return {"projection": _unit(torch.randn_like(v)) if settings["init_type"] == "random" else v}

    def scratch(self, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def narrow(self, inner: Narrow, held: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Narrow:
        """Through A, keeping the projection on v, which is first made to follow x, as `init_type` says."""

        def through(x: Tensor, A: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return inner(x, A)
            v = held["projection"].detach()
            with torch.no_grad():
                own = v
                if settings["init_type"] != "random":
                    new = _average(x.detach(), len(v)).to(v.dtype)
                    own = new if settings["init_type"] == "batch_average" else torch.where(v.any(), own, new)
                    v.copy_(own)
            dtype = x.dtype
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
            with torch.autocast(x.device.type, enabled=False):
                return velora(x.to(dtype), A.to(dtype), own.to(dtype), settings["scale"])

        return through
