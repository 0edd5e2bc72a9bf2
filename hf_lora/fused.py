"""A dense layer and its adapter as one operation of autograd.

    y  = x W^T + b + s · (D x A^T) B^T              D: dropout's mask / (1 − p)
    dx = g W + s · D (g B) A        dA = s · (g B)^T (D x)        dB = s · g^T (D x A^T)

The second product of each sum adds into the first one's result, so nothing of the layer's width is made that the frozen
layer does not make itself, and the gradient reaches x in one piece. For the backward it keeps x itself (layers that
share an input share it), h = D x A^T of the rank's width, and no mask. W is frozen.

Under autocast it is the same in autocast's dtype. Layers that share an input share one copy of it in that dtype.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import add_kept, draw_seed, dropout_reference, dropped, seedable, zeroed
from .errors import LoRAUnsupportedError

__all__ = ["fits", "lora_linear", "lora_linear_reference"]


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `lora_linear` is for them: plain tensors of one dtype (or autocast's), the layer frozen, no tracing."""
    autocast = _autocast(x)
    return (
        (x.dtype == weight.dtype if autocast is None else {x.dtype, weight.dtype} <= _AUTOCAST)
        and type(weight) in (Tensor, nn.Parameter)
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and (seedable(x) or (x.is_meta and not torch.compiler.is_compiling()))  # on meta: `plan` counts what is kept
    )


_AUTOCAST = {torch.float32, torch.bfloat16, torch.float16}  # what autocast casts; it leaves float64 alone


def _autocast(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes products in, where it is on."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class _Last:
    """The input that was cast last, and its copy: q, k and v are called with one tensor, one after the other."""

    def __init__(self) -> None:
        self.source: weakref.ref[Tensor] | None = None
        self.copy: Tensor | None = None
        self.key: tuple[Any, ...] = ()

    def forget(self, source: weakref.ref[Tensor]) -> None:
        """The input is gone: hold nothing for it."""
        if self.source is source:
            self.source = self.copy = None


_thread = threading.local()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The input in another dtype, by an operation that autograd follows; the same copy for who asks again."""
    if x.dtype == dtype or x.is_inference():
        return x.to(dtype)
    last: _Last = _thread.__dict__.setdefault("last", _Last())
    key = (x._version, dtype, torch.is_grad_enabled())
    if last.copy is None or last.source is None or last.source() is not x or last.key != key:
        last.copy, last.key = x.to(dtype), key
        last.source = weakref.ref(x, last.forget)
    return last.copy


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        p: float,
        seed: int,
        keep: bool,
    ) -> Tensor:
        output, h = _forward(x, weight, bias, A, B, scale, p, seed)
        need_x, _, _, need_A, need_B = ctx.needs_input_grad[:5]
        again = need_B and not keep
        ctx.save_for_backward(
            x if need_A or again else None,
            weight if need_x else None,
            A if need_x or need_A or again else None,
            B,
            h if need_B and keep else None,
        )
        ctx.scale, ctx.p, ctx.seed, ctx.shape, ctx.dtypes = scale, p, seed, x.shape, (A.dtype, B.dtype)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable(ctx, grad)
        x, weight, A, B, h = ctx.saved_tensors
        need_x, _, _, need_A, need_B = ctx.needs_input_grad[:5]
        g = _rows(grad)
        where = dx = dA = dB = None
        inner: Any = None
        if ctx.p and (need_x or x is not None):
            where = dropped(grad.new_empty(()).expand(ctx.shape), ctx.p, ctx.seed)
        if x is not None:
            inner = x if where is None else zeroed(x, where)
        if need_x or need_A:
            gB = torch.mm(_scaled(B, ctx.scale, g.dtype).t(), g.t())  # (R, M)
            if need_A:
                dA = torch.mm(gB, _rows(inner)).to(ctx.dtypes[0])
            if need_x:
                dx, narrow = torch.mm(g, weight), A.to(g.dtype)
                dx = dx.addmm_(gB.t(), narrow) if where is None else add_kept(dx, gB.t(), narrow, where)
                dx = dx.view(ctx.shape)
        if need_B:
            dB = torch.mm(_narrow(A, inner) if h is None else h, g).t().to(ctx.dtypes[1])
            dB = dB if ctx.scale == 1 else dB.mul_(ctx.scale)
        return dx, None, None, dA, dB, None, None, None, None


def _differentiable(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients by operations that autograd follows, for a second derivative."""
    x, weight, A, B, h = ctx.saved_tensors
    need_x, _, _, need_A, need_B = ctx.needs_input_grad[:5]
    if need_B and need_x and x is None:
        raise LoRAUnsupportedError(
            "A second derivative through a layer whose A is frozen: nothing of its input was kept for it.",
            remedy="Let A train too, or put the model into eval mode for this derivative.",
        )
    dtype, kept = grad.dtype, torch.ones((), dtype=grad.dtype, device=grad.device)
    if ctx.p:
        kept = dropout_reference(grad.new_ones(ctx.shape), ctx.p, ctx.seed).ne_(0)
    inner: Any = None if x is None else x * kept
    gB = F.linear(grad, _scaled(B, ctx.scale, dtype).t())  # (..., R)
    dx = dA = dB = None
    if need_x:
        dx = torch.matmul(grad, weight) + torch.matmul(gB, A.to(dtype)) * kept
    if need_A:
        dA = torch.mm(_rows(gB).t(), _rows(inner)).to(ctx.dtypes[0])
    if need_B:
        narrow = h if inner is None else _narrow(A, inner)  # (R, M)
        dB = ctx.scale * torch.mm(narrow, _rows(grad)).t().to(ctx.dtypes[1])
    return dx, None, None, dA, dB, None, None, None, None


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """The output, (..., out), and h, (R, M)."""
    output = F.linear(x, weight, bias)
    h = _narrow(A, zeroed(x, dropped(x, p, seed)) if p else x)
    output.view(-1, weight.shape[0]).addmm_(h.t(), _scaled(B, scale, x.dtype).t())
    return output, h


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _narrow(A: Tensor, x: Tensor) -> Tensor:
    """(x A^T)^T, (R, M): a wide product is faster than a tall one."""
    return torch.mm(A.to(x.dtype), _rows(x).t())


def _scaled(B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (B if scale == 1 else B * scale).to(dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    *,
    p: float = 0.0,
    seed: int | None = None,
    keep: bool = True,
) -> Tensor:
    """A frozen dense layer and a pair, x W^T + b + scale · (dropout(x) A^T) B^T, with gradients of x, A and B.

    With a B of zero the output is the layer's, bit for bit. Under autocast x, weight and bias are cast to its dtype.

    Args:
        x: (..., in).
        weight: (out, in), in x's dtype, frozen. bias: (out,), frozen.
        A: (R, in). B: (out, R). In any dtype: they are cast, x is not; their gradients come in their own.
        scale: a number.
        p: dropout's probability, 0 ≤ p < 1.
        seed: of the mask; None draws one from torch's default generator.
        keep: hold h (R numbers a row) for the backward; otherwise it is computed again.

    Returns:
        (..., out).
    """
    seed = 0 if not p else draw_seed() if seed is None else seed
    dtype = _autocast(x)
    if dtype is not None:
        x, weight = _cast(x, dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(x, weight, bias, A, B, scale, p=p, seed=seed, keep=keep)
    given = (x, weight, bias, A, B, scale / (1 - p), p, seed)
    if not torch.is_grad_enabled():
        return _forward(*given)[0]  # the same bits, and no node to make
    output: Tensor = _LoRALinear.apply(*given, keep)
    return output


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    *,
    p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """What `lora_linear` computes, with autograd's own operations."""
    inner = x if not p or seed is None else dropout_reference(x, p, seed)
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(inner, A.to(x.dtype)), B.to(x.dtype))
