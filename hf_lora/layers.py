"""Layers that take adapters: the class of a module is swapped for a cached `LoRA<Base>` subclass, in place.

    forward(x) = super().forward(x) + delta(x)

The module keeps its identity, its base type and its state-dict keys, so one layer serves every Linear-like base. What
the adapters hold of it lives in one child, `lora_slots`; `restore` takes the child away and gives the class back.
"""

from __future__ import annotations

import copyreg
import types
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import LoRAUnsupportedError
from .routing import rows_of
from .rowmaps import inner_rows, picked
from .slots import CHANNELS_FIRST, LoRASlots
from .state import LoRAState, active_rows, refuse_inner, tracing
from .tokens import TokenRows

__all__ = [
    "BIAS_ADDED",
    "LoRABias",
    "LoRAEmbedding",
    "LoRAHead",
    "LoRAHeads",
    "LoRALinear",
    "Swapped",
    "restore",
    "swap",
]

BIAS_ADDED = (nn.Linear, nn.LayerNorm, *CHANNELS_FIRST)  # layers whose bias is simply added to the output


class Swapped(nn.Module):
    """Mixin of every swapped class; `lora_base` is the class the module had."""

    lora_base: type[nn.Module]
    lora_mixin: type[Swapped]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle names the mixin and the base it is made of.
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_rebuild, (self.lora_mixin, self.lora_base), *reduced[2:])
        return reduced


class LoRALinear(Swapped):
    """A Linear-like layer (dense, quantised, Conv1D) with adapters."""

    lora_slots: LoRASlots

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002  # nn.Linear's own name
        """super().forward(x) + delta(x), (..., in) → (..., out)."""
        slots: Any = self._modules.get("lora_slots")  # nn.Module's own attribute look-up takes longer
        if slots is None:  # another thread gave the class back after this forward had been looked up
            return self.forward(input, *args, **kwargs)
        if slots.fresh and not args and not kwargs:
            output = slots.fused(input, self)
            if output is not None:
                return cast(Tensor, output)
        return slots.add(input, slots.base.forward(self, input, *args, **kwargs), self)  # super() may be gone by now


class LoRAEmbedding(LoRALinear):
    """An embedding with adapters: ids (...) → (..., d)."""


class LoRABias(LoRALinear):
    """A layer of which adapters train the bias alone (a norm, say)."""


class LoRAHeads(nn.Module):
    """The adapters' own copies of a module that they train whole (a classification head, say), by slot."""

    base: type[nn.Module]  # the class that the module had

    def __init__(self, state: LoRAState, row_map: str = "batch") -> None:
        super().__init__()
        self.state, self.row_map = state, row_map
        self.copies = nn.ModuleDict()

    def put(self, index: int, copy: nn.Module, *, trainable: bool) -> None:
        """Hold one adapter's copy."""
        for parameter in copy.parameters():
            parameter.requires_grad_(trainable and parameter.is_floating_point())
        for module in copy.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
        self.copies[str(index)] = copy

    def forward(self, input: Any) -> Any:  # noqa: A002  # nn.Sequential's own name
        """The input: a head that is an nn.Sequential runs every child, this one too."""
        return input

    def _replicate_for_data_parallel(self) -> LoRAHeads:
        replica: LoRAHeads = super()._replicate_for_data_parallel()
        replica.state = self.state.pinned()
        return replica

    def run(self, owner: nn.Module, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The base head's `output`, or the active copies' instead of it, row by row where routed."""
        if tracing():
            return self._run_compiled(owner, output, args, kwargs)
        active = self.state.current
        if active.rows is None:
            for entry, _ in active.mixture:
                if str(entry.check().slot) in self.copies:
                    output = self._of(entry.slot, owner, output, args, kwargs)
            return output
        if not any(str(entry.check().slot) in self.copies for entry in active.entries):
            return output
        here = [entry for entry in active.entries if str(entry.slot) in self.copies]
        if active.uniform:
            return self._of(here[0].slot, owner, output, args, kwargs)
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        if self.row_map == "batch":
            rows = rows_of(active, x, self.row_map)
            indices = [torch.tensor([i for i, r in enumerate(rows) if r is e], device=x.device) for e in here]
        else:
            inner, axis = inner_rows(active, x, self.row_map)
            if axis or not isinstance(output, Tensor) or len(output) != len(x):
                refuse_inner()  # it gives another number of entries than it is given
            indices = [picked(active, e, inner, x.device) for e in here]
        for entry, index in zip(here, indices, strict=True):
            output = output.index_copy(0, index, self._rows(entry.slot, owner, output, index, len(x), args, kwargs))
        return output

    def _of(self, slot: int, owner: nn.Module, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        copy = self.copies[str(slot)]
        if isinstance(copy, TokenRows):
            return copy.replace(owner, output, *args, **kwargs)
        return copy(*args, **kwargs)

    def _rows(
        self,
        slot: int,
        owner: nn.Module,
        output: Any,
        index: Tensor,
        n: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        def chosen(value: Any) -> Any:
            return value[index] if isinstance(value, Tensor) and value.dim() and value.shape[0] == n else value

        few = {k: chosen(v) for k, v in kwargs.items()}
        result: Tensor = self._of(slot, owner, chosen(output), tuple(map(chosen, args)), few)
        return result

    def _run_compiled(self, owner: nn.Module, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        slots, weights = active_rows(output, self.state, self.row_map)
        for key in self.copies:
            chosen = ((slots == int(key)) & (weights != 0)).any(1)
            changed = self._of(int(key), owner, output, args, kwargs)
            output = torch.where(chosen.view(-1, *[1] * (output.dim() - 1)), changed, output)
        return output


class LoRAHead(Swapped):
    """A module of which each adapter has its own trained copy (modules_to_save)."""

    lora_heads: LoRAHeads

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The active adapter's copy of the module, or the module itself."""
        heads: Any = self._modules.get("lora_heads")
        if heads is None:  # as above
            return self.forward(*args, **kwargs)
        return heads.run(self, heads.base.forward(self, *args, **kwargs), args, kwargs)


_CLASSES: dict[tuple[Any, Any], type[Swapped]] = {}


def swapped_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    """`LoRA<Base>`: the same class for the same base, so that torch.compile and isinstance see one type."""
    if (mixin, base) not in _CLASSES:
        names = {"lora_base": base, "lora_mixin": mixin, "__module__": mixin.__module__}
        # The base comes first: Python lets an object change its class only where the first bases lead to one layout
        # (quanto's first base is no nn.Module). So the mixin's own methods stand in the class itself.
        _CLASSES[mixin, base] = type(f"LoRA{base.__name__}", (base, mixin), {**_methods(mixin), **names})
    return _CLASSES[mixin, base]


def _methods(mixin: type[Swapped]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cls in reversed(mixin.__mro__):
        if issubclass(cls, Swapped):
            own = (types.FunctionType, property)
            found |= {name: value for name, value in vars(cls).items() if isinstance(value, own)}
    return found


def _rebuild(mixin: type[Swapped], base: type[nn.Module]) -> Swapped:
    cls = swapped_class(mixin, base)
    return cls.__new__(cls)


def swap(module: nn.Module, mixin: type[Swapped], path: str) -> None:
    """Give a module the class `LoRA<Base>`, in place.

    Raises:
        LoRAUnsupportedError: its forward was replaced on the instance.
    """
    own = module.__dict__.get("forward")
    if own is not None and "_old_forward" not in module.__dict__:
        raise LoRAUnsupportedError(
            f"{path}: its forward was replaced on the instance ({own!r}), so a LoRA there would never run.",
            name=path,
            remedy="Add the LoRA before what replaces forward, or take that off first.",
        )
    module.__class__ = swapped_class(mixin, type(module))
    _rebind(module)


def restore(module: nn.Module) -> None:
    """Give a swapped module its own class back."""
    if isinstance(module, Swapped):
        object.__setattr__(module, "__class__", module.lora_base)
        _rebind(module)


def _rebind(module: nn.Module) -> None:
    # accelerate's dispatch keeps the original forward on the instance and calls that: let it be the new class's.
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
