"""aLoRA: an adapter that acts from its invocation on; before it each layer is the base's, bit for bit.

    h_t = x_t W^T + [t ≥ t₀] · s · x_t A^T B^T        t₀: the first token of the last invocation in the row

(Greenewald et al., 2025, arXiv:2504.12397.) So the base's cache of what stands before t₀ is the adapter's, too. Where
t₀ is follows from the `input_ids` of the model's forward, or of `generate`, which looks at the prompt once. A hook
reads it there, if an aLoRA is active, and the layers find it beside what is active; it is counted from the end of what
the forward is given, so that a head that is run on the last positions alone finds it, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .errors import LoRARouteError, LoRAStateError, LoRAUnsupportedError
from .layerinfo import modules_of, unhook
from .rowmaps import argument_names
from .state import Active, Block, Entry, LoRAState, leave

__all__ = [
    "OFFSETS",
    "Reach",
    "Starts",
    "acted",
    "found",
    "hook_activation",
    "mask_compiled",
    "reach_of",
    "refuse_activation",
    "state_at",
    "starts_of",
    "unhook_activation",
]

OFFSETS = "alora_offsets"
"""PEFT's argument that says where the adapter acts: on how many of each row's last positions; None for none."""

_FIELD = "alora_invocation_tokens"
Counts = Mapping[Entry, tuple[int, ...]]  # how many of each row's last positions an aLoRA acts on


# ---- where ---------------------------------------------------------------------------------------------------------


def found(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """How many positions there are from the last occurrence of `tokens` to the end, 0 without one.

    Args:
        ids: (N, T), integer.
        tokens: n ≥ 1 token ids.

    Returns:
        (N,) int64.
    """
    length, n = ids.shape[1], len(tokens)
    if length < n:
        return torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device)
    hit = (ids.unfold(1, n, 1) == torch.tensor(tokens, device=ids.device, dtype=ids.dtype)).all(-1)  # (N, T − n + 1)
    place = torch.arange(1, length - n + 2, device=ids.device)
    last = (hit * place).amax(1)  # counted from 1; 0: nowhere
    return torch.where(last > 0, length + 1 - last, 0)


@dataclass(eq=False)
class Starts:
    """Where each aLoRA begins in the rows of one `generate`, in positions of the whole sequence; None for nowhere."""

    starts: Mapping[Entry, tuple[int | None, ...]]
    length: int  # of the prompt
    seen: int = 0  # positions that went through the model, where no cache tells

    def repeated(self, size: int) -> Starts:
        """The same when each row stands `size` times, one after another."""
        repeated = {e: tuple(s for s in starts for _ in range(size)) for e, starts in self.starts.items()}
        return Starts(repeated, self.length, self.seen)

    def left(self, past: int, length: int) -> Counts:
        """How many of the last positions of a forward of `length` come after a start. past: −1 where unknown."""
        if past < 0:  # nothing cached, or a state without a length
            past = 0 if length >= self.length else self.seen
            self.seen = past + length
        end = past + length
        return {
            entry: tuple(0 if s is None else min(max(end - s, 0), length) for s in starts)
            for entry, starts in self.starts.items()
        }


@dataclass(eq=False)
class Reach:
    """How many of the last positions of each row the aLoRAs act on, in one forward."""

    module: nn.Module | None
    counts: Counts
    length: int  # T
    kept: int = 0  # how many of the last positions the head is run on; −1: some, and nobody knows which
    block: Block | None = None
    _masks: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """N."""
        return len(next(iter(self.counts.values())))

    def of(self, entry: Entry) -> tuple[int, ...]:
        """The counts of an adapter; all positions of one that acts everywhere."""
        return self.counts[entry] if entry.invocation else (self.length,) * self.rows

    def check(self, x: Tensor) -> int:
        """The positions of a layer's input (N, T, …), 1 of (N, in); `LoRARouteError` if they are not the rows'."""
        rows = self.rows
        positions = x.shape[1] if x.dim() > 2 else 1
        if x.shape[0] != rows or (x.dim() > 2 and positions not in (self.length, self.kept)):
            raise LoRARouteError(
                f"An aLoRA has factors in a layer that was given {tuple(x.shape)}: nothing says which of the "
                f"{rows} × {self.length} tokens these are.",
                name=_FIELD,
                value=tuple(x.shape),
                expected=(rows, self.length),
                remedy="Leave this layer out of target_modules (logits_to_keep has to be a number, if it is a head).",
            )
        return positions

    def mask(self, counts: tuple[int, ...], positions: int, device: torch.device) -> Tensor:
        """Which of a row's last positions those are: (N, positions) bool."""
        key = (counts, positions, device, torch.is_inference_mode_enabled())
        if key not in self._masks:
            reach = torch.tensor(counts, device=device)
            self._masks[key] = _within(reach, positions)
        return self._masks[key]


def _within(reach: Tensor, positions: int) -> Tensor:
    """(…, positions) bool, true on the last `reach` ones. reach: (…)."""
    return torch.arange(positions, device=reach.device) >= positions - reach[..., None]


def reach_of(active: Active) -> Reach:
    """The reach of the forward that is running. Raises `LoRAStateError` outside one."""
    if isinstance(active.reach, Reach):
        return active.reach
    raise LoRAStateError(
        "A layer with an aLoRA runs outside the forward of its model, so that nothing says where it was invoked.",
        name=_FIELD,
        remedy="Call the model with input_ids, or the layer under no_lora().",
    )


# ---- reading a call ------------------------------------------------------------------------------------------------


def _tokens(given: Mapping[str, Any], names: Iterable[str] = ("input_ids",)) -> Tensor | None:
    for name in names:
        ids = given.get(name)
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            return ids
    return None


def _refuse_unknown() -> NoReturn:
    raise LoRAStateError(
        "The active aLoRA acts from its invocation tokens on, and the model was not given input_ids, (N, T), in which "
        "to look for them.",
        name=_FIELD,
        remedy=f"Give input_ids; or {OFFSETS}=[…]: on how many of each row's last positions it acts, None for none.",
    )


def _invoked(active: Active) -> list[Entry]:
    return [entry.check() for entry in active.entries if entry.invocation]


def _scanned(ids: Tensor, entries: Sequence[Entry]) -> Counts:
    if ids.is_meta:  # sizes alone matter
        return dict.fromkeys(entries, (ids.shape[1],) * ids.shape[0])
    counts = torch.stack([found(ids, entry.invocation) for entry in entries]).tolist()
    return {entry: tuple(row) for entry, row in zip(entries, counts, strict=True)}


def _told(offsets: Any, entries: Sequence[Entry], batch: int | None) -> Mapping[Entry, tuple[int, ...]]:
    """The same from what the caller says."""
    given = offsets.tolist() if isinstance(offsets, Tensor) else offsets
    fits = isinstance(given, Sequence) and not isinstance(given, str) and (batch is None or len(given) == batch)
    if not fits or any(
        item is not None and (isinstance(item, bool) or not isinstance(item, int) or item < 0) for item in given
    ):
        raise LoRARouteError(
            f"{OFFSETS}={offsets!r} does not say where an aLoRA acts.",
            name=OFFSETS,
            value=offsets,
            expected=f"a list with a number of positions, or None, for each of the {batch or 'batch’s'} rows",
            remedy="Give one for each row: how many of its last positions the adapter acts on.",
        )
    counts = tuple(item or 0 for item in given)
    return dict.fromkeys(entries, counts)


def _past(given: Mapping[str, Any]) -> Any:
    """Positions that the cache holds, a number or a tensor; −1 where nothing tells."""
    cache = given.get("past_key_values")
    if cache is None or not hasattr(cache, "get_seq_length"):
        return -1
    try:
        return cache.get_seq_length()
    except ValueError:  # a cache of states alone, which have no length
        return -1


def _size(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """(N, T) of what the forward is given."""
    for name in ("input_ids", "inputs_embeds"):
        tensor = given.get(name)
        if isinstance(tensor, Tensor) and tensor.dim() > 1:
            return tensor.shape[0], tensor.shape[1]
    return None


def _kept(given: Mapping[str, Any]) -> int:
    kept = given.get("logits_to_keep", 0)
    return kept if isinstance(kept, int) else -1


def starts_of(active: Active, first: Any, given: Mapping[str, Any]) -> Starts:
    """Where the active aLoRAs begin in a prompt.

    Args:
        first: `generate`'s first positional argument, if it has one.
        given: its keyword arguments; `OFFSETS` counts from the end of the prompt.

    Raises:
        LoRAStateError: there is no prompt of tokens. LoRARouteError: the offsets are not of its rows.
    """
    entries, named = _invoked(active), {**given, "first": first}
    ids, offsets = _tokens(named, ("first", "inputs", "input_ids")), given.get(OFFSETS)
    shaped = ids if ids is not None else given.get("inputs_embeds")
    if shaped is None or (ids is None and offsets is None):
        _refuse_unknown()
    length, mask, before = shaped.shape[1], given.get("attention_mask"), 0
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != length:  # only what the cache lacks is given
        before = max(int(_past(given)), 0)
    counts = _scanned(shaped, entries) if offsets is None else _told(offsets, entries, shaped.shape[0])
    starts = {e: tuple(before + length - n if n else None for n in row) for e, row in counts.items()}
    return Starts(starts, before + length)


def _read(module: nn.Module, given: Mapping[str, Any], active: Active, offsets: Any) -> Reach:
    """What a forward's arguments say."""
    entries, size = _invoked(active), _size(given)
    if offsets is not None:
        counts: Counts = _told(offsets, entries, None if size is None else size[0])
        length = size[1] if size is not None else max(max(row, default=0) for row in counts.values())
        counts = {entry: tuple(min(n, length) for n in row) for entry, row in counts.items()}
        return Reach(module, counts, length, _kept(given))
    if isinstance(active.reach, Starts) and size is not None:
        return Reach(module, active.reach.left(int(_past(given)), size[1]), size[1], _kept(given))
    ids = _tokens(given)
    if ids is None:
        _refuse_unknown()
    return Reach(module, _scanned(ids, entries), ids.shape[1], _kept(given))


# ---- hooks ---------------------------------------------------------------------------------------------------------


class _Hook:
    """Reads where the aLoRAs act from the arguments of a forward, and forgets it when the forward ends."""

    def __init__(self, state: LoRAState, names: tuple[str, ...]) -> None:
        self.state, self.names = state, names
        _leave_uncompiled()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _leave_uncompiled()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None:  # another thread is just hooking it: nothing is invoked yet
            return None
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            self._trace(module, {**kwargs, **dict(zip(self.names, args, strict=False))}, kwargs.get(OFFSETS))
            return None
        return self.enter(module, args, kwargs)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read where the aLoRAs act, and let the layers see it; the arguments that are the forward's, if others are."""
        active, offsets = self.state.current, kwargs.get(OFFSETS)
        if active.invoked and not isinstance(active.reach, Reach):
            if torch.compiler.is_exporting() or torch._C._is_tracing():
                raise LoRAUnsupportedError(
                    "An aLoRA cannot be exported: the program would keep where it was invoked, whatever its input.",
                    name=_FIELD,
                    remedy="Export under no_lora() or a plain adapter; torch.compile works.",
                )
            reach = _read(module, {**kwargs, **dict(zip(self.names, args, strict=False))}, active, offsets)
            reach.block = self.state.enter(active.reaching(reach))
        if OFFSETS in kwargs:
            return args, {name: value for name, value in kwargs.items() if name != OFFSETS}
        return None

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            traced = self.state.traced_reach
            if traced is not None and traced.module is module:
                self.state.traced_reach = None
            return
        self.leave(module)

    def leave(self, module: nn.Module) -> None:
        """Forget it again."""
        reach = self.state.current.reach
        if isinstance(reach, Reach) and reach.module is module and reach.block is not None:
            leave(reach.block)

    def _trace(self, module: nn.Module, given: dict[str, Any], offsets: Any) -> None:
        if self.state.traced_reach is not None:
            return
        if offsets is not None:
            compiled = "Compile the model itself, torch.compile(model), or give input_ids."
            _refuse_traced(f"{OFFSETS} cannot be given to a model that is called within a compiled function.", compiled)
        ids, size = _tokens(given), _size(given)
        if size is None:
            return
        x: Tensor = given["inputs_embeds"].detach() if ids is None else ids
        past = _past(given)
        number, tensor = (-1, past.detach()) if isinstance(past, Tensor) else (past, None)
        reach = _reach_op(x, ids is not None, number, tensor, self.state.uid, self.state.reach_width)
        self.state.traced_reach = Traced(module, reach, size[1], _kept(given))


@functools.cache
def _leave_uncompiled() -> None:
    """Let the hooks run as they are where they are not a part of a graph.

    torch.compile(model) runs the model's own hooks outside its graph, as frames of their own. Compiled, they could tell
    the forward's graph only through the state, which threads share.
    """
    from torch._dynamo.decorators import skip  # a model of transformers has imported it

    for name in ("enter", "leave"):
        setattr(_Hook, name, torch.compiler.disable(getattr(_Hook, name)))
    for method in (_Hook.before, _Hook.after):
        skip(method)
        vars(method).pop("_torchdynamo_disable", None)  # within a graph they are traced


def hook_activation(model: nn.Module, state: LoRAState) -> None:
    """Hook the model, and every model inside it that takes token ids: whichever is called reads where to act."""
    if state_at(model) is not None:
        return
    for module in dict.fromkeys(modules_of(model).values()):
        of: Any = type(module)
        names = tuple(argument_names(of))
        if module is model or (hasattr(module, "base_model_prefix") and "input_ids" in names):
            hook = _Hook(state, names)
            module.register_forward_pre_hook(hook.before, with_kwargs=True)
            module.register_forward_hook(hook.after, always_call=True)


def state_at(module: nn.Module) -> LoRAState | None:
    """The state whose aLoRAs this model, which takes token ids, looks for; None if there is none."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((owner.state for owner in owners if isinstance(owner, _Hook)), None)


def unhook_activation(model: nn.Module) -> None:
    """Take the hooks away again."""
    unhook(model, _Hook)


_NO_POSITION = {  # by the kind of layer
    "embedding": "an embedding has no position to begin at",
    "conv": "a convolution reads several positions at once",
    "attention": "PEFT defines it for linear layers, and nn.MultiheadAttention calls none",
}


def refuse_activation(
    model: nn.Module,
    config: Any,
    kinds: Mapping[str, str],
    whole: Iterable[str],
    row_maps: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raise `LoRAUnsupportedError` if an aLoRA is not defined on this model, or on one of the layers.

    Args:
        kinds: the kind of each layer, by path.
        whole: what it trains beside factors: heads and biases ("none" counts as none).
        row_maps: how the rows of layers come from the batch's, of those that hold no adapter yet.
    """
    if config.alora_invocation_tokens is None:
        return
    facts = [f"{path}: {_NO_POSITION[kind]}" for path, kind in kinds.items() if kind in _NO_POSITION]
    for path in kinds:
        held = getattr(model.get_submodule(path), "lora_slots", None)
        row_map = row_maps.get(path, "batch") if held is None else held.row_map
        if row_map not in ("batch", "flat"):
            facts.append(f"{path}: its inputs are not the rows' tokens ({row_map})")
    facts += [f"{name}: it is trained whole, and would act before the invocation" for name in whole if name != "none"]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        facts.append(f"{type(model).__name__}: an encoder and a decoder, of which it is not defined which is invoked")
    if facts:
        raise LoRAUnsupportedError(
            f"{_FIELD}={list(config.alora_invocation_tokens)!r}: an aLoRA changes linear layers of a model of tokens.",
            name=_FIELD,
            value=facts,
            facts=facts,
            remedy="Leave these out of target_modules, modules_to_save and bias; or train a plain LoRA.",
        )


# ---- a layer's output ------------------------------------------------------------------------------------------------


def acted(
    reach: Reach, counts: tuple[int, ...], x: Tensor, output: Tensor, change: Callable[[slice], Tensor], *, always: bool
) -> Tensor:
    """`output`, with what an adapter makes of it on the last positions of each row.

    Args:
        counts: how many of each row's last positions those are.
        x: (N, T, …). output: (N, T, …).
        change: the output as the adapter changes it, of a slice of the positions.
        always: run the adapter even where it acts nowhere: its gradients are then zero, rather than missing.
    """
    positions = reach.check(x)
    most, least = min(max(counts), positions), min(counts)
    if not most:
        if not always:
            return output
        most = 1
    tail = slice(positions - most, None)
    changed = change(tail)
    if least < most:
        mask = reach.mask(counts, positions, x.device)[:, tail]
        # Not a product with 0: −0.0 stays what it is.
        changed = torch.where(mask.view(*mask.shape, *[1] * (output.dim() - 2)), changed, output[:, tail])
    return changed if most == positions else torch.cat([output[:, : positions - most], changed], 1)


# ---- compiled --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Traced:
    """As `Reach`, while a graph is traced. reach: (N, width) int64, by slot; the last column is every other slot's."""

    module: nn.Module
    reach: Tensor
    length: int
    kept: int


def _columns(active: Active, counts: Counts, rows: int, length: int, width: int, device: torch.device) -> Tensor:
    columns = torch.full((rows, width), length, dtype=torch.int64)
    for entry, row in counts.items():
        columns[:, entry.slot] = torch.tensor(row)
    return columns.to(device)


@torch.compiler.assume_constant_result
def _refuse_traced(what: str, remedy: str) -> None:
    """Raise while a graph is traced, from outside the code that is traced."""
    raise LoRAUnsupportedError(what, name=_FIELD, remedy=remedy)


@torch.library.custom_op("hf_lora::reach", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _reach_op(x: Tensor, ids: bool, past: int, past_tensor: Tensor | None, uid: int, width: int) -> Tensor:
    active, length = LoRAState.current_of(uid), x.shape[1]
    if not active.invoked:
        counts: Counts = {}
    elif isinstance(active.reach, Reach):
        counts = active.reach.counts
    elif isinstance(active.reach, Starts):
        counts = active.reach.left(past if past_tensor is None else int(past_tensor), length)
    elif ids:
        counts = _scanned(x, _invoked(active))
    else:
        _refuse_unknown()
    return _columns(active, counts, x.shape[0], length, width, x.device)


@_reach_op.register_fake
def _(x: Tensor, ids: bool, past: int, past_tensor: Tensor | None, uid: int, width: int) -> Tensor:
    return x.new_empty((x.shape[0], width), dtype=torch.int64)


@torch.library.custom_op("hf_lora::reach_mask", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _mask_op(x: Tensor, flat: bool, uid: int, width: int) -> Tensor:
    active = LoRAState.current_of(uid)
    if not active.invoked:
        return x.new_ones((*x.shape[:2], width) if x.dim() > 2 else (x.shape[0], width), dtype=torch.bool)
    reach = reach_of(active)
    rows = reach.rows
    if flat and x.dim() == 2:
        x = x.view(rows, -1, x.shape[-1])
    positions = reach.check(x)
    mask = _within(_columns(active, reach.counts, rows, reach.length, width, x.device), positions)  # (N, width, T)
    mask = mask.transpose(1, 2)
    return mask.contiguous() if x.dim() > 2 and not flat else mask.reshape(-1, width)


@_mask_op.register_fake
def _(x: Tensor, flat: bool, uid: int, width: int) -> Tensor:
    return x.new_empty((*x.shape[:2], width) if x.dim() > 2 else (x.shape[0], width), dtype=torch.bool)


def mask_compiled(x: Tensor, state: LoRAState, slots: Tensor, *, flat: bool) -> Tensor:
    """Where each slot acts when the graph runs: (N, T, K) bool for x of (N, T, …), (N, K) for x of two dimensions.

    Args:
        slots: (N, K), what is active in each row of x.
        flat: whether x of two dimensions is (B·T, d).
    """
    traced, width = state.traced_reach, state.reach_width
    if traced is None:
        mask: Tensor = _mask_op(x.detach(), flat, state.uid, width)
    else:
        positions = x.shape[1] if x.dim() > 2 else traced.length if flat else 1
        if x.dim() > 2 and positions not in (traced.length, traced.kept):
            remedy = "Leave this layer out of target_modules (logits_to_keep has to be a number, if it is a head)."
            _refuse_traced("An aLoRA has factors in a layer that is not given the tokens of the rows.", remedy)
        mask = _within(traced.reach, positions).transpose(1, 2)  # (N, T, width)
        mask = mask if x.dim() > 2 else mask.reshape(-1, width)
    chosen = slots.clamp(max=width - 1)
    return mask.gather(-1, chosen[:, None].expand(-1, mask.shape[1], -1) if x.dim() > 2 else chosen)
