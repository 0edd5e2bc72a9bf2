"""Adapters on a model: add, put, read, remove, choose what trains. On any `nn.Module`, in place.

Whatever puts an adapter goes through `put`, which checks everything before it touches anything.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .activation import hook_activation, refuse_activation, unhook_activation
from .config import LoRAConfig
from .errors import LoRAMismatchError, LoRANameError, LoRARouteError, LoRAStateError, LoRAUnsupportedError
from .extras import EXTRAS
from .facts import RunFacts
from .fitting import Plan, head_problems, make_plan, unpooled
from .initial import initial_value, refuse_embeddings
from .inits import INITS, require_data
from .layerinfo import HELD, modules_of
from .layers import LoRABias, LoRAEmbedding, LoRAHead, LoRAHeads, LoRALinear, Swapped, restore, swap
from .replication import replicated, restore_layers
from .rounding import rounding_of
from .routing import batch_of
from .rowmaps import hook_row_maps, unhook_row_maps
from .sharding import assign, refuse_sharded, reshard, whole
from .slots import LoRASlots, Slot, block_index
from .state import NOTHING, Active, Entry, LoRAState, check_rows, tracing
from .targeting import Resolution, describe_layer, resolve
from .values import AdapterValue, Block, Factors
from .variants import STEPS, Base, Effect, effect_of
from .weights import compute_dtype, dense_weight, device_of, is_dense, is_here, materialised

__all__ = ["Resident", "add", "effect_on", "put", "read", "refill", "remove", "require", "reserve", "state_of", "train"]

_STATE = "_lora_state"
_RESERVED = "_lora_reserved"  # slots and rank of banks to be made
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
    found = resolve(model, config)
    require_data(config, data)
    refuse_embeddings(config, found.targets)
    refuse_activation(model, config, {t.path: t.info.kind for t in found.targets}, [config.bias, *found.heads])
    _require_putable(model, name, replace, state_of(model), modules_of(model))  # before hours of looking at data
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
    with replicated(model, value.config.layer_replication, alone=state_of(model) is None):
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
    value = unpooled(value, modules)
    _require_putable(model, name, replace, state, modules)
    if trainable or value.modules:
        what = f"An adapter {'that trains' if trainable else 'with a head'} cannot be put"
        refuse_sharded(model, what, "Add or load it before fully_shard(); frozen factors can be loaded at any time.")
    reshard(model)
    plan = make_plan(model, value, state, complete=complete, finite=finite, modules=modules)
    kinds = {path: factors.kind for path, factors in value.factors.items()}
    refuse_activation(model, value.config, kinds, [*value.biases, *value.modules], plan.row_maps)
    fresh = state is None
    state = _attach(model) if state is None else state
    with state.lock, torch.inference_mode(False):
        entry = Entry(name, state.free_slot(), trainable, tuple(value.config.alora_invocation_tokens or ()))
        resident = Resident(value.config, tuple(value.factors), tuple(value.biases), tuple(value.modules))
        entry.record = resident
        try:
            held = _write(model, state, entry, value, plan)
        except BaseException:
            _erase(model, entry)
            if fresh:
                _detach(model, state)
            raise
        resident.value = None if held else value
        old = state.entries.get(name)
        if old is not None:
            _succeed(state, old, entry)
            _forget(model, state, old)
        state.entries = {**state.entries, name: entry}
        if active or (active is None and not state.default.mixture):
            state.default = Active(((entry, 1.0),))


def _require_putable(
    model: nn.Module, name: str, replace: bool, state: LoRAState | None, modules: Mapping[str, nn.Module]
) -> None:
    """Raise if no adapter can be put under this name now, whatever it holds."""
    if not isinstance(name, str) or not name:
        raise LoRANameError(
            f"{name!r} is no name for an adapter.",
            value=name,
            expected="a string that is not empty",
            remedy='Give any string, such as "task" or "org/task".',
        )
    if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise LoRANameError(
            f"{name!r} is no name for an adapter: it holds half of a character, which no file or log can.",
            value=name,
            expected="text",
            remedy='Give any other string, such as "task" or "org/task".',
        )
    _refuse_foreign(model, state, modules)
    if state is not None:
        state.require_unmerged("add_lora")
        if state.overridden and any(state.current.entries):
            raise LoRAStateError(
                "An adapter cannot be added inside use_lora() or route_lora().",
                remedy="Add or load it before the with block.",
            )
        if name in state.entries and not replace:
            raise LoRANameError(
                f"An adapter named {name!r} is already on this model.",
                name=name,
                value=name,
                remedy="Choose another name, remove_lora() it, or pass replace=True.",
            )
        if name in state.entries:
            state.require_unused("replace", [state.entries[name]])
        _refuse_managed(model, [state.entries[name]] if name in state.entries else [], "replaced")


def reserve(model: nn.Module, slots: int | None, rank: int | None = None) -> None:
    """Make room for adapters to come, so that putting them moves none that are there (and compiles nothing anew).

    Args:
        slots: how many adapters, those on the model included, in layers that get their first one later, too. None:
            forget it; what was made stays.
        rank: the largest of theirs.

    Raises:
        LoRAStateError: `slots` or `rank` is no positive number.
    """
    if slots is None or rank is None:
        vars(model).pop(_RESERVED, None)
        return
    for name, value in (("slots", slots), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LoRAStateError(
                f"{name}={value!r}: room is reserved for one adapter of rank 1 at least.",
                name=name,
                value=value,
                remedy="Give a positive whole number.",
            )
    vars(model)[_RESERVED] = (slots, rank)
    state = state_of(model)
    if state is None:
        return
    with state.lock, torch.inference_mode(False):
        for module in modules_of(model).values():
            held = module._modules.get("lora_slots")
            if isinstance(held, LoRASlots) and any(slot.rank for slot in held.slots.values()):
                held.reserve(slots, rank)


def _succeed(state: LoRAState, old: Entry, new: Entry) -> None:
    """The new adapter takes the old one's place, and its weight, in what is active by default."""
    if old in state.default.entries:
        state.default = Active(tuple((new if e is old else e, w) for e, w in state.default.mixture))


def _write(model: nn.Module, state: LoRAState, entry: Entry, value: AdapterValue, plan: Plan) -> bool:
    """Put the value into the layers. Returns whether they now hold every bit of it."""
    rslora, still = value.config.use_rslora, INITS[value.config.init_method].still
    held, rounding = not (value.biases or value.modules or value.embeddings), rounding_of(value.config)
    invoked = value.config.alora_invocation_tokens is not None
    if invoked:
        hook_activation(model, state)
        state.reach_width = max(state.reach_width, 2 + (entry.slot | 1))
    for path, factors in value.factors.items():
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
        own = _head_copy(module, tensors)
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
        assert isinstance(module, LoRAHead)
        module.lora_heads.put(entry.slot, own, trainable=entry.trainable)
    return held or entry.trainable


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


def _slots(model: nn.Module, state: LoRAState, module: nn.Module, path: str, plan: Plan) -> LoRASlots:
    """The module's slots; its class is swapped and they are made if it has none."""
    held = module._modules.get("lora_slots")
    if held is not None:
        assert isinstance(held, LoRASlots)
        return held
    info = plan.infos.get(path) or describe_layer(module)
    own = getattr(module, "bias", None)
    sizes = (0, own.numel() if own is not None else 0) if info is None else (info.in_features, info.out_features)
    kind = "bias" if info is None else "embedding" if info.kind == "embedding" else "linear"
    mixin = {"bias": LoRABias, "embedding": LoRAEmbedding, "linear": LoRALinear}[kind]
    dtype = compute_dtype(module, model)
    slots = LoRASlots(state, kind, *sizes, device=device_of(module), dtype=dtype, row_map=plan.row_maps[path])
    slots.training, slots.fresh = module.training, type(module).forward is nn.Linear.forward
    if kind != "bias" and _RESERVED in vars(model):
        slots.reserve(*vars(model)[_RESERVED])
    slots.base = type(module)
    module.lora_slots = slots  # before the class that needs it: other threads may be in this layer's forward
    try:
        swap(module, mixin, path)
    except BaseException:
        del module.lora_slots
        raise
    return slots


def _attach(model: nn.Module) -> LoRAState:
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


def _detach(model: nn.Module, state: LoRAState) -> None:
    """The model as it was before its first adapter."""
    trained = set(state.facts["trained"])
    for path, parameter in model.named_parameters():
        if path in trained:
            parameter.requires_grad_(True)
    delattr(model, _STATE)
    unsynced = model.__dict__.pop(_UNSYNCED, None)
    if isinstance(unsynced, _Unsynced) and unsynced.others:
        setattr(model, _UNSYNCED, unsynced.others)
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _check_batch]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    unhook_row_maps(model)
    restore_layers(model)
    unhook_activation(model)


def _refuse_foreign(model: nn.Module, state: LoRAState | None, modules: Mapping[str, nn.Module]) -> None:
    size = getattr(model, "_tp_size", None) or 1
    if size > 1:
        raise LoRAUnsupportedError(
            f"This model is split over {size} devices by tensor parallelism, where a LoRA's factors would have to be "
            "sharded with it.",
            name="tp_plan",
            value=size,
            remedy="Load it without tp_plan (device_map and DDP work).",
        )
    if state is None and getattr(model, "peft_config", None):
        raise LoRAUnsupportedError(
            f"This {type(model).__name__} carries adapters of PEFT: {', '.join(map(repr, model.peft_config))}.",  # type: ignore[arg-type]
            name="peft_config",
            remedy="Unload them (delete_adapter, or PeftModel.unload), or save them and load_lora() the files.",
        )
    for path, module in modules.items():
        held = module._modules.get("lora_slots") or module._modules.get("lora_heads")
        if isinstance(held, (LoRASlots, LoRAHeads)) and held.state is not state:
            raise LoRAStateError(
                f"{path} carries adapters that were added through another model (the one inside this, or around it).",
                name=path,
                remedy="Add all adapters through the same model, or remove_lora() there first.",
            )


def _refuse_managed(model: nn.Module, entries: Iterable[Entry], what: str) -> None:
    """Refuse to take off a sharded model what fully_shard() manages: Parameters, and the classes of its own modules."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in entries:
        layers = [modules.get(path) for path in entry.record.layers]
        beneath = any(isinstance(m, Swapped) and "lora_base" not in vars(type(m)) for m in layers)
        if entry.trainable or entry.record.heads or beneath:
            refuse_sharded(
                model,
                f"Adapter {entry.name!r} was there before fully_shard() and cannot be {what}",
                "Choose what is on the model before fully_shard(), or save_lora() and build the model again.",
            )


# ---- reading, training, removing ------------------------------------------------------------------------------------


def read(model: nn.Module, name: str, tensors: Mapping[str, Tensor] | None = None) -> AdapterValue:
    """The adapter as a value: a frozen one as it came, a trainable one as it stands now, on the CPU.

    Every process of a model that fully_shard() has split must call this.

    Args:
        tensors: take what is trainable from this whole state dict of the model, rather than from the model.
    """
    state = require(model)
    entry = state.entry(name)
    resident: Resident = entry.record
    if resident.value is not None:
        return resident.value
    factors: dict[str, Factors] = {}
    biases: dict[str, Tensor] = {}
    modules = modules_of(model)
    reshard(model)

    def own(path: str, tensor: Tensor) -> Tensor:
        tensor = (whole(tensor) if tensors is None else tensors[path]).detach()
        return tensor if tensor.is_meta else tensor.to("cpu", copy=True)

    for path in resident.layers:
        slots = _present(modules, path, LoRALinear).lora_slots
        slot = slots.slots[entry.slot]
        pair = (
            slots.dense(entry.slot, lambda key, t, at=path: own(f"{at}.lora_slots.{key}", t))
            if entry.trainable
            else slots.read(entry.slot)
        )
        assert pair is not None
        extras = slots.extras(entry.slot, lambda key, t, at=path: own(f"{at}.lora_slots.{key}", t))
        kind = "embedding" if slots.kind == "embedding" else "linear"
        blocks = tuple(Block(role, rows) for role, rows in slot.blocks)
        rslora = resident.config.use_rslora
        A, B = pair
        factors[path] = Factors(kind, A, B, slot.alpha, rslora, blocks, extras, slot.anchored, slot.form)  # type: ignore[arg-type]
    for path in resident.biases:
        owner = _present(modules, path.rpartition(".")[0], LoRALinear)
        key = f"bias{entry.slot}"
        biases[path] = own(f"{path.rpartition('.')[0]}.lora_slots.{key}", owner.lora_slots.get_parameter(key))
    heads = {
        path: {
            key: own(f"{path}.lora_heads.copies.{entry.slot}.{key}", tensor)
            for key, tensor in _present(modules, path, LoRAHead).lora_heads.copies[str(entry.slot)].state_dict().items()
        }
        for path in resident.heads
    }
    return AdapterValue(resident.config, factors, biases, heads)


def _present(modules: Mapping[str, nn.Module], path: str, kind: type[Any]) -> Any:
    module = modules.get(path)
    if not isinstance(module, kind):
        raise LoRAStateError(
            f"{path}: the layer that held the adapter was replaced by a {type(module).__name__} after it was added.",
            name=path,
            remedy="Change the model's layers before adding a LoRA.",
        )
    return module


def refill(model: nn.Module, values: Mapping[str, AdapterValue]) -> None:
    """Write values into resident trainable adapters' own Parameters (an optimizer keeps them), all of them or nothing.

    Args:
        values: by the adapter's name.

    Raises:
        LoRAMismatchError: a value is not of the same layers, ranks, biases and heads.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    values = {name: unpooled(value, modules) for name, value in values.items()}
    for name, value in values.items():
        problems = _refill_problems(read(model, name), value, modules)
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
            _refill(modules, entry.slot, value)
        else:
            put(model, value, name, replace=True)


def _refill_problems(have: AdapterValue, value: AdapterValue, modules: Mapping[str, nn.Module]) -> list[str]:
    problems = [f"{path}: not in the file" for path in have.factors.keys() - value.factors.keys()]
    problems += [f"{path}: not on the model" for path in value.factors.keys() - have.factors.keys()]
    if have.config.alora_invocation_tokens != value.config.alora_invocation_tokens:
        problems.append(f"alora_invocation_tokens: {value.config.alora_invocation_tokens} in the file")
    for path in have.factors.keys() & value.factors.keys():
        mine, other = have.factors[path], value.factors[path]
        if (mine.A.shape, mine.B.shape, mine.blocks) != (other.A.shape, other.B.shape, other.blocks):
            problems.append(f"{path}: rank or slices differ ({other.rank} in the file, {mine.rank} on the model)")
        elif mine.extras.keys() != other.extras.keys():
            problems.append(f"{path}: {sorted(other.extras)} in the file, {sorted(mine.extras)} on the model")
        elif mine.form != other.form:
            problems.append(f"{path}: of the form {other.form} in the file, {mine.form} on the model")
        elif mine.scaling != other.scaling:
            problems.append(f"{path}: scaling {other.scaling} in the file, {mine.scaling} on the model")
    for what in ("biases", "modules"):
        a, b = getattr(have, what).keys(), getattr(value, what).keys()
        problems += [f"{path}: only on the model" for path in a - b] + [f"{path}: only in the file" for path in b - a]
    for path in value.modules:
        problems += head_problems(path, modules.get(path), value.modules[path])
    return problems


@torch.no_grad()
def _refill(modules: Mapping[str, Any], index: int, value: AdapterValue) -> None:
    for path, factors in value.factors.items():
        slots: LoRASlots = modules[path].lora_slots
        slot, B = slots.slots[index], factors.B
        if slot.blocks:
            rows, columns = block_index(slot.blocks, slot.rank)
            B = B[rows, columns]
        for name, part in {**slot.parts(factors.A, B), **factors.extras}.items():
            assign(slots.get_parameter(f"{name}{index}"), part)
    for path, bias in value.biases.items():
        assign(modules[path.rpartition(".")[0]].lora_slots.get_parameter(f"bias{index}"), bias)
    for path, tensors in value.modules.items():
        for key, own in modules[path].lora_heads.copies[str(index)].state_dict().items():
            assign(own, tensors[key])


def train(model: nn.Module, names: Iterable[str]) -> None:
    """Choose which adapters train: these, and no others.

    An adapter that starts to train moves from the frozen banks to float32 Parameters, and back when it stops; a new
    optimizer is needed then.
    """
    state = require(model)
    state.require_unmerged("train_lora")
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, Iterable):
        raise LoRANameError(
            f"{names!r} names no adapters.",
            value=names,
            expected=tuple(state.entries),
            remedy='Give a name or a list of names: train_lora("task"); an empty list freezes all.',
        )
    chosen = [state.entry(name) for name in names]
    changing = [entry for entry in state.entries.values() if entry.trainable != (entry in chosen)]
    state.require_unused("train_lora", changing)
    if changing:
        refuse_sharded(model, "train_lora() cannot be used", "Choose what trains before fully_shard().")
    with state.lock, torch.inference_mode(False):
        for entry in changing:
            _convert(model, state, entry)


def _convert(model: nn.Module, state: LoRAState, entry: Entry) -> None:
    """Move an adapter between Parameters and banks, through a new slot: if it fails, the old one is as it was."""
    value = read(model, entry.name)
    moved = Entry(entry.name, state.free_slot(), not entry.trainable)
    try:
        held = _write(model, state, moved, value, make_plan(model, value, None))
    except BaseException:
        _erase(model, moved)
        raise
    old = Entry(entry.name, entry.slot, entry.trainable)
    entry.slot, entry.trainable = moved.slot, moved.trainable
    entry.record.value = None if held else value
    _erase(model, old)


def remove(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off the model, or all; with the last one the model is what it was, class by class, bit by bit.

    Raises:
        LoRAStateError: inside `use_lora` or `route_lora` of that adapter.
    """
    state = require(model)
    chosen = list(state.entries.values()) if name is None else [state.entry(name)]
    state.require_unused("remove_lora", chosen)
    _refuse_managed(model, chosen, "removed")
    with state.lock:
        for entry in chosen:
            _forget(model, state, entry)
            state.entries = {n: e for n, e in state.entries.items() if e is not entry}
        if not state.entries:
            _detach(model, state)


def _forget(model: nn.Module, state: LoRAState, entry: Entry) -> None:
    entry.alive = False
    state.removals += 1
    left = tuple((e, w) for e, w in state.default.mixture if e is not entry)
    if len(left) != len(state.default.mixture):
        state.default = Active(left) if left else NOTHING
    _erase(model, entry)


def _erase(model: nn.Module, entry: Entry) -> None:
    """Take an adapter out of every layer; a layer that holds none gets its class back."""
    for module in modules_of(model).values():
        if isinstance(module, LoRALinear):
            module.lora_slots.remove(entry.slot)
            if not module.lora_slots.slots:
                restore(module)  # the class first: see LoRALinear.forward
                del module.lora_slots
        elif isinstance(module, LoRAHead):
            if str(entry.slot) in module.lora_heads.copies:
                del module.lora_heads.copies[str(entry.slot)]
            if not len(module.lora_heads.copies):
                restore(module)
                del module.lora_heads
