"""Weights that bitsandbytes quantised: what they hold, and whether that is what an adapter was made for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .backends import backend_of
from .errors import LoRAStateError
from .layerinfo import modules_of
from .rounding import Rounding
from .weights import is_dense, is_here

__all__ = ["bits_of", "dequantised", "described", "hold_still", "let_go", "refuse_rearranged", "rounding_problem"]

_BITS = {"Params4bit": 4, "Int8Params": 8}


def bits_of(module: nn.Module) -> int | None:
    """4 or 8 where bitsandbytes has quantised the layer's weight, else None."""
    return _BITS.get(type(getattr(module, "weight", None)).__name__)


def dequantised(module: nn.Module) -> Tensor:
    """Q, (out, in) in float32, of a layer whose `bits_of` is not None.

    Raises:
        LoRAStateError: bitsandbytes has changed how it stores the weight, on a CPU.
    """
    backend = backend_of(module)
    assert backend is not None
    return backend.read(module).to(torch.float32)


def described(model: nn.Module) -> str | None:
    """How the model's layers are quantised, such as "bitsandbytes, 4 bits (nf4)"; None if none is."""
    found: dict[str, int] = {}
    for module in modules_of(model).values():
        backend = backend_of(module)
        if backend is not None:
            name = backend.described(module)
            found[name] = found.get(name, 0) + 1
    if len(found) < 2:
        return next(iter(found), None)
    return ", ".join(f"{name} in {count} layers" for name, count in found.items())


def _packed(state: Any) -> bool:
    """Whether a forward in eval mode on a CPU has rearranged the weight."""
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


# ---- on a CPU bitsandbytes rearranges weights ------------------------------------------------------------------------

_REARRANGES = "support_avx512bf16_for_cpu"
_HELD = "_lora_held_still"


def hold_still(model: nn.Module) -> None:
    """Keep bitsandbytes from rearranging 4-bit weights in eval mode, on CPUs for which it does that.

    Products with a rearranged weight have no gradient, and their scales are lost: training after an evaluation would go
    wrong without a word, and nothing could be merged.
    """
    for module in model.modules():
        own = vars(module).get(_REARRANGES)
        if own:
            vars(module)[_REARRANGES] = False
            vars(module)[_HELD] = own


def let_go(model: nn.Module) -> None:
    """Undo `hold_still`."""
    for module in model.modules():
        own = vars(module).pop(_HELD, None)
        if own is not None:
            vars(module)[_REARRANGES] = own


def refuse_rearranged(model: nn.Module) -> None:
    """Raise if a layer's weight has been rearranged: no gradient passes it."""
    for path, module in model.named_modules():
        if bits_of(module) == 4 and _packed(module.weight.quant_state):
            raise LoRAStateError(
                f"{path}: bitsandbytes has rearranged this weight for the CPU when the model ran in eval mode, so that "
                "no gradient passes it, and an adapter would train wrongly.",
                name=path,
                remedy="Load the base again, and add the adapter before the model runs.",
            )
