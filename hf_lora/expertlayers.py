"""Modules of 3-D expert parameters that take adapters: the class is swapped, as a layer's.

The forward runs on a view of the module in which the parameter reads as `W + Σ B·A` (see `expertproxy`). So every
implementation of the experts is served as it is, and no parameter is changed or copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .banks import LoRABanks
from .errors import LoRARouteError
from .expertproxy import Adapted, Pair
from .layers import Swapped
from .rowmaps import inner_rows, picked
from .state import Active, Entry, LoRAState, refuse_inner

__all__ = ["ExpertBanks", "ExpertSlots", "LoRAExperts", "banks_of"]


class ExpertBanks(LoRABanks):
    """What adapters hold of one parameter: pairs (E·r, in), (out, E·r), in banks as a layer's are."""

    experts: int
    turned: bool

    def reserve_experts(self, slots: int, rank: int) -> None:
        """Room for so many adapters of this rank for each expert."""
        self.reserve(slots, rank * self.experts)

    def pair(self, index: int, weight: float) -> Pair:
        """One adapter's pairs, times `weight`."""
        slot = self.slots[index]
        if slot.trainable:
            own_A, own_B = self.get_parameter(f"A{index}"), self.get_parameter(f"B{index}")
            return Pair(
                own_A.view(self.experts, -1, self.in_features),
                own_B.view(self.out_features, self.experts, -1).permute(1, 2, 0),
                slot.scaling * weight,
                self.turned,
            )
        A, B = self.frozen(index)
        a, b = A.view(self.experts, -1, self.in_features), B.view(self.experts, -1, self.out_features)
        return Pair(a, b, weight, self.turned)


class ExpertSlots(nn.Module):
    """What adapters hold of a module's 3-D parameters: banks, by the parameter's name."""

    kind = "experts"
    base: type[nn.Module]  # the class that the module had

    def __init__(self, state: LoRAState, path: str, row_map: str) -> None:
        super().__init__()
        self.state, self.path, self.row_map = state, path, row_map

    @property
    def slots(self) -> dict[int, Any]:
        """Every adapter that has pairs here, by slot."""
        return {index: slot for bank in self.banks().values() for index, slot in bank.slots.items()}

    def banks(self) -> Mapping[str, ExpertBanks]:
        """By the parameter's name."""
        return self._modules  # type: ignore[return-value]

    def _replicate_for_data_parallel(self) -> ExpertSlots:
        replica: ExpertSlots = super()._replicate_for_data_parallel()
        replica.state = self.state.pinned()
        return replica

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of the module with what is active."""
        active = self.state.current
        if active.rows is None or active.uniform:
            mixture = active.mixture if active.rows is None else [(entry, 1.0) for entry in active.entries]
            return self._forward(module, mixture, args, kwargs)
        held = self.slots
        here = [entry for entry in active.entries if entry.check().slot in held]
        if not here:
            return self.base.forward(module, *args, **kwargs)
        return self._routed(module, active, here, args, kwargs)

    def _forward(
        self, module: nn.Module, mixture: Iterable[tuple[Entry, float]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        adapted: dict[str, Any] = {}
        mixture = list(mixture)
        for name, bank in self.banks().items():
            pairs = [bank.pair(e.slot, weight) for e, weight in mixture if e.check().slot in bank.slots]
            if pairs:
                adapted[name] = Adapted(module._parameters[name], pairs, f"{self.path}.{name}")  # type: ignore[arg-type]
        if not adapted:
            return self.base.forward(module, *args, **kwargs)
        view = object.__new__(self.base)  # of its own, since other threads run the module with other adapters
        vars(view).update(vars(module), _parameters={**module._parameters, **adapted})
        return self.base.forward(view, *args, **kwargs)

    def _routed(
        self, module: nn.Module, active: Active, here: list[Entry], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Each adapter's tokens in a forward of their own, and those of the base in one."""
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        x = given[0]
        try:
            rows, axis = inner_rows(active, x, self.row_map)
        except LoRARouteError as error:
            raise LoRARouteError(
                f"{self.path}: no route can be told apart here: the block around the experts was compiled, or "
                "is not given (rows, tokens, features).",
                name=self.path,
                remedy="Run it without torch.compile, or the rows of each adapter as a batch of their own.",
            ) from error
        if axis or not any(t.dtype == torch.int64 and t.dim() == 2 and len(t) == len(x) for t in given[1:]):
            refuse_inner()  # its tokens are in another order, or padded

        def chosen(value: Any, index: Tensor) -> Any:
            return value[index] if isinstance(value, Tensor) and value.dim() and len(value) == len(x) else value

        output: Tensor | None = None
        plain = torch.ones(len(x), dtype=torch.bool, device=x.device)
        parts = [(((entry, 1.0),), picked(active, entry, rows, x.device)) for entry in here]
        for _, index in parts:
            plain[index] = False
        for mixture, index in [*parts, ((), plain.nonzero().flatten())]:
            if len(index):
                own = tuple(chosen(a, index) for a in args)
                part = self._forward(module, mixture, own, {k: chosen(v, index) for k, v in kwargs.items()})
                output = part.new_zeros(len(x), *part.shape[1:]) if output is None else output
                output = output.index_copy(0, index, part)
        return output


class LoRAExperts(Swapped):
    """A module of 3-D expert parameters with adapters."""

    lora_slots: ExpertSlots

    @torch.compiler.disable(reason="hf_lora: experts with a LoRA run between two graphs")
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward, its parameters W + Σ B·A."""
        slots: Any = self._modules.get("lora_slots")
        if slots is None:  # another thread gave the class back after this forward had been looked up
            return self.forward(*args, **kwargs)
        return slots.run(self, args, kwargs)


def banks_of(module: nn.Module) -> list[LoRABanks]:
    """What adapters hold of the module's weights: one bank of a layer, one for each parameter of experts."""
    slots: Any = module._modules.get("lora_slots")
    if isinstance(slots, ExpertSlots):
        return list(slots.banks().values())
    return [slots] if isinstance(slots, LoRABanks) else []
