"""Adapters on a model: add, put, read, remove, choose what trains. On any `nn.Module`, in place.

Whatever puts an adapter goes through `put`, which checks everything before it touches anything.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .activation import hook_activation, refuse_activation
from .attachment import Resident, attach, detach, exclusive, require, state_of
from .attention import LoRAAttention, shield, unshield
from .batches import row_maps
from .config import LoRAConfig
from .convslots import LoRAConvSlots
from .errors import LoRAMismatchError, LoRANameError, LoRAStateError
from .expertlayers import LoRAExperts
from .expertnames import expert_of
from .expertputting import put_experts
from .extras import EXTRAS
from .fitting import Plan, attention_kinds, make_plan, unpooled
from .guards import refuse_managed, require_putable
from .initial import initial_value, refuse_embeddings
from .inits import INITS, require_data
from .layerinfo import HELD, modules_of, out_of
from .layers import LoRABias, LoRAEmbedding, LoRAHead, LoRAHeads, LoRALinear, restore, swap
from .oldnames import as_now
from .quantised import refuse_rearranged
from .reading import read, refill_parameters, refill_problems
from .replication import replicated
from .reservation import note, release, reserved
from .rounding import rounding_of
from .sharding import refuse_sharded, reshard
from .slots import LoRASlots, Slot, block_index
from .state import NOTHING, Active, Entry, LoRAState
from .targeting import Resolution, describe_layer, resolve
from .tokenfields import ROWS, ids_of
from .tokens import TokenRows
from .tying import tie, tied_config
from .values import AdapterValue, Factors
from .variants import STEPS, Base, Effect, effect_of
from .weights import compute_dtype, dense_weight, device_of, is_dense, is_here, materialised

__all__ = [
    "Resident",
    "add",
    "effect_on",
    "exclusive",
    "put",
    "read",
    "refill",
    "remove",
    "require",
    "reserve",
    "state_of",
    "train",
]

# ---- adding ----------------------------------------------------------------------------------------------------------


def add(
    model: nn.Module,
    config: LoRAConfig | Any,
    name: str = "default",
    *,
    active: bool = True,
    trainable: bool = True,
    replace: bool = False,
    data: Iterable[Any] | None = None,
) -> Resolution:
    """Put a new adapter on a model and freeze the base. ΔW starts at zero, so the model computes what it did before.

    Args:
        config: a `LoRAConfig`, or a `peft.LoraConfig`.
        name: any string that is not taken.
        active: make it the only active adapter; the others stay, frozen.
        trainable: let it train.
        replace: put it in place of an adapter of this name.
        data: batches, where the initialisation looks at data: a DataLoader, say.

    Returns:
        What the config resolved to.

    Raises:
        LoRATargetError, LoRAConfigError, LoRAUnsupportedError: the config does not fit this model.
        LoRANameError: the name is taken. LoRAStateError: the model is merged or routed.
    """
    if not isinstance(config, LoRAConfig):
        config = LoRAConfig.from_peft(config)
    config.require_supported(constructing=True)
    with replicated(model, config.layer_replication, alone=state_of(model) is None):
        return _add(model, config, name, active, trainable, replace, data)


def _add(
    model: nn.Module,
    config: LoRAConfig,
    name: str,
    active: bool,
    trainable: bool,
    replace: bool,
    data: Iterable[Any] | None,
) -> Resolution:
    config, found = tied_config(model, config, resolve(model, config))
    require_data(config, data)
    refuse_embeddings(config, found.targets)
    refuse_activation(model, config, {t.path: t.info.kind for t in found.targets}, [config.bias, *found.heads])
    require_putable(model, name, replace, state_of(model), modules_of(model))  # before hours of looking at data
    found, seen = _look(model, config, found, data)
    value = initial_value(model, config, found, seen)
    put(model, value, name, trainable=trainable, replace=replace, active=False)
    state = require(model)
    entry = state.entry(name)
    entry.record.skipped, entry.record.architecture = found.skipped, found.architecture
    if trainable:
        try:
            train(model, [name])
        except BaseException:  # another adapter could not be frozen: nothing is added
            remove(model, name)
            raise
    if active:
        state.default = Active(((entry, 1.0),))
    return found


def _look(
    model: nn.Module, config: LoRAConfig, found: Resolution, data: Iterable[Any] | None
) -> tuple[Resolution, Mapping[str, Any] | None]:
    """What the initialisation finds in data, run through the base alone; it may change the targets' ranks."""
    look, state = INITS[config.init_method].look, state_of(model)
    if look is None or data is None:
        return found, None
    with torch.inference_mode(False), contextlib.nullcontext() if state is None else state.override(NOTHING):
        targets, seen = look(model, found.targets, data, config.init_settings)
    left = {target.path for target in targets}
    dropped = [f"{t.path}: init={config.init!r} gave it no rank" for t in found.targets if t.path not in left]
    return dataclasses.replace(found, targets=targets, skipped=(*found.skipped, *dropped)), seen


# ---- putting ---------------------------------------------------------------------------------------------------------


def put(
    model: nn.Module,
    value: AdapterValue,
    name: str,
    *,
    trainable: bool = False,
    replace: bool = False,
    active: bool | None = None,
    complete: bool = False,
    finite: bool = False,
) -> None:
    """Put an adapter on a model: all of it, or nothing.

    Args:
        value: the adapter.
        name: any string that is not taken.
        trainable: as float32 Parameters that require gradients; otherwise into the frozen banks.
        replace: put it in place of the adapter of this name.
        active: make it the only active one; None does so only if nothing is active.
        complete: also refuse a value that lacks what its config names on this model (a file with tensors missing).
        finite: it was just read from a file, which looks for values that are not finite; not again.

    Raises:
        LoRAMismatchError: it does not fit; lists every missing module and wrong shape. The model is as before.
        LoRANameError: the name is taken, or empty. LoRAStateError: the model is merged or routed.
    """
    value.config.require_supported()
    with exclusive(model) as state, replicated(model, value.config.layer_replication, alone=state is None):
        _put(model, value, name, trainable, replace, active, complete, finite)


def _put(
    model: nn.Module,
    value: AdapterValue,
    name: str,
    trainable: bool,
    replace: bool,
    active: bool | None,
    complete: bool,
    finite: bool,
) -> None:
    state, modules = state_of(model), modules_of(model)
    value = attention_kinds(unpooled(as_now(model, value, modules, trainable=trainable), modules), modules)
    require_putable(model, name, replace, state, modules)
    if trainable or value.modules:
        what = f"An adapter {'that trains' if trainable else 'with a head'} cannot be put"
        refuse_sharded(model, what, "Add or load it before fully_shard(); frozen factors can be loaded at any time.")
    if trainable:
        refuse_rearranged(model)
    reshard(model)
    plan = make_plan(model, value, state, complete=complete, finite=finite, modules=modules)
    kinds = {path: factors.kind for path, factors in value.factors.items()}
    refuse_activation(model, value.config, kinds, [*value.biases, *value.modules], plan.row_maps)
    fresh = state is None
    state = attach(model) if state is None else state
    with state.lock, torch.inference_mode(False):
        entry = Entry(name, state.free_slot(), trainable, tuple(value.config.alora_invocation_tokens or ()))
        layers, experts = _places_of(value)
        resident = Resident(value.config, layers, tuple(value.biases), tuple(value.modules), experts=experts)
        entry.record = resident
        old = state.entries.get(name)
        try:
            held = _write(model, state, entry, value, plan)
            _furnish(model, state)
            resident.value = None if held else value
            state.retire("replace", [] if old is None else [old], entry)
        except BaseException:
            _erase(model, entry)
            if fresh:
                release(model)
                detach(model, state)
            raise
        if old is not None:
            _erase(model, old)
        if active or (active is None and not state.default.mixture):
            state.default = Active(((entry, 1.0),))


def reserve(
    model: nn.Module, slots: int | None, rank: int | None = None, targets: str | Sequence[str] | None = None
) -> None:
    """Make room for adapters to come, so that putting them moves none that are there (and compiles nothing anew).

    Args:
        slots: how many adapters, those on the model included, in layers that get their first one later, too. None:
            forget it; what was made stays.
        rank: the largest of theirs.
        targets: layers that are to have room before their first adapter, as `target_modules`.

    Raises:
        LoRAStateError: `slots` or `rank` is no positive number. LoRATargetError: `targets` matches nothing.
    """
    state = state_of(model)
    if targets is not None and state is not None:
        state.require_unmerged("reserve_lora")
        if state.overridden:
            raise LoRAStateError(
                "Room for an adapter cannot be made inside use_lora() or route_lora().",
                remedy="Make it before the with block.",
            )
    note(model, slots, rank, targets)
    if state is not None:
        with state.lock, torch.inference_mode(False):
            _furnish(model, state)


def _furnish(model: nn.Module, state: LoRAState) -> None:
    """Let the layers that room is reserved in have it, whether they hold an adapter or not."""
    room, modules = reserved(model), modules_of(model)
    if room is None:
        return
    free = [path for path in room.paths if not isinstance(modules.get(path), LoRALinear) and path in modules]
    plan = Plan(modules, {}, row_maps(model, free, modules) if free else {}, {})
    for path in room.paths:
        if path in modules and not isinstance(modules[path], LoRAHead):
            _slots(model, state, modules[path], path, plan).kept = True


def _write(model: nn.Module, state: LoRAState, entry: Entry, value: AdapterValue, plan: Plan) -> bool:
    """Put the value into the layers. Returns whether they now hold every bit of it."""
    rslora, still = value.config.use_rslora, INITS[value.config.init_method].still
    held, rounding = not (value.biases or value.modules or value.embeddings), rounding_of(value.config)
    invoked = value.config.alora_invocation_tokens is not None
    if invoked:
        hook_activation(model, state)
        state.reach_width = max(state.reach_width, 2 + (entry.slot | 1))
    fixed = (*still, "A") if value.config.freeze_a else still
    kept = put_experts(model, state, plan.modules, entry.slot, value.factors, entry.trainable, fixed)
    held = held and kept
    room = reserved(model)
    if room is not None:
        for path in _places_of(value)[1]:
            for bank in plan.modules[path].lora_slots.banks().values():  # type: ignore[union-attr, operator]
                bank.reserve_experts(room.slots, room.rank)
    for path, factors in value.factors.items():
        if expert_of(path) is not None:
            continue
        module = plan.modules[path]
        slots = _slots(model, state, module, path, plan)
        bias = value.biases.get(f"{path}.bias")
        slot = Slot(
            factors.rank,
            factors.alpha,
            factors.scaling,
            value.config.dropout,
            entry.trainable,
            blocks=tuple((block.role, block.rows) for block in factors.blocks),
            bias=bias is not None,
            invoked=invoked,
            anchored=factors.anchored,
            form=factors.form,
            settings={f: s for f in STEPS if (s := getattr(value.config, f)) is not None},
            still=(*still, "B" if factors.kind == "embedding" else "A") if value.config.freeze_a else still,
        )
        around = out_of(path, plan.modules)
        if around is not None and around not in value.factors:  # whose forward it is that runs here
            beside = _slots(model, state, plan.modules[around], around, plan)
            beside.put_frozen(entry.slot, Slot(), None, None, None)
        A, B, extras = factors.A, factors.B, factors.extras
        if entry.trainable:
            master = torch.promote_types(A.dtype, torch.float32)
            if slot.blocks:
                rows, columns = block_index(slot.blocks, slot.rank)
                B = B[rows.to(B.device), columns.to(B.device)]
            masters = {key: tensor.to(master) for key, tensor in extras.items()}
            slots.put_trainable(entry.slot, slot, A.to(master), B.to(master), _master(bias), masters)
            if any(EXTRAS[key].weight for key in extras) and is_here(module):
                with torch.no_grad():
                    slots.effect(entry.slot, module)  # looks at the weight now, rather than in a compiled graph
        elif extras:
            effect = _effect(module, factors)
            slots.put_frozen(entry.slot, slot, A, B, _shift(module, bias, effect), effect)
            held = False
        else:
            slots.put_frozen(entry.slot, slot, A, B, _bias_change(module, bias))
            held = held and slot.dtype is not None and factors.use_rslora == rslora
        if rounding is not None and is_dense(module):
            weight, rank = _turned(module), factors.rank
            slots.hold_rounded(
                entry.slot,
                rounding.key(rank),
                lambda rank=rank, W=weight: rounding.stand_in(W, rank),  # type: ignore[misc]
            )
    for path, bias in value.biases.items():
        owner = path.rpartition(".")[0]
        if owner in value.factors:
            continue
        module = plan.modules[owner]
        slots = _slots(model, state, module, owner, plan)
        slot = Slot(trainable=entry.trainable, bias=True)
        if entry.trainable:
            slots.put_trainable(entry.slot, slot, None, None, _master(bias))
        else:
            slots.put_frozen(entry.slot, slot, None, None, _bias_change(module, bias))
    for path, tensors in value.modules.items():
        module = plan.modules[path]
        if ROWS in tensors:
            ids = ids_of(value.config.trainable_token_indices, path)
            assert ids is not None
            own_rows = _rows_copy(module, ids, tensors[ROWS], entry.trainable)
            _put_head(state, module, path, plan, entry, own_rows)
            for other in plan.shared.get(path, ()):
                _put_head(state, plan.modules[other], other, plan, entry, own_rows.beside(plan.modules[other]))
        else:
            _put_head(state, module, path, plan, entry, _head_copy(module, tensors))
    if entry.trainable:
        tie(plan.modules, plan.together, entry.slot)
    return held or entry.trainable


def _put_head(state: LoRAState, module: nn.Module, path: str, plan: Plan, entry: Entry, own: nn.Module) -> None:
    """Hold an adapter's copy of a module beside it; its class is swapped if it holds none."""
    if not isinstance(module, LoRAHead):
        heads = LoRAHeads(state, plan.row_maps[path])
        heads.train(module.training)
        heads.base = type(module)
        module.lora_heads = heads  # before the class, as in `_slots`
        try:
            swap(module, LoRAHead, path)
        except BaseException:
            del module.lora_heads
            raise
        shield(plan.modules, path, state)
    assert isinstance(module, LoRAHead)
    module.lora_heads.put(entry.slot, own, trainable=entry.trainable)


def _rows_copy(module: nn.Module, ids: tuple[int, ...], rows: Tensor, trainable: bool) -> TokenRows:
    """Rows of the module's weight: in float32 or wider while they train, else in the weight's dtype."""
    dtype = compute_dtype(module, module)
    dtype = torch.promote_types(dtype, torch.float32) if trainable else dtype
    parameter = nn.Parameter(rows.detach().to(device_of(module), dtype, copy=True), requires_grad=trainable)
    return TokenRows(ids, parameter, module)


def _turned(module: nn.Module) -> Tensor:
    """The layer's weight as (out, in)."""
    info, weight = describe_layer(module), dense_weight(module)
    return weight.T if info is not None and info.kind == "conv1d" else weight


def _head_copy(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module as it is in the base, without what adapters hold of it, with other values."""
    held = {id(child): None for path, child in module.named_modules() if path.rpartition(".")[2] in HELD}
    own = copy.deepcopy(module, {**held, id(None): None})  # the memo says that these children are copied already
    for part in list(own.modules()):
        for name in HELD & part._modules.keys():
            del part._modules[name]
        restore(part)
        if hasattr(part, "_hf_hook"):  # the copy's weights stay in memory: accelerate's hook would bring the base's
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(part)
    offloaded = any(p.is_meta for p in own.parameters()) and not any(t.is_meta for t in tensors.values())
    dtypes = {key: tensor.dtype for key, tensor in own.state_dict().items()}
    own.load_state_dict({key: tensor.to(dtypes[key], copy=True) for key, tensor in tensors.items()}, assign=offloaded)
    return own.to(device_of(module)) if offloaded else own


def _master(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32))


def _bias_change(module: nn.Module, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    own = materialised(module, "bias")
    wide = torch.promote_types(torch.promote_types(bias.dtype, own.dtype), torch.float32)
    return bias.to(own.device, wide) - own.to(wide)


def effect_on(factors: Factors, device: torch.device, base: Callable[[], Base]) -> Effect:
    """What factors with a variant's vectors come to on a base, in float32 or wider, on a device."""
    wide = torch.promote_types(factors.A.dtype, torch.float32)
    A, B = (tensor.detach().to(device, wide) for tensor in (factors.A, factors.B))
    extras = {name: tensor.detach().to(device, wide) for name, tensor in factors.extras.items()}
    return effect_of(extras, A, B, factors.scaling, base)


def _effect(module: nn.Module, factors: Factors) -> Effect:
    weighted = any(EXTRAS[name].weight for name in factors.extras)
    weight = dense_weight(module) if weighted else torch.empty(0, device=device_of(module))
    layer: type[nn.Module] = getattr(type(module), "lora_base", type(module))
    return effect_on(factors, weight.device, lambda: Base.of(weight, layer))


def _shift(module: nn.Module, bias: Tensor | None, effect: Effect) -> Tensor | None:
    """What a frozen adapter adds to the output whatever the input; a gain leaves the bias alone."""
    parts = [_bias_change(module, bias), effect.offset]
    if effect.gain is not None and getattr(module, "bias", None) is not None:
        own = materialised(module, "bias").to(effect.gain)
        parts.append((1 - effect.gain) * own)
    found = [part.to(effect.A.device) for part in parts if part is not None]
    return sum(found[1:], found[0]) if found else None


# By the kind of factors: the class that the layer is given, and what holds its adapters.
_HELD_BY: Mapping[str, tuple[type[LoRALinear], type[LoRASlots]]] = {
    "bias": (LoRABias, LoRASlots),
    "linear": (LoRALinear, LoRASlots),
    "embedding": (LoRAEmbedding, LoRASlots),
    "conv": (LoRALinear, LoRAConvSlots),
    "attention": (LoRAAttention, LoRASlots),
}


def _slots(model: nn.Module, state: LoRAState, module: nn.Module, path: str, plan: Plan) -> LoRASlots:
    """The module's slots; its class is swapped and they are made if it has none."""
    held = module._modules.get("lora_slots")
    if held is not None:
        assert isinstance(held, LoRASlots)
        return held
    info = plan.infos.get(path) or describe_layer(module)
    own = getattr(module, "bias", None)
    sizes = (0, own.numel() if own is not None else 0) if info is None else (info.in_features, info.out_features)
    kind = "bias" if info is None else info.pair
    mixin, held_by = _HELD_BY[kind]
    mixin = LoRALinear if out_of(path, plan.modules) else mixin
    dtype = compute_dtype(module, model)
    slots = held_by(state, kind, *sizes, device=device_of(module), dtype=dtype, row_map=plan.row_maps[path])
    slots.kernel = () if info is None else info.kernel
    slots.training, slots.fresh = module.training, type(module).forward is nn.Linear.forward
    room = reserved(model)
    if kind != "bias" and room is not None:
        slots.reserve(room.slots, room.rank)
    slots.base = type(module)
    module.lora_slots = slots  # before the class that needs it: other threads may be in this layer's forward
    try:
        swap(module, mixin, path)
    except BaseException:
        del module.lora_slots
        raise
    shield(plan.modules, path, state)
    return slots


# ---- reading, training, removing ------------------------------------------------------------------------------------


def refill(model: nn.Module, values: Mapping[str, AdapterValue]) -> None:
    """Write values into resident trainable adapters' own Parameters (an optimizer keeps them), all of them or nothing.

    Args:
        values: by the adapter's name.

    Raises:
        LoRAMismatchError: a value is not of the same layers, ranks, biases and heads.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    values = {name: attention_kinds(unpooled(value, modules), modules) for name, value in values.items()}
    for name, value in values.items():
        problems = refill_problems(read(model, name), value, modules)
        if problems:
            raise LoRAMismatchError(
                f"The file is not of the adapter {name!r} on this model: {len(problems)} problem(s). "
                "Nothing was loaded.",
                name=name,
                facts=sorted(problems),
                remedy="Build the model with the config that the file was trained with.",
            )
    for name, value in values.items():
        entry = require(model).entry(name)
        if entry.trainable:
            refill_parameters(modules, entry.slot, value)
        else:
            put(model, value, name, replace=True)


def _places_of(value: AdapterValue) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of layers with factors, and of modules whose experts have some."""
    at = {path: expert_of(path) for path in value.factors}
    experts = dict.fromkeys(found[0].rpartition(".")[0] for found in at.values() if found is not None)
    return tuple(path for path, found in at.items() if found is None), tuple(experts)


def train(model: nn.Module, names: Iterable[str]) -> None:
    """Choose which adapters train: these, and no others.

    An adapter that starts to train moves from the frozen banks to float32 Parameters, and back when it stops; a new
    optimizer is needed then.
    """
    require(model)
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, Iterable):
        raise LoRANameError(
            f"{names!r} names no adapters.",
            value=names,
            expected=tuple(require(model).entries),
            remedy='Give a name or a list of names: train_lora("task"); an empty list freezes all.',
        )
    with exclusive(model), torch.inference_mode(False):
        state = require(model)
        state.require_unmerged("train_lora")
        chosen = [state.entry(name) for name in names]
        changing = [entry for entry in state.entries.values() if entry.trainable != (entry in chosen)]
        state.require_unused("train_lora", changing)
        if changing:
            refuse_sharded(model, "train_lora() cannot be used", "Choose what trains before fully_shard().")
        for entry in changing:
            _convert(model, state, entry)


def _convert(model: nn.Module, state: LoRAState, entry: Entry) -> None:
    """Move an adapter between Parameters and banks, through a new slot: if it fails, the old one is as it was."""
    value = read(model, entry.name)
    moved = Entry(entry.name, state.free_slot(), not entry.trainable)
    try:
        held = _write(model, state, moved, value, make_plan(model, value, None))
        old = Entry(entry.name, entry.slot, entry.trainable)
        with state.unused("train_lora", [entry]):
            entry.slot, entry.trainable = moved.slot, moved.trainable
            entry.record.value = None if held else value
    except BaseException:
        _erase(model, moved)
        raise
    _erase(model, old)


def remove(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off the model, or all; with the last one the model is what it was, class by class, bit by bit.

    Raises:
        LoRAStateError: inside `use_lora` or `route_lora` of that adapter.
    """
    require(model)
    with exclusive(model):
        state = require(model)
        chosen = list(state.entries.values()) if name is None else [state.entry(name)]
        state.require_unused("remove_lora", chosen)
        refuse_managed(model, chosen, "removed")
        state.retire("remove_lora", chosen)
        for entry in chosen:
            _erase(model, entry)
        if not state.entries:
            release(model)
            detach(model, state)


def _erase(model: nn.Module, entry: Entry) -> None:
    """Take an adapter out of every layer; a layer that holds none gets its class back."""
    modules = modules_of(model)
    for module in modules.values():
        if isinstance(module, LoRALinear):
            module.lora_slots.remove(entry.slot)
            if not module.lora_slots.slots and not module.lora_slots.kept:
                restore(module)  # the class first: see LoRALinear.forward
                del module.lora_slots
        elif isinstance(module, LoRAExperts):
            for bank in module.lora_slots.banks().values():
                bank.remove(entry.slot)
            if not module.lora_slots.slots:
                restore(module)
                del module.lora_slots
        elif isinstance(module, LoRAHead):
            if str(entry.slot) in module.lora_heads.copies:
                del module.lora_heads.copies[str(entry.slot)]
            if not len(module.lora_heads.copies):
                restore(module)
                del module.lora_heads
    unshield(modules)
