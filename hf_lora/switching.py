"""What is active: the model's default, and the blocks that override it. O(1), whatever the number of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from .errors import LoRANameError, LoRARouteError, LoRAStateError
from .model import require
from .state import NOTHING, Active, Entry, LoRAState

__all__ = ["Which", "described", "no_lora", "route_lora", "selection", "set_lora", "use_lora"]

_LARGEST = 1e18  # of a weight; times a scaling, which is bounded likewise, it is still a float32

Which = str | Sequence[str] | Mapping[str, float] | None
"""An adapter's name; several, each with weight 1; names with weights; or None for the base alone."""


def selection(state: LoRAState, which: Which) -> Active:
    """What `which` means on this model.

    Raises:
        LoRANameError: no such adapter. LoRAStateError: a mixture of adapters of which one replaces a head or a bias.
    """
    if which is None:
        return NOTHING
    if isinstance(which, str):
        return Active(((state.entry(which), 1.0),))
    if isinstance(which, Mapping):
        pairs = list(which.items())
    elif isinstance(which, Sequence):
        pairs = [(name, 1.0) for name in which]
    else:
        raise LoRANameError(
            f"{which!r} names no adapters.",
            value=which,
            expected="a name, names, a mapping of names to weights, or None",
            remedy='Give "task", ["a", "b"], {"a": 0.7, "b": 0.3}, or None for the base alone.',
        )
    mixture: list[tuple[Entry, float]] = []
    for name, weight in pairs:
        if not _is_weight(weight):
            raise LoRAStateError(
                f"Adapter {name!r} cannot have the weight {weight!r}.",
                name=str(name),
                value=weight,
                expected=f"a finite number from {-_LARGEST:g} to {_LARGEST:g}",
                remedy="Give a finite number: it scales the adapter's ΔW.",
            )
        entry = state.entry(name)
        if any(entry is other for other, _ in mixture):
            raise LoRANameError(
                f"Adapter {name!r} is named twice.",
                name=name,
                value=which,
                remedy=f"Name it once; {{{name!r}: 2.0}} adds its ΔW twice.",
            )
        mixture.append((entry, float(weight)))
    whole = [entry.name for entry, _ in mixture if entry.record.whole]
    if whole and (len(mixture) > 1 or mixture[0][1] != 1):
        raise LoRAStateError(
            f"{', '.join(map(repr, whole))} cannot be mixed or scaled: it replaces a head or biases, and only "
            "factors add up.",
            name=whole[0],
            value=which,
            remedy="Use it alone, with weight 1.",
        )
    return Active(tuple(mixture)) if mixture else NOTHING


def _is_weight(weight: Any) -> bool:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        return False
    return -_LARGEST <= weight <= _LARGEST


def described(active: Active) -> Any:
    """`active` in the form that `set_lora` takes (a list of names or None where it is a route)."""
    if active.rows is not None:
        return [entry.name if entry else None for entry in active.rows]
    if not active.mixture:
        return None
    if len(active.mixture) == 1 and active.mixture[0][1] == 1:
        return active.mixture[0][0].name
    return {entry.name: weight for entry, weight in active.mixture}


def set_lora(model: nn.Module, which: Which) -> None:
    """Make an adapter, or a mixture, the model's default; None for the base alone. Never touches requires_grad.

    Args:
        which: a name; names; {name: weight}, where the weight scales ΔW; or None.

    Raises:
        LoRANameError, LoRAStateError: see `selection`; also while merged.
    """
    state = require(model)
    state.choose(lambda: selection(state, which), "set_lora")


@contextmanager
def use_lora(model: nn.Module, which: Which) -> Iterator[nn.Module]:
    """Within the block, and in this thread or task alone, `which` is active instead of the default.

    A thread started inside the block begins with the default; give it `contextvars.copy_context().run`.
    """
    state = require(model)
    with state.override(lambda: selection(state, which), "use_lora"):
        yield model


def no_lora(model: nn.Module) -> Any:
    """Within the block, and in this thread or task alone, the model is its base."""
    return use_lora(model, None)


@contextmanager
def route_lora(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within the block, row i of every batch goes through adapter `names[i]`; None is the base alone.

    Raises:
        LoRANameError: no such adapter. LoRARouteError: `names` is no sequence of names; or, from the forward, the batch
            has another number of rows, or the route touches a layer whose batch is not the rows.
    """
    state = require(model)
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence) or not len(names):
        raise LoRARouteError(
            f"A route is a list with a name or None for each row, not {names!r}.",
            value=names,
            expected="a list",
            remedy='Give one entry for each row of the batch: route_lora(["a", "b", None]); use_lora() sets all rows.',
        )

    def routed() -> Active:
        return Active(rows=tuple(None if name is None else state.entry(name) for name in names))

    with state.override(routed, "route_lora"):
        yield model
