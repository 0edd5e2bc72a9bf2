"""`generate` under a route: rows are counted before anything runs, and what is made of a row goes where the row goes.

Beams and several sequences for each prompt make n·k rows of n, once inside `generate`: until then (the encoder) the
route is the user's, from then on each entry stands k times. No size is guessed: what counts is the k that
`_expand_inputs_for_generation` is called with. The route is the user's again when `generate` ends. Where an aLoRA
begins is found in the prompt, once, and holds for every step; what the model writes is not looked through.

Continuous batching runs on a thread of its own, which sees what was active where its manager was made; it packs
several requests into one row, so that a route is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torch import nn

from ..activation import OFFSETS, Starts, starts_of, state_at
from ..errors import LoRARouteError, LoRAStateError
from ..expertlayers import banks_of
from ..layers import LoRAHead
from ..model import state_of
from ..routing import batch_of
from ..state import Active, LoRAState, check_rows, routed
from ..switching import described
from .importing import when_imported
from .patching import Registry

__all__ = ["install", "prepare"]

_EXPAND = "_expand_inputs_for_generation"
_CHOSEN = "_lora_chosen"  # on a manager of continuous batching: what it generates with

Method = Callable[..., Any]


class _Call:
    """One call of `generate` under routes."""

    def __init__(self, states: list[LoRAState], stack: ExitStack) -> None:
        self.states, self.stack, self.expanding = states, stack, False

    def expand(self, size: int) -> None:
        """From here to the end of the call each row stands `size` times, one after another."""
        for state in self.states:
            route = expanded = state.current
            if route.rows is not None:
                key = ("expanded", size)
                if key not in route.cache:  # what it gathers serves the next call too
                    route.cache[key] = Active(rows=tuple(row for row in route.rows for _ in range(size)))
                expanded = route.cache[key]
            if isinstance(route.reach, Starts):
                expanded = expanded.reaching(route.reach.repeated(size))
            self.stack.enter_context(state.override(expanded))


_CALL: ContextVar[_Call | None] = ContextVar("hf_lora_generate", default=None)
_REGISTRIES: list[Registry] = []


def install(registry: Registry) -> None:
    """Wrap `generate` and continuous batching once they are imported; neither is imported here."""
    _REGISTRIES[:] = [registry]
    when_imported("transformers.generation.utils", lambda module: _wrap(registry, module.GenerationMixin))
    name = "transformers.generation.continuous_batching.continuous_api"
    when_imported(name, lambda module: _wrap_batching(registry, module))


def prepare(model: nn.Module) -> None:
    """Before a route: wrap what the model's own class overrides of `generate`, as Whisper's and BLIP's do."""
    for registry in _REGISTRIES:
        _wrap(registry, type(model))


def _wrap(registry: Registry, cls: type) -> None:
    for name, wrapper in _GENERATING.items():
        owner = next((c for c in cls.__mro__ if name in vars(c)), None)
        if owner is None or registry.is_set(owner, name):
            continue
        stock = vars(owner)[name]
        if isinstance(stock, staticmethod):  # before transformers 5.2 or so
            registry.set(owner, name, staticmethod(wrapper(stock.__func__)))
        elif inspect.isfunction(stock):
            registry.set(owner, name, wrapper(stock))


def _generate(stock: Method) -> Method:
    @functools.wraps(stock)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        states, told = _among(routed(), self), state_at(self)
        invoked = told is not None and told.current.invoked and told.current.reach is None  # else a generate within one
        if not states and not invoked and _CALL.get() is None:
            return stock(self, *args, **kwargs)
        batch = batch_of(self, args[0] if args else kwargs.get("inputs"), kwargs)
        if batch is not None:
            for state in states:
                check_rows(state.current.rows or (), batch)
        with ExitStack() as stack:
            if told is not None and invoked:
                starts = starts_of(told.current, args[0] if args else None, kwargs)
                kwargs.pop(OFFSETS, None)
                stack.enter_context(told.override(told.current.reaching(starts)))
                states = [*states, told] if told not in states else states
            token = _CALL.set(_Call(states, stack))
            stack.callback(_CALL.reset, token)
            return stock(self, *args, **kwargs)

    return generate


def _expand(stock: Method) -> Method:
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def expand(*args: Any, **kwargs: Any) -> Any:
        call = _CALL.get()
        if call is None or call.expanding:  # a class's own may call the inherited one
            return stock(*args, **kwargs)
        call.expanding = True
        try:
            result = stock(*args, **kwargs)
        finally:
            call.expanding = False
        size = signature.bind(*args, **kwargs).arguments.get("expand_size", 1)
        if size != 1:
            call.expand(size)
        return result

    return expand


def _transcribe(stock: Method) -> Method:
    """Whisper's loop over chunks of audio: a chunk's batch is of the rows that still have audio."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def generate_with_fallback(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = _among(routed(), self)
        if not states:
            return stock(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        left, temperatures = list(given["batch_idx_map"]), given["temperatures"]
        if len(temperatures) > 1:
            raise LoRARouteError(
                "Whisper's temperature fallback generates some rows again without saying which, so that a route does "
                "not know them.",
                value=tuple(temperatures),
                remedy="Give one temperature, or run the rows of each adapter as a batch of their own with use_lora().",
            )
        padded = getattr(given["generation_config"], "cache_implementation", None) == "static"
        with ExitStack() as stack:
            for state in states:
                rows = state.current.rows or ()
                if max(left) >= len(rows):  # num_return_sequences, which Whisper expands itself
                    check_rows(rows, len(left))
                spare = len(rows) - len(left) if padded else 0
                chunk = Active(rows=(*(rows[i] for i in left), *[None] * spare))
                stack.enter_context(state.override(chunk))
            return stock(self, *args, **kwargs)

    return generate_with_fallback


_GENERATING: dict[str, Callable[[Method], Method]] = {
    "generate": _generate,
    _EXPAND: _expand,
    "generate_with_fallback": _transcribe,
}


def _among(states: list[LoRAState], model: nn.Module) -> list[LoRAState]:
    """Those of the states that the model, or a layer in it, has: BLIP's text decoder generates for the whole."""
    if not states:
        return []
    if (own := state_of(model)) is not None:
        return [state for state in states if state is own]
    held = {id(bank.state) for m in model.modules() for bank in banks_of(m)}
    held |= {id(m.lora_heads.state) for m in model.modules() if isinstance(m, LoRAHead)}
    return [state for state in states if id(state) in held]


# ---- continuous batching ---------------------------------------------------------------------------------------------


def _wrap_batching(registry: Registry, module: ModuleType) -> None:
    manager = module.ContinuousBatchingManager
    for name, wrapper in _BATCHING.items():
        stock = vars(manager).get(name)
        if stock is not None:  # an older one has no warmup; a contract test says what the tested one has
            registry.set(manager, name, functools.wraps(stock)(wrapper(stock)))


def _made(stock: Method) -> Method:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        state = state_of(self.model)
        if state is not None and state.current.invoked:
            raise LoRAStateError(
                "An aLoRA cannot be used with continuous batching, which packs the tokens of several requests into one "
                "row.",
                name="alora_invocation_tokens",
                remedy="Use generate(), which takes rows with and without an aLoRA in one batch under route_lora().",
            )
        if state is not None and state.current.rows is not None:
            raise LoRARouteError(
                "A route cannot be used with continuous batching, which packs the tokens of several requests into one "
                "row.",
                value=len(state.current.rows),
                remedy="Use generate() under the route, or use_lora() around generate_batch() for each adapter.",
            )
        self.__dict__[_CHOSEN] = None if state is None else state.current

    return __init__


def _same(stock: Method) -> Method:
    """What is active here has to be what the manager generates with."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        state, chosen = state_of(self.model), self.__dict__.get(_CHOSEN)
        here = None if state is None else described(state.current)
        theirs = None if chosen is None else described(chosen)
        if here != theirs:
            raise LoRAStateError(
                f"This manager of continuous batching generates with {theirs!r}, and here {here!r} is active.",
                value=here,
                expected=theirs,
                remedy="Make a manager for each adapter, inside its use_lora() (after "
                "destroy_cached_continuous_batching_manager(), if one was kept).",
            )
        return stock(self, *args, **kwargs)

    return method


def _under(stock: Method) -> Method:
    """Run under what the manager generates with, on whatever thread."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        state, chosen = state_of(self.model), self.__dict__.get(_CHOSEN)
        if state is None or chosen is None:
            return stock(self, *args, **kwargs)
        with state.override(chosen):
            return stock(self, *args, **kwargs)

    return method


_BATCHING: dict[str, Callable[[Method], Method]] = {
    "__init__": _made,
    "start": _same,
    "add_request": _same,
    "warmup": _under,
    "_run_generation_loop": _under,
}
