"""The bytes that a computation holds, read off while it runs on the device meta, where nothing is computed or stored.

Every storage counts from when an operator returns it until the last tensor on it is gone, as an allocator would see it.
Kernels that a real device would choose are put in for those of meta.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DeviceKernels", "Ledger"]


class Ledger(TorchDispatchMode):
    """Within, bytes of live storages.

    Args:
        known: tensors that were there before, and count nothing.

    Attributes:
        live: bytes held now. peak: the most so far. phase: a name for what comes next, see `held`.
        any_number: answer 1 to whoever asks for a number that has no value (an optimizer's norm, say).
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {storage._cdata: storage for storage in (t.untyped_storage() for t in known)}
        self.live = self.peak = 0
        self.phase = ""
        self.any_number = False
        self._sizes: dict[int, tuple[int, str]] = {}
        self._answers: dict[int, float] = {}

    def held(self, phase: str) -> int:
        """Bytes of live storages that were made in a phase."""
        sizes = Counter[str]()
        for nbytes, made in self._sizes.values():
            sizes[made] += nbytes
        return sizes[phase]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and book what it returns."""
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].is_meta:
            answer = self._answers.get(_key(args[0]), 1 if self.any_number else None)
            if answer is not None:
                return answer
        if name == "_grouped_mm" and args[0].is_meta:  # experts: on meta it takes no other dtype
            out = func(*(a.bfloat16() for a in args[:2]), *args[2:], **(kwargs or {})).to(args[0].dtype)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._book(tensor)
        self._answer(name, args, out)
        return out

    def _answer(self, name: str, args: Any, out: Any) -> None:
        """Remember what a mask's values come to: of "is nothing masked?" as for a batch without padding."""
        if name in ("all", "any"):
            self._answers[_key(out)] = name == "all"
        elif name == "sum" and args[0].dtype == torch.bool and out.dim() == 0:
            self._answers[_key(out)] = args[0].numel()
        elif name == "eq" and _key(args[0]) in self._answers:
            self._answers[_key(out)] = self._answers[_key(args[0])] == args[1]

    def _book(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._sizes or key in self.known:
            return
        nbytes = storage.nbytes()
        self._sizes[key] = (nbytes, self.phase)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)[0]
        self._answers.pop(key, None)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class DeviceKernels(TorchFunctionMode):
    """Within, attention and dropout on meta keep for the backward what the kernels of a device keep.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace `scaled_dot_product_attention` and, on CUDA, `dropout`."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout and self.device == "cuda":
            return _cuda_dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        asked = (query, key, value, attn_mask, dropout_p, is_causal)
        kernel = _cuda_kernel if self.device == "cuda" else _cpu_kernel
        chosen = kernel(*asked, enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool and chosen != "math":
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask, 0.0)
        if chosen == "cpu":
            run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return run(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        if chosen == "flash":
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        if chosen == "efficient":
            if attn_mask is not None:
                attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
            run = torch.ops.aten._scaled_dot_product_efficient_attention
            return run(query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale)[0]
        return F.scaled_dot_product_attention(*asked, scale=scale, enable_gqa=enable_gqa)  # meta's own: the plain maths


def _cuda_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    dropped: Tensor = torch.native_dropout(input, p, True)[0] if training and p else input
    return dropped


def _cpu_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, gqa: bool
) -> str:
    """What torch chooses on the CPU: asked of it, with tensors of one row that look like the whole."""
    like = None if mask is None else _shadow(mask)
    chosen = torch._fused_sdp_choice(
        _shadow(query), _shadow(key), _shadow(value), like, dropout, causal, enable_gqa=gqa
    )
    return "cpu" if chosen == 1 else "math"  # 1: torch.nn.attention.SDPBackend.FLASH_ATTENTION


def _shadow(tensor: Tensor) -> Tensor:
    shape = tensor.shape
    row = torch.empty(max(shape[-1], 1), dtype=tensor.dtype, device="cpu")
    like = row.as_strided(shape, (*[0] * (len(shape) - 1), 1))
    return like.requires_grad_(tensor.requires_grad)


def _cuda_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, gqa: bool
) -> str:
    """What torch chooses on a recent CUDA device: flash for half precision without a mask, else memory-efficient."""
    half, wide = query.element_size() == 2, max(query.shape[-1], value.shape[-1])
    same = query.shape[-1] == value.shape[-1]
    if mask is None and half and same and wide <= 256 and query.dim() == 4:
        return "flash"
    grouped = gqa and query.shape[1] != key.shape[1]
    if grouped or query.dim() != 4 or (mask is not None and mask.requires_grad and not query.requires_grad):
        return "math"
    return "efficient"
