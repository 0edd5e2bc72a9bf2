"""What a model holds beside its adapters: their state, and hooks that come with the first and go with the last."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .activation import unhook_activation
from .config import LoRAConfig
from .errors import LoRARouteError, LoRAStateError
from .facts import RunFacts
from .layerinfo import modules_of
from .preparing import unprepare
from .quantised import hold_still, let_go
from .replication import restore_layers
from .routing import batch_of
from .rowmaps import hook_row_maps, unhook_row_maps
from .state import LoRAState, check_rows, tracing
from .values import AdapterValue

__all__ = ["Resident", "attach", "detach", "exclusive", "require", "state_of"]

_STATE = "_lora_state"
_FIRST = threading.RLock()  # held while a model gets its first adapter: it has no lock of its own yet
_UNSYNCED = "_ddp_params_and_buffers_to_ignore"  # DistributedDataParallel's own name


class _Unsynced:
    """Names of what DDP leaves alone: the frozen banks, which it would otherwise broadcast in every forward."""

    def __init__(self, model: nn.Module, others: tuple[str, ...]) -> None:
        self.model, self.others = model, others

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        yield from (name for name, _ in self.model.named_buffers() if ".lora_slots." in f".{name}")


@dataclass
class Resident:
    """What the model keeps of one adapter beside its factors in the layers."""

    config: LoRAConfig
    layers: tuple[str, ...]  # paths of layers with factors
    biases: tuple[str, ...]  # paths of parameters
    heads: tuple[str, ...]  # paths of modules trained whole
    experts: tuple[str, ...] = ()  # paths of modules with pairs of their 3-D parameters' experts
    value: AdapterValue | None = None  # a frozen adapter as it came, unless the banks hold every bit of it
    skipped: tuple[str, ...] = ()  # what targeting left out, for the summary
    architecture: str | None = ""  # whose table gave the roles; None: told from structure; "": loaded, roles not needed
    run: RunFacts | None = None  # how it was trained, for its card

    @property
    def whole(self) -> bool:
        """Whether it replaces something (a head, a bias) rather than only adding to it."""
        return bool(self.biases or self.heads)


def state_of(model: nn.Module) -> LoRAState | None:
    """The model's adapters, or None if it has none."""
    state = model.__dict__.get(_STATE)
    return state if isinstance(state, LoRAState) else None


def require(model: nn.Module) -> LoRAState:
    """The model's adapters. Raises `LoRAStateError` if it has none."""
    state = state_of(model)
    if state is None:
        raise LoRAStateError(
            f"This {type(model).__name__} has no LoRA.", remedy="Call add_lora() or load_lora() first."
        )
    return state


@contextlib.contextmanager
def exclusive(model: nn.Module) -> Iterator[LoRAState | None]:
    """The state, which no other thread changes meanwhile; None where the model has none, and gets none from another."""
    while True:
        state = state_of(model)
        with _FIRST if state is None else state.lock:
            if state_of(model) is state:  # its last adapter may just have gone, or its first have come
                yield state
                return


def attach(model: nn.Module) -> LoRAState:
    """Give the model a state and freeze its base."""
    state = LoRAState()
    trained, seen = [], set[int]()
    for path, module in modules_of(model).items():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                trained.append(f"{path}.{name}" if path else name)
                parameter.requires_grad_(False)
    state.facts["trained"] = trained
    hold_still(model)
    setattr(model, _STATE, state)
    setattr(model, _UNSYNCED, _Unsynced(model, tuple(getattr(model, _UNSYNCED, ()))))
    model.register_forward_pre_hook(_check_batch, with_kwargs=True)
    hook_row_maps(model, state)
    return state


def _check_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a batch that a route does not fit before anything runs; a layer may see a size that happens to divide."""
    state = None if tracing() else state_of(model)
    rows = None if state is None else state.current.rows
    if rows is None:
        return
    if torch.compiler.is_exporting():
        raise LoRARouteError(
            "A route cannot be exported: an exported program keeps what is active for good, whatever its batch.",
            value=len(rows),
            remedy="Export under use_lora() of one adapter.",
        )
    batch = batch_of(model, args[0] if args else None, kwargs)
    if batch is not None:
        check_rows(rows, batch)


def detach(model: nn.Module, state: LoRAState) -> None:
    """The model as it was before its first adapter."""
    trained = set(state.facts["trained"])
    for path, parameter in model.named_parameters():
        if path in trained:
            parameter.requires_grad_(True)
    delattr(model, _STATE)
    let_go(model)
    unprepare(model)
    unsynced = model.__dict__.pop(_UNSYNCED, None)
    if isinstance(unsynced, _Unsynced) and unsynced.others:
        setattr(model, _UNSYNCED, unsynced.others)
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _check_batch]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    unhook_row_maps(model)
    restore_layers(model)
    unhook_activation(model)
