"""Which adapters are active on a model: one small object that every adapted layer reads.

Switching, disabling and routing change only this state, so they cost the same whatever the number of layers or
adapters. `set_lora` sets the model's default; `use_lora`, `no_lora` and `route_lora` override it for the current call
chain, through one ContextVar, so that two threads or two asyncio tasks never see each other's choice.

Under `torch.compile` a ContextVar cannot be read inside the graph. There an opaque operator, `hf_lora::active`, reads
it when the graph runs and returns slots and weights as tensors: one graph serves every switch, weight and route.
"""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .errors import LoRANameError, LoRARouteError, LoRAStateError

__all__ = ["NOTHING", "Active", "Entry", "LoRAState", "active_rows", "leave", "routed", "tracing"]

_OVERRIDES: ContextVar[Mapping[int, Active]] = ContextVar("hf_lora_overrides", default=MappingProxyType({}))
_BLOCKS: ContextVar[tuple[Block, ...]] = ContextVar("hf_lora_blocks", default=())  # the open ones, innermost last
_STATES: weakref.WeakValueDictionary[int, LoRAState] = weakref.WeakValueDictionary()
Block = tuple[int, "Active", object]  # the state's uid, what is active in it, and what makes it unlike any other
_UIDS = itertools.count(1)
_COUNTING = threading.Lock()


@dataclass(eq=False)
class Entry:
    """One resident adapter: its name, and the slot that holds its factors in every layer."""

    name: str
    slot: int
    trainable: bool
    invocation: tuple[int, ...] = ()  # the token ids from which on it acts (aLoRA); () for everywhere
    record: Any = field(
        default=None, repr=False
    )  # what the model room keeps of it: config, and the value of a frozen adapter
    alive: bool = True
    users: int = 0  # open use_lora and route_lora blocks that name it, in whatever thread

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "users": 0}  # the blocks are open on the model that this is a copy of

    def check(self) -> Entry:
        """This entry. Raises `LoRAStateError` if the adapter was removed."""
        if not self.alive:
            raise LoRAStateError(
                f"Adapter {self.name!r} was removed while a call was using it.",
                name=self.name,
                remedy="Remove an adapter only when no use_lora() or route_lora() that names it is open.",
            )
        return self


@dataclass(eq=False)
class Active:
    """What is active: a mixture of adapters for all rows, or one adapter (or none) for each row of the batch."""

    mixture: tuple[tuple[Entry, float], ...] = ()
    rows: tuple[Entry | None, ...] | None = None
    entries: tuple[Entry, ...] = field(init=False, repr=False)  # every adapter named, once, in the order of first use
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)  # what the call chain made of it, as tensors
    plans: tuple[dict[Any, Any], dict[Any, Any]] = field(init=False, repr=False)  # of a route, by layer
    uniform: bool = field(init=False, repr=False)  # all rows take the same: nobody needs to know which is which
    maps: Any = field(default=None, repr=False)  # the row maps of the forward that is running (see `rowmaps`)
    invoked: bool = field(init=False, repr=False)  # whether one of them acts only from its invocation on
    reach: Any = field(default=None, repr=False)  # from where on, in this forward or generate (see `activation`)

    def __post_init__(self) -> None:
        named = (e for e, _ in self.mixture) if self.rows is None else (e for e in self.rows if e is not None)
        self.entries = tuple(dict.fromkeys(named))
        self.uniform = self.rows is not None and len(set(self.rows)) == 1
        self.invoked = any(entry.invocation for entry in self.entries)
        # A tensor made under inference_mode cannot take part in autograd later: each mode has its own.
        self.plans = ({}, {})

    def __getstate__(self) -> dict[str, Any]:
        return {"mixture": self.mixture, "rows": self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # what was gathered stays with the model that it was gathered for

    def mapped(self, maps: Any) -> Active:
        """The same with row maps; what was gathered is shared."""
        return self._with(maps, self.reach)

    def reaching(self, reach: Any) -> Active:
        """The same, with from where on each aLoRA acts; what was gathered is shared."""
        return self._with(self.maps, reach)

    def _with(self, maps: Any, reach: Any) -> Active:
        other = Active(self.mixture, self.rows, self.cache, maps, reach)
        other.plans = self.plans
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of the factors that were gathered for a route."""
        plans = [plan for held in self.plans for plan in held.values()]
        return sum(plan.nbytes for plan in plans)


NOTHING = Active()


class LoRAState:
    """The adapters resident on one model and which of them are active."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.default: Active = NOTHING
        self.width = 1  # the widest mixture so far
        self.removals = 0  # adapters taken off so far: what was checked before is checked again after one
        self.merged: Any = None  # the merge's record while the weights hold ΔW
        self.blocks = 0  # open use_lora, no_lora and route_lora blocks, in whatever thread
        self.facts: dict[str, Any] = {}  # what other rooms keep of this model (what trained before, say)
        self.traced: tuple[Tensor, Tensor] | None = None  # while tracing: what a checkpointed region was entered with
        self.traced_reach: Any = None  # while tracing: from where on the aLoRAs act in this forward
        self.reach_width = 0  # slots that may hold an aLoRA, and one for all others
        self._register()

    def _register(self) -> None:
        self.uid = next(_UIDS)
        self.lock = threading.RLock()  # held while adapters are put, removed or merged; reading needs none
        _STATES[self.uid] = self

    # A copy of a model (deepcopy, pickle, torch.save) is another model: same adapters, its own state.
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("uid", "lock", "traced", "traced_reach", "blocks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, traced=None, traced_reach=None, blocks=0)
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

    @staticmethod
    def current_of(uid: int) -> Active:
        """What is active in this call chain on the model with this state."""
        state = _STATES.get(uid)
        return NOTHING if state is None else state.current

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

    def require_unmerged(self, verb: str, remedy: str = "Call unmerge_lora() first.") -> None:
        """Raise `LoRAStateError` while the weights hold a merged adapter."""
        if self.merged is not None:
            raise LoRAStateError(
                f"{verb}() cannot be used while an adapter is merged into the weights.",
                name=verb,
                remedy=remedy,
            )

    def close(self, verb: str, merged: Any) -> None:
        """From now on the weights are not the base's, so that no block can open; raises if one is open."""
        with _COUNTING:
            if self.blocks:
                raise LoRAStateError(
                    f"{verb}() cannot be used inside use_lora(), no_lora() or route_lora(), or while another thread "
                    "is inside one: what it runs would have the merged weights.",
                    name=verb,
                    value=self.blocks,
                    remedy="Leave every such with block first, in every thread.",
                )
            self.merged = merged

    def free_slot(self) -> int:
        """The lowest slot that no adapter holds."""
        taken = {entry.slot for entry in self.entries.values()}
        return next(i for i in itertools.count() if i not in taken)

    def widen(self, active: Active) -> None:
        """Let a compiled training graph hold this mixture; wider than any before costs it one recompilation."""
        self.width = max(self.width, len(active.mixture))

    def choose(self, make: Callable[[], Active], verb: str) -> None:
        """Let what `make` gives be the default. No adapter of it can go in between."""
        with _COUNTING:
            self.require_unmerged(verb)
            active = make()
            self.widen(active)
            self.default = active

    @contextmanager
    def override(self, active: Active | Callable[[], Active], verb: str | None = None) -> Iterator[None]:
        """Make `active` what the current call chain sees, until the block ends (also by an exception).

        Args:
            active: it, or what makes it: no adapter can then go before the block is open.
            verb: who opens the block; it is refused while merged.
        """
        with _COUNTING:
            if verb is not None:
                self.require_unmerged(verb)
            if not isinstance(active, Active):
                active = active()
            self.widen(active)
            entries = active.entries
            for entry in entries:
                entry.check()
            for entry in entries:
                entry.users += 1
            self.blocks += 1
        mine = self.enter(active)
        try:
            yield
            if all(block is not mine for block in _BLOCKS.get()):
                raise LoRAStateError(
                    "A use_lora(), no_lora() or route_lora() block was left in another context than it was entered in: "
                    "what ran meanwhile in other threads or tasks did not see it.",
                    remedy="Do not yield inside the block where others run the generator: enter it around each call, "
                    "or run all of it in one context (contextvars.copy_context()).",
                )
        finally:
            leave(mine)
            with _COUNTING:
                for entry in entries:
                    entry.users -= 1
                self.blocks -= 1

    def enter(self, active: Active) -> Block:
        """Open a block: `active` is what the current call chain sees until `leave`."""
        mine = (self.uid, active, object())
        _see((*_BLOCKS.get(), mine))
        return mine

    def require_unused(self, verb: str, entries: Iterable[Entry]) -> None:
        """Raise `LoRAStateError` if an open block, in any thread, names one of the adapters."""
        used = [entry.name for entry in entries if entry.users]
        if used:
            raise LoRAStateError(
                f"{verb}() cannot be used on {', '.join(map(repr, used))} while a use_lora() or route_lora() names it.",
                name=used[0],
                value=used,
                remedy="Leave every such with block first, in every thread.",
            )

    @contextmanager
    def unused(self, verb: str, entries: Iterable[Entry]) -> Iterator[None]:
        """While the (short) block runs no other opens that names one of the adapters; raises if one is open."""
        with _COUNTING:
            self.require_unused(verb, entries)
            yield

    def retire(self, verb: str, entries: Collection[Entry], successor: Entry | None = None) -> None:
        """Take adapters off the list, so that no block can name them; raises if one does. Layers still hold them.

        Args:
            successor: takes the name of the one adapter, and its place in what is active by default.
        """
        with self.unused(verb, entries):
            if successor is None:
                self.entries = {name: entry for name, entry in self.entries.items() if entry not in entries}
            else:
                self.entries = {**self.entries, successor.name: successor}
            self.removals += len(entries)
            for entry in entries:
                entry.alive = False
            if set(entries) & set(self.default.entries):
                pairs = [(successor if entry in entries else entry, weight) for entry, weight in self.default.mixture]
                left = tuple((entry, weight) for entry, weight in pairs if entry is not None)
                self.default = Active(left) if left else NOTHING

    def pinned(self) -> LoRAState:
        """A state of the same adapters whose default is what is active now: for a replica that runs on another thread.

        Raises:
            LoRARouteError: a route is active; its rows would have to be split as the batch is.
        """
        active = self.current
        if active.rows is not None:
            raise LoRARouteError(
                "A route cannot be used with DataParallel, which splits the rows over devices.",
                value=len(active.rows),
                remedy="Run the rows of each adapter as a batch of their own with use_lora(), or route on one device.",
            )
        if active.invoked:
            raise LoRARouteError(
                "An aLoRA cannot be used with DataParallel: its replicas do not see where it was invoked.",
                name="alora_invocation_tokens",
                remedy="Use DistributedDataParallel, or one device.",
            )
        state = copy.copy(self)
        state.default = active
        return state

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, run under what is active now, whenever and on whatever thread it is called."""
        active = self.current

        def bound(*args: Any, **kwargs: Any) -> Any:
            with self.override(active):  # raises if an adapter was removed since
                return function(*args, **kwargs)

        return bound


def leave(mine: Block) -> None:
    """Close a block that was entered here."""
    # Not ContextVar.reset: a generator that is closed late would take away blocks opened after its own.
    _see(tuple(block for block in _BLOCKS.get() if block is not mine))


def _see(blocks: tuple[Block, ...]) -> None:
    """Make these the open blocks of the current call chain."""
    _BLOCKS.set(blocks)
    _OVERRIDES.set(MappingProxyType({uid: active for uid, active, _ in blocks}))


def routed() -> list[LoRAState]:
    """The states of which a route is active in this call chain."""
    uids = [uid for uid, active in _OVERRIDES.get().items() if active.rows is not None]
    return [state for uid in uids if (state := _STATES.get(uid)) is not None]


def tracing() -> bool:
    """Whether this code is being compiled. In what torch.export makes, what is active is fixed, as in eager code."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


@torch.library.custom_op("hf_lora::active", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _active_op(x: Tensor, uid: int, width: int, row_map: str) -> tuple[Tensor, Tensor]:
    active = LoRAState.current_of(uid)
    flat = row_map == "flat"
    for entry in active.entries:
        entry.check()
    if row_map not in ("batch", "flat") and len(set(active.rows or ())) > 1:
        refuse_inner()
    key = ("rows", x.shape[0], x.device, width, row_map)
    if key not in active.cache:
        if active.rows is None:
            pairs = [[(e.slot, w) for e, w in active.mixture]] * x.shape[0]
        else:
            rows = active.rows if row_map in ("batch", "flat") else active.rows[:1] * x.shape[0]  # the same for all
            each = x.shape[0] // len(rows) if flat else 1  # (B·T, d) has T rows for each of the batch
            check_rows(rows, x.shape[0] / max(each, 1))
            pairs = [[] if e is None else [(e.slot, 1.0)] for e in rows for _ in range(each)]
        columns = width or max(len(active.mixture), 1)
        pairs = [row + [(0, 0.0)] * (columns - len(row)) for row in pairs]
        slots = torch.tensor([[s for s, _ in row] for row in pairs], dtype=torch.int64, device=x.device)
        weights = torch.tensor([[w for _, w in row] for row in pairs], dtype=torch.float32, device=x.device)
        active.cache[key] = (slots.view(x.shape[0], columns), weights.view(x.shape[0], columns))
    slots, weights = active.cache[key]
    return slots.clone(), weights.clone()  # an operator's outputs may not alias what it keeps


@_active_op.register_fake
def _(x: Tensor, uid: int, width: int, row_map: str) -> tuple[Tensor, Tensor]:
    columns = width or torch.library.get_ctx().new_dynamic_size(min=1)
    return x.new_empty((x.shape[0], columns), dtype=torch.int64), x.new_empty(
        (x.shape[0], columns), dtype=torch.float32
    )


@torch.compiler.assume_constant_result
def _learns_sizes() -> bool:
    """Whether the graph being traced may have sizes that an operator gives when it runs: dynamo asks for fullgraph."""
    tracing = torch._guards.TracingContext.try_get()
    shapes = getattr(getattr(tracing, "fake_mode", None), "shape_env", None)
    return bool(getattr(shapes, "allow_dynamic_output_shape_ops", False))


def active_rows(x: Tensor, state: LoRAState, row_map: str = "batch") -> tuple[Tensor, Tensor]:
    """What is active when the graph runs: slots (N, K) int64 and weights (N, K) float32, N the rows of `x`.

    `row_map`: "flat" where x is (B·T, d), the rows of the batch one after another; another than this and "batch" where
    a route is refused that is not the same for all rows.

    K is the number of adapters mixed; a row without adapter has slot 0 and weight 0. With fullgraph=True and without
    gradients K is a size that the graph learns when it runs. Otherwise it is the widest mixture this model has seen:
    inductor cannot save for backward a size that depends on the data, and without fullgraph such a size ends the graph.
    """
    learns = not torch.is_grad_enabled() and _learns_sizes()
    pair: tuple[Tensor, Tensor] = _active_op(x.detach(), state.uid, 0 if learns else state.width, row_map)
    return pair


def refuse_inner() -> None:
    """Raise `LoRARouteError`: a route has met a layer whose batch is not the rows."""
    raise LoRARouteError(
        "A routed adapter has factors in a layer whose batch is not the rows of the input (a vision tower, an expert, "
        "positions), and no row map is known for this architecture.",
        remedy="Run the rows of each adapter as a batch of their own, with use_lora().",
    )


def check_rows(rows: tuple[Entry | None, ...], batch: float) -> None:
    """Raise `LoRARouteError` unless the route has one entry for each row of the batch."""
    if len(rows) != batch:
        raise LoRARouteError(
            f"The route names {len(rows)} rows, but the batch has {batch:g}.",
            value=len(rows),
            expected=batch,
            remedy="Name one adapter (or None) for each row of the batch, in its order.",
        )
