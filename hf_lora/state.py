"""Which adapters are active on a model: one small object that every adapted layer reads.

Switching, disabling and routing change only this state, so they cost the same whatever the number of layers or
adapters. `set_lora` sets the model's default; `use_lora`, `no_lora` and `route_lora` override it for the current call
chain, through one ContextVar, so that two threads or two asyncio tasks never see each other's choice.

Under `torch.compile` a ContextVar cannot be read inside the graph. There an opaque operator, `hf_lora::active`, reads
it when the graph runs and returns slots and weights as tensors: one graph serves every switch, weight and route.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .errors import LoRANameError, LoRARouteError, LoRAStateError

__all__ = ["NOTHING", "Active", "Entry", "LoRAState", "active_rows"]

_OVERRIDES: ContextVar[Mapping[int, Active]] = ContextVar("hf_lora_overrides", default=MappingProxyType({}))
_STATES: weakref.WeakValueDictionary[int, LoRAState] = weakref.WeakValueDictionary()
_UIDS = itertools.count(1)


@dataclass(eq=False)
class Entry:
    """One resident adapter: its name, and the slot that holds its factors in every layer."""

    name: str
    slot: int
    trainable: bool
    record: Any = field(
        default=None, repr=False
    )  # what the model room keeps of it: config, and the value of a frozen adapter
    alive: bool = True

    def check(self) -> Entry:
        """This entry. Raises `LoRAStateError` if the adapter was removed."""
        if not self.alive:
            raise LoRAStateError(
                f"Adapter {self.name!r} was removed while a call was using it.",
                name=self.name,
                remedy="Remove an adapter only when no use_lora() or route_lora() that names it is open.",
            )
        return self


@dataclass(frozen=True, eq=False)
class Active:
    """What is active: a mixture of adapters for all rows, or one adapter (or none) for each row of the batch."""

    mixture: tuple[tuple[Entry, float], ...] = ()
    rows: tuple[Entry | None, ...] | None = None
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)  # gathered factors of this route, per layer

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every adapter named, once, in the order of first use."""
        named = (e for e, _ in self.mixture) if self.rows is None else (e for e in self.rows if e is not None)
        return tuple(dict.fromkeys(named))

    def __getstate__(self) -> dict[str, Any]:
        return {"mixture": self.mixture, "rows": self.rows, "cache": {}}


NOTHING = Active()


class LoRAState:
    """The adapters resident on one model and which of them are active."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.default: Active = NOTHING
        self.width = 1  # the widest mixture so far
        self.merged: Any = None  # the merge's record while the weights hold ΔW
        self.facts: dict[str, Any] = {}  # what the model room knows of the model (architecture, layers' paths)
        self.traced: tuple[Tensor, Tensor] | None = None  # while tracing: what a checkpointed region was entered with
        self._register()

    def _register(self) -> None:
        self.uid = next(_UIDS)
        self.lock = threading.RLock()  # held while adapters are put, removed or merged; reading needs none
        _STATES[self.uid] = self

    # A copy of a model (deepcopy, pickle, torch.save) is another model: same adapters, its own state.
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("uid", "lock", "traced")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, traced=None)
        self._register()

    @property
    def current(self) -> Active:
        """What is active in this call chain."""
        if self.merged is not None:
            return NOTHING
        return _OVERRIDES.get().get(self.uid, self.default)

    @property
    def overridden(self) -> bool:
        """Whether a `use_lora`, `no_lora` or `route_lora` is open in this call chain."""
        return self.uid in _OVERRIDES.get()

    def entry(self, name: str) -> Entry:
        """The adapter of this name. Raises `LoRANameError`."""
        try:
            return self.entries[name]
        except (KeyError, TypeError):
            known = ", ".join(map(repr, self.entries)) or "none"
            raise LoRANameError(
                f"No adapter {name!r} on this model. Resident: {known}.",
                name=str(name),
                value=name,
                expected=tuple(self.entries),
                remedy="load_lora() or add_lora() puts one on the model.",
            ) from None

    def require_unmerged(self, verb: str) -> None:
        """Raise `LoRAStateError` while the weights hold a merged adapter."""
        if self.merged is not None:
            raise LoRAStateError(
                f"{verb}() cannot be used while an adapter is merged into the weights.",
                name=verb,
                remedy="Call unmerge_lora() first.",
            )

    def free_slot(self) -> int:
        """The lowest slot that no adapter holds."""
        taken = {entry.slot for entry in self.entries.values()}
        return next(i for i in itertools.count() if i not in taken)

    def widen(self, active: Active) -> None:
        """Let a compiled training graph hold this mixture; wider than any before costs it one recompilation."""
        self.width = max(self.width, len(active.mixture))

    @contextmanager
    def override(self, active: Active) -> Iterator[None]:
        """Make `active` what the current call chain sees, until the block ends (also by an exception)."""
        self.widen(active)
        token = _OVERRIDES.set(MappingProxyType({**_OVERRIDES.get(), self.uid: active}))
        try:
            yield
        finally:
            _OVERRIDES.reset(token)

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, run under what is active now, whenever and on whatever thread it is called."""
        active = self.current

        def bound(*args: Any, **kwargs: Any) -> Any:
            with self.override(active):
                return function(*args, **kwargs)

        return bound


@torch.library.custom_op("hf_lora::active", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _active_op(x: Tensor, uid: int, width: int, flat: bool) -> tuple[Tensor, Tensor]:
    state = _STATES.get(uid)
    active = NOTHING if state is None else state.current
    key = ("rows", x.shape[0], x.device, width, flat)
    if key not in active.cache:
        if active.rows is None:
            pairs = [[(e.check().slot, w) for e, w in active.mixture]] * x.shape[0]
        else:
            each = x.shape[0] // len(active.rows) if flat else 1  # (B·T, d) has T rows for each of the batch
            check_rows(active.rows, x.shape[0] / max(each, 1))
            pairs = [[] if e is None else [(e.check().slot, 1.0)] for e in active.rows for _ in range(each)]
        columns = width or max(len(active.mixture), 1)
        pairs = [row + [(0, 0.0)] * (columns - len(row)) for row in pairs]
        slots = torch.tensor([[s for s, _ in row] for row in pairs], dtype=torch.int64, device=x.device)
        weights = torch.tensor([[w for _, w in row] for row in pairs], dtype=torch.float32, device=x.device)
        active.cache[key] = (slots.view(x.shape[0], columns), weights.view(x.shape[0], columns))
    slots, weights = active.cache[key]
    return slots.clone(), weights.clone()  # an operator's outputs may not alias what it keeps


@_active_op.register_fake
def _(x: Tensor, uid: int, width: int, flat: bool) -> tuple[Tensor, Tensor]:
    columns = width or torch.library.get_ctx().new_dynamic_size(min=1)
    return x.new_empty((x.shape[0], columns), dtype=torch.int64), x.new_empty(
        (x.shape[0], columns), dtype=torch.float32
    )


def active_rows(x: Tensor, state: LoRAState, *, flat: bool = False) -> tuple[Tensor, Tensor]:
    """What is active when the graph runs: slots (N, K) int64 and weights (N, K) float32, N the rows of `x`.

    `flat`: x is (B·T, d), the rows of the batch one after another.

    K is the number of adapters mixed; a row without adapter has slot 0 and weight 0. Without gradients K is a size that
    the graph learns when it runs. With them it is the widest mixture this model has seen: inductor cannot save for
    backward a size that depends on the data.
    """
    pair: tuple[Tensor, Tensor] = _active_op(x.detach(), state.uid, state.width if torch.is_grad_enabled() else 0, flat)
    return pair


def check_rows(rows: tuple[Entry | None, ...], batch: float) -> None:
    """Raise `LoRARouteError` unless the route has one entry for each row of the batch."""
    if len(rows) != batch:
        raise LoRARouteError(
            f"The route names {len(rows)} rows, but the layer's input has {batch:g}.",
            value=len(rows),
            expected=batch,
            remedy="Name one adapter (or None) for each row of the batch, in its order.",
        )
