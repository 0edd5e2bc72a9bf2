"""Inner batches: the row of the user's batch that an image, a patch, a sound or an expert's token belongs to.

A vision tower runs once on the images of all rows, an expert on the tokens that were sent to it. Whose they are follows
from what the model's forward was given (the placeholders in `input_ids`, grids, sizes), or the experts' forward. A hook
reads it there, if a route has factors inside, before anything runs, and forgets it when the call ends, by an exception
too. Which part of which architecture is mapped how is data (`architectures.ROW_MAPS`, `architectures.EXPERT_LISTS`); a
size that happens to fit is never taken for a map.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import architectures as arch
from .layerinfo import modules_of, unhook
from .routing import batch_of
from .rowsources import MAPPED, Rows, has_experts, read, refuse
from .state import Active, Block, Entry, LoRAState, check_rows, leave, refuse_inner, routed, tracing

__all__ = ["argument_names", "hook_row_maps", "inner_rows", "picked", "told", "unhook_row_maps"]


@dataclass(eq=False)
class _Call:
    """The row maps of one running forward."""

    module: nn.Module
    maps: Mapping[str, tuple[Rows, ...]]
    outer: Any = None  # the maps of the forward around this one
    block: Block | None = None

    def find(self, name: str) -> tuple[Rows, ...] | None:
        found = self.maps.get(name)
        return self.outer.find(name) if found is None and self.outer is not None else found


def inner_rows(active: Active, x: Tensor, row_map: str) -> tuple[Rows, int]:
    """The rows of a layer's inner batch, and the dimension of `x` that they are of.

    Raises:
        LoRARouteError: no map is known, the layer runs outside the forward that has one, or none fits its size.
    """
    call = active.maps
    found = call.find(row_map) if isinstance(call, _Call) else None
    if not row_map.startswith(MAPPED):
        refuse_inner()
    if found is None:
        refuse("a layer of a part that takes rows through a row map runs outside the model's own forward")
    fitting = [(rows, axis) for rows in found if (axis := rows.axis(x)) is not None]
    if not fitting:
        sizes = sorted({len(rows.index) for rows in found})
        refuse(f"a layer's batch is {tuple(x.shape)}, and what the row map knows of has {sizes or 'no'} entries")
    if any(not torch.equal(rows.index, fitting[0][0].index) or axis != fitting[0][1] for rows, axis in fitting[1:]):
        refuse(f"a layer's batch of {len(fitting[0][0].index)} may be two different things (images and videos, say)")
    return fitting[0]


def picked(active: Active, entry: Entry, rows: Rows, device: torch.device) -> Tensor:
    """Which entries of the inner batch are of the adapter's rows, (n,) int64."""
    key = (entry, device)
    if key not in rows.picked:
        mine = torch.tensor([row is entry for row in active.rows or ()])
        rows.picked[key] = mine[rows.index].nonzero().flatten().to(device)
    return rows.picked[key]


# ---- hooks -----------------------------------------------------------------------------------------------------------


class _Hook:
    """Reads the row maps of one module's forward from its arguments."""

    def __init__(self, state: LoRAState) -> None:
        self.state = state

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not tracing() and self.state.current.rows is not None:
            of: Any = type(module)
            self.enter(module, {**kwargs, **dict(zip(argument_names(of), args, strict=False))})

    def enter(self, module: nn.Module, given: Mapping[str, Any]) -> None:
        """Read the maps that the route needs in the module."""
        active = self.state.current
        if active.rows is None or active.uniform:
            return
        key = ("mapped", module)
        if key not in active.cache:
            active.cache[key] = _wanted(module, active)
        wanted: frozenset[str] = active.cache[key]
        maps = read(module, given, len(active.rows), wanted) if wanted else {}
        if any(maps.values()):
            call = _Call(module, maps, active.maps)
            call.block = self.state.enter(active.mapped(call))

    def check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a batch that the route does not fit before anything runs: generate() calls an encoder by itself."""
        rows = None if tracing() else self.state.current.rows
        batch = None if rows is None else batch_of(module, args[0] if args else None, kwargs)
        if rows is not None and batch is not None:
            check_rows(rows, batch)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not tracing():
            self.leave(module)

    def leave(self, module: nn.Module) -> None:
        """Forget the maps again."""
        call = self.state.current.maps
        if isinstance(call, _Call) and call.module is module and call.block is not None:
            leave(call.block)


@contextmanager
def told(model: nn.Module, given: Mapping[str, Any]) -> Iterator[None]:
    """Within the block parts of the model may run by themselves: `given` is what its forward would be given."""
    hooks = list(_hooked(model)) if routed() else []
    with ExitStack() as stack:
        for module, hook in hooks:
            hook.enter(module, given)
            stack.callback(hook.leave, module)
        yield


def _hooked(model: nn.Module) -> Iterator[tuple[nn.Module, _Hook]]:
    for module in model.modules():
        if type(module).__name__ not in arch.EXPERT_LISTS:
            for function in module._forward_pre_hooks.values():
                hook = getattr(function, "__self__", None)
                if isinstance(hook, _Hook) and function == hook.before:
                    yield module, hook


@functools.lru_cache(maxsize=256)
def argument_names(of: Any) -> list[str]:
    """Names of the forward's positional arguments."""
    return list(inspect.signature(of.forward).parameters)[1:]


def _wanted(module: nn.Module, active: Active) -> frozenset[str]:
    """The maps that the route needs inside a module: those of layers in which it has factors, or a copy."""
    slots = {entry.slot for entry in active.entries}
    found = set()
    for held in module.modules():
        row_map = getattr(held, "row_map", "")
        if isinstance(row_map, str) and row_map.startswith(MAPPED):
            have: Iterable[Any] = getattr(held, "slots", None) or getattr(held, "copies", None) or ()
            if not slots.isdisjoint(map(int, have)):
                found.add(row_map)
    return frozenset(found)


def hook_row_maps(model: nn.Module, state: LoRAState) -> None:
    """Hook every part of a model whose arguments tell the rows of an inner batch, and its encoder."""
    hook = _Hook(state)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = getattr(model, "get_encoder", lambda: None)()
        if isinstance(encoder, nn.Module) and encoder is not model:
            encoder.register_forward_pre_hook(hook.check, with_kwargs=True)
    for module in [m for m in dict.fromkeys(modules_of(model).values()) if _is_told(m)]:
        module.register_forward_pre_hook(hook.before, with_kwargs=True)
        module.register_forward_hook(hook.after, always_call=True)


def unhook_row_maps(model: nn.Module) -> None:
    """Take the hooks away again."""
    unhook(model, _Hook)


def _is_told(module: nn.Module) -> bool:
    if type(module).__name__ in arch.EXPERT_LISTS or has_experts(module):
        return True
    model_type = getattr(vars(module).get("config"), "model_type", None)
    return model_type in arch.ROW_MAPS and hasattr(module, "base_model_prefix")
