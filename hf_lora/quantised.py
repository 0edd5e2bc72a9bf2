"""Weights that bitsandbytes quantised: what they hold, and whether that is what an adapter was made for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoRAStateError
from .rounding import Rounding
from .weights import is_dense, is_here

__all__ = ["bits_of", "dequantised", "rounding_problem"]

_BITS = {"Params4bit": 4, "Int8Params": 8}


def bits_of(module: nn.Module) -> int | None:
    """4 or 8 where bitsandbytes has quantised the layer's weight, else None."""
    return _BITS.get(type(getattr(module, "weight", None)).__name__)


def dequantised(module: nn.Module) -> Tensor:
    """Q, (out, in) in float32, of a layer whose `bits_of` is not None.

    Raises:
        LoRAStateError: bitsandbytes has changed how it stores the weight, on a CPU.
    """
    weight: Any = module.weight
    functional = _functional()
    if bits_of(module) == 4:
        if _packed(weight.quant_state):
            raise LoRAStateError(
                f"bitsandbytes has rearranged the weight of this {type(module).__name__} for the CPU, in which form it "
                "cannot be read back.",
                remedy="Load the base again, and add the adapter before the model has run in eval mode.",
            )
        found: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        scales = getattr(weight, "SCB", None)
        scales = module.state.SCB if scales is None else scales  # type: ignore[union-attr]
        found = functional.int8_vectorwise_dequant(weight.data, scales)
    return found.to(torch.float32)


def _functional() -> Any:
    from bitsandbytes import functional  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return functional


def _packed(state: Any) -> bool:
    """Whether a forward in eval mode on a CPU has rearranged the weight; bitsandbytes' way back loses its scales."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def rounding_problem(module: nn.Module, rounding: Rounding, kind: str, blocks: int) -> str | None:
    """Why an adapter that is for a rounded weight does not fit the layer; None if it does.

    Args:
        kind: of the layer, as `Factors.kind`.
        blocks: how many slices of a fused layer it has.
    """
    if kind != "linear":
        return f"LoftQ (init_lora_weights) is for linear layers, not for this {type(module).__name__}"
    if blocks and rounding.iterations > 1:
        return f"loftq_iter={rounding.iterations} is for whole layers, not for slices of a fused one"
    if is_dense(module):
        return None if is_here(module) else "LoftQ (init_lora_weights) rounds the weight, which is not in memory whole"
    state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
    nested = getattr(state, "original_nested" if _packed(state) else "nested", None)
    found = (getattr(state, "quant_type", None), getattr(state, "blocksize", None), nested)
    if bits_of(module) == 4 and found == ("nf4", 64, False) and (rounding.bits, rounding.iterations) == (4, 1):
        return None
    return (
        f"the adapter is for {rounding.bits} bits with loftq_iter={rounding.iterations}, which this "
        f"{type(module).__name__} does not hold (4 bits with loftq_iter=1 is nf4 in blocks of 64, not double quantised)"
    )
