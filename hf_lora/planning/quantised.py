"""Quantised layers on the device meta: their bytes, and what a step holds of them.

    forward: y = x Q^T, Q made for the product and given back      backward: dx = dy Q, Q made once more

So bitsandbytes, and whatever dequantises a weight for its product, keep nothing of it but its packed numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import backend_of, sizes_of
from ..layerinfo import modules_of

__all__ = ["QuantisedLinear", "quantise", "stand_in"]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, sizes: tuple[int, int]) -> Tensor:
        """x: (..., in) → (..., out)."""
        ctx.save_for_backward(packed)
        ctx.sizes = sizes
        return x @ torch.empty(sizes, dtype=x.dtype, device=x.device).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x, (..., in), from that of y, (..., out)."""
        (grad,) = grads
        return grad @ torch.empty(ctx.sizes, dtype=grad.dtype, device=grad.device), None, None


class QuantisedLinear(nn.Module):
    """A linear layer whose weight is packed; on meta it takes the memory that a real one takes.

    Args:
        in_features, out_features: sizes.
        nbytes: of the weight and its scales.
        bias: the layer's, or None.
        dtype: that it computes in.
    """

    def __init__(
        self, in_features: int, out_features: int, nbytes: int, bias: Tensor | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, dtype
        self.register_buffer("packed", torch.empty(nbytes, dtype=torch.uint8, device="meta"))
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias, device="meta"), requires_grad=False)

    @property
    def numbers(self) -> int:
        """How many numbers the packed weight stands for."""
        return self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        y: Tensor = _Product.apply(x, self.packed, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias


def stand_in(module: Any) -> QuantisedLinear | None:
    """What stands for a quantised layer of a model that is there; None for another module."""
    if backend_of(module) is None:
        return None
    own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    bias = own.pop("bias", None)
    _, nbytes = sizes_of(module, own)
    dtype = next((d for d in (getattr(module, "compute_dtype", None),) if isinstance(d, torch.dtype)), None)
    return QuantisedLinear(module.in_features, module.out_features, nbytes, bias, dtype)


# ---- from a configuration --------------------------------------------------------------------------------------------


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def _bitsandbytes(settings: dict[str, Any], out: int, fan_in: int) -> int:
    n = out * fan_in
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return n + 4 * out
    scales = _blocks(n, 64)
    if settings.get("bnb_4bit_use_double_quant"):
        return _blocks(n, 2) + scales + 4 * _blocks(scales, 256) + 64 + 1024 + 4  # two codes, and an offset
    return _blocks(n, 2) + 4 * scales + 64


def _grouped(settings: dict[str, Any], out: int, fan_in: int) -> int:
    """GPTQ, AWQ, HQQ: packed numbers, and a scale and a zero point in half precision for each group."""
    bits = settings.get("bits") or settings.get("nbits") or 4
    group = settings.get("group_size") or 128
    groups = out * (_blocks(fan_in, group) if group > 0 else 1)
    return _blocks(out * fan_in * bits, 8) + 4 * groups


def _fp8(settings: dict[str, Any], out: int, fan_in: int) -> int:
    rows, columns = settings.get("weight_block_size") or (128, 128)
    return out * fan_in + 4 * _blocks(out, rows) * _blocks(fan_in, columns)


# quant_method -> bytes of a layer's weight and scales
_BYTES: dict[str, Callable[[dict[str, Any], int, int], int]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _grouped,
    "awq": _grouped,
    "hqq": _grouped,
    "fp8": _fp8,
}
_SKIPS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")


def quantise(model: nn.Module, config: Any) -> str | None:
    """Let a model on meta be quantised as its quantization_config says; what to note if that is not known.

    Its output head stays, as transformers leaves it, and so does what the config leaves out.
    """
    settings = dict(config) if isinstance(config, dict) else config.to_dict()
    method = settings.get("quant_method")
    method = str(getattr(method, "value", method)).lower()  # an enumeration, or its value
    if method not in _BYTES:
        return f"how many bytes {method or 'its quantization_config'} takes is not known: the base is counted dense"
    out = getattr(model, "get_output_embeddings", lambda: None)()
    left = tuple(name for key in _SKIPS for name in settings.get(key) or ())
    for path, module in list(modules_of(model).items()):
        if not isinstance(module, nn.Linear) or module is out or any(name in path.split(".") for name in left):
            continue
        nbytes = _BYTES[method](settings, module.out_features, module.in_features)
        layer = QuantisedLinear(module.in_features, module.out_features, nbytes, module.bias, module.weight.dtype)
        _replace(model, path, layer)
    return None


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
