"""Adapters on a model: add, put, read, remove, choose what trains. On any `nn.Module`, in place.

Whatever puts an adapter goes through `put`, which checks everything before it touches anything.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import LoRAConfig
from .errors import LoRAMismatchError, LoRANameError, LoRAStateError, LoRAUnsupportedError
from .layers import (
    BIAS_ADDED,
    LoRABias,
    LoRAEmbedding,
    LoRAHead,
    LoRAHeads,
    LoRALinear,
    LoRASlots,
    Slot,
    Swapped,
    block_index,
    restore,
    swap,
)
from .state import NOTHING, Active, Entry, LoRAState
from .targeting import LayerInfo, Resolution, describe_layer, inner_paths, resolve
from .values import AdapterValue, Block, Factors
from .weights import compute_dtype, device_of

__all__ = ["Resident", "add", "put", "read", "refill", "remove", "require", "state_of", "train"]

_STATE = "_lora_state"


@dataclass
class Resident:
    """What the model keeps of one adapter beside its factors in the layers."""

    config: LoRAConfig
    layers: tuple[str, ...]  # paths of layers with factors
    biases: tuple[str, ...]  # paths of parameters
    heads: tuple[str, ...]  # paths of modules trained whole
    value: AdapterValue | None = None  # a frozen adapter as it came, so that saving it again loses nothing
    skipped: tuple[str, ...] = ()  # what targeting left out, for the summary
    architecture: str | None = ""  # whose table gave the roles; None: told from structure; "": loaded, roles not needed

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
) -> Resolution:
    """Put a new adapter on a model and freeze the base. B starts at zero, so the model computes what it did before.

    Args:
        config: a `LoRAConfig`, or a `peft.LoraConfig`.
        name: any string that is not taken.
        active: make it the only active adapter; the others stay, frozen.
        trainable: let it train.
        replace: put it in place of an adapter of this name.

    Returns:
        What the config resolved to.

    Raises:
        LoRATargetError, LoRAConfigError, LoRAUnsupportedError: the config does not fit this model.
        LoRANameError: the name is taken. LoRAStateError: the model is merged or routed.
    """
    if not isinstance(config, LoRAConfig):
        config = LoRAConfig.from_peft(config)
    config.require_supported(constructing=True)
    found = resolve(model, config)
    value = _initial(model, config, found)
    put(model, value, name, trainable=trainable, replace=replace, active=False)
    state = require(model)
    entry = state.entry(name)
    entry.record.skipped, entry.record.architecture = found.skipped, found.architecture
    if trainable:
        train(model, [name])
    if active:
        state.default = Active(((entry, 1.0),))
    return found


def _initial(model: nn.Module, config: LoRAConfig, found: Resolution) -> AdapterValue:
    factors, modules = {}, dict(model.named_modules())
    for target in found.targets:
        module = modules[target.path]
        dtype = torch.promote_types(compute_dtype(module, model), torch.float32)
        # A tensor on meta has no values: factors of a meta model are made on meta, to be filled with the base.
        device = torch.device("meta") if device_of(module).type == "meta" else torch.device("cpu")
        embedding = target.info.kind == "embedding"
        n, r = max(len(target.blocks), 1), target.rank
        A = torch.empty(n * r, target.info.in_features, dtype=dtype, device=device)
        B = torch.zeros(target.info.out_features, n * r, dtype=dtype, device=device)
        blocks = tuple(Block(role, rows) for role, rows in target.blocks)
        for i in range(n):
            rows = blocks[i].index(device) if blocks else torch.arange(target.info.out_features, device=device)
            part = torch.zeros(len(rows), r, dtype=dtype, device=device)
            _initialise(A[i * r : (i + 1) * r], part, config.init, embedding)
            B[rows, i * r : (i + 1) * r] = part
        alpha = target.alpha * (math.sqrt(n) if config.use_rslora else n)
        kind = "embedding" if embedding else "linear"
        factors[target.path] = Factors(kind, A, B, alpha, config.use_rslora, blocks)  # type: ignore[arg-type]
    biases = {
        path: parameter.detach().cpu().clone() for path, parameter in _biases(model, config, set(factors), found.heads)
    }
    heads = {
        path: {k: v.detach().cpu().clone() for k, v in modules[path].state_dict().items()} for path in found.heads
    }
    if any(target.info.kind == "conv1d" for target in found.targets):
        config = config.replace(fan_in_fan_out=True)
    if config.base_model is None:
        config = config.replace(base_model=getattr(getattr(model, "config", None), "_name_or_path", None) or None)
    return AdapterValue(config, factors, biases, heads)


def _initialise(A: Tensor, B: Tensor, how: str, embedding: bool) -> None:
    """A (r, in) random and B (out, r) zero, as the paper; of an embedding A is zero and B normal, as in loralib."""
    if embedding:
        nn.init.normal_(B)
        nn.init.normal_(A) if how == "off" else nn.init.zeros_(A)
        return
    if how == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if how == "off":
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))


def _biases(
    model: nn.Module, config: LoRAConfig, targets: set[str], heads: Iterable[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    """The bias vectors that the config trains, one name each."""
    if config.bias == "none":
        return
    modules, seen = dict(model.named_modules()), set()
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = path.rpartition(".")
        if leaf != "bias" or id(parameter) in seen or any(f"{owner}.".startswith(f"{head}.") for head in heads):
            continue
        wanted = owner in targets if config.bias == "lora_only" else _adds_bias(modules[owner])
        if wanted:
            seen.add(id(parameter))
            yield path, parameter


def _adds_bias(module: nn.Module) -> bool:
    info = describe_layer(module)
    return isinstance(module, BIAS_ADDED) or (info is not None and info.kind != "embedding")


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
) -> None:
    """Put an adapter on a model: all of it, or nothing.

    Args:
        value: the adapter.
        name: any string that is not taken.
        trainable: as float32 Parameters that require gradients; otherwise into the frozen banks.
        replace: put it in place of the adapter of this name.
        active: make it the only active one; None does so only if nothing is active.
        complete: also refuse a value that lacks what its config names on this model (a file with tensors missing).

    Raises:
        LoRAMismatchError: it does not fit; lists every missing module and wrong shape. The model is as before.
        LoRANameError: the name is taken, or empty. LoRAStateError: the model is merged or routed.
    """
    if not isinstance(name, str) or not name:
        raise LoRANameError(
            f"{name!r} is no name for an adapter.", value=name, expected="a string that is not empty"
        )
    value.config.require_supported()
    _refuse_sharded(model)
    state = state_of(model)
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
    plan = _plan(model, value, state, complete)
    fresh = state is None
    state = _attach(model) if state is None else state
    with state.lock:
        entry = Entry(name, state.free_slot(), trainable)
        resident = Resident(value.config, tuple(value.factors), tuple(value.biases), tuple(value.modules))
        resident.value = None if trainable else value
        entry.record = resident
        try:
            _write(model, state, entry, value, plan)
        except BaseException:
            _erase(model, entry)
            if fresh:
                _detach(model, state)
            raise
        old = state.entries.pop(name, None)
        was_active = old is not None and old in state.default.entries
        if old is not None:
            _forget(model, state, old)
        state.entries[name] = entry
        if was_active or active or (active is None and not state.default.mixture):
            state.default = Active(((entry, 1.0),))


@dataclass
class _Plan:
    """What `put` found in the model for each path of the value."""

    modules: dict[str, nn.Module]
    infos: dict[str, LayerInfo]
    inner: frozenset[str]


def _plan(model: nn.Module, value: AdapterValue, state: LoRAState | None, complete: bool = False) -> _Plan:
    modules = dict(model.named_modules(remove_duplicate=False))
    infos: dict[str, LayerInfo] = {}
    problems: list[str] = []
    heads = {h for e in (state.entries.values() if state else ()) for h in e.record.heads}
    for path, factors in value.factors.items():
        module = modules.get(path)
        if module is None:
            problems.append(f"{path}: the model has no such module")
            continue
        if path in heads:
            problems.append(f"{path}: another adapter on this model trains it whole (modules_to_save)")
            continue
        info = describe_layer(module)
        if info is None:
            problems.append(f"{path}: a {type(module).__name__} takes no LoRA")
            continue
        kind = "embedding" if info.kind == "embedding" else "linear"
        want, got = (info.in_features, info.out_features), (factors.in_features, factors.out_features)
        if kind != factors.kind:
            problems.append(f"{path}: the adapter's factors are of a {factors.kind}, the layer is a {kind}")
        elif want != got:
            problems.append(f"{path}: the factors are {got[0]} -> {got[1]}, the layer is {want[0]} -> {want[1]}")
        infos[path] = info
    for path, bias in value.biases.items():
        owner = modules.get(path.rpartition(".")[0])
        own = getattr(owner, "bias", None)
        if owner is None or not isinstance(own, Tensor):
            problems.append(f"{path}: the model has no such bias")
        elif own.shape != bias.shape:
            problems.append(f"{path}: {tuple(bias.shape)}, the model's is {tuple(own.shape)}")
        elif not _adds_bias(owner):
            problems.append(f"{path}: the bias of a {type(owner).__name__} cannot be adapted")
    for path, tensors in value.modules.items():
        problems += _head_problems(path, modules.get(path), tensors)
    for path, copied in value.embeddings.items():
        problems += _embedding_problems(path, modules.get(path.rpartition(".")[0]), copied)
    for tensor_path, tensor in _tensors(value):
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            problems.append(f"{tensor_path}: holds NaN or infinite values")
    if complete and not problems:
        problems += _missing(model, value)
    if problems:
        raise LoRAMismatchError(
            f"The adapter does not fit this {type(model).__name__}: {len(problems)} problem(s). Nothing was loaded.",
            value=type(model).__name__,
            expected=value.config.base_model,
            remedy=_remedy(value, modules),
            facts=problems,
        )
    return _Plan(modules, infos, frozenset(inner_paths(model, value.factors)))


def _missing(model: nn.Module, value: AdapterValue) -> list[str]:
    """What the config names on this model and the file does not hold."""
    found = resolve(model, value.config, from_file=True)
    targets = [target.path for target in found.targets if target.path not in value.factors]
    return [f"{path}: the config names it, the file has no factors for it" for path in targets] + [
        f"{path}: the config names it (modules_to_save), the file does not hold it"
        for path in found.heads
        if path not in value.modules
    ]


def _tensors(value: AdapterValue) -> Iterator[tuple[str, Tensor]]:
    for path, factors in value.factors.items():
        yield f"{path}.A", factors.A
        yield f"{path}.B", factors.B
    yield from value.biases.items()
    for path, tensors in value.modules.items():
        yield from ((f"{path}.{key}", tensor) for key, tensor in tensors.items())


def _head_problems(path: str, module: nn.Module | None, tensors: Mapping[str, Tensor]) -> list[str]:
    if module is None:
        return [f"{path}: the model has no such module (a head of another class of model?)"]
    if isinstance(module, Swapped) and not isinstance(module, LoRAHead):
        return [f"{path}: another adapter has LoRA factors there, so this one cannot train it whole"]
    own = _own_state(module)
    problems = [f"{path}.{key}: not in the adapter" for key in own.keys() - tensors.keys()]
    problems += [f"{path}.{key}: not in the model" for key in tensors.keys() - own.keys()]
    for key in own.keys() & tensors.keys():
        if own[key].shape != tensors[key].shape:
            problems.append(f"{path}.{key}: {tuple(tensors[key].shape)}, the model's is {tuple(own[key].shape)}")
    return sorted(problems)


def _embedding_problems(path: str, module: nn.Module | None, copied: Tensor) -> list[str]:
    # PEFT copies a base embedding into the file. It must be this base's, or the outputs would not be the adapter's.
    own = getattr(module, "weight", None)
    if not isinstance(own, Tensor):
        return [f"{path}: the model has no such embedding"]
    if own.shape != copied.shape:
        return [f"{path}: the file's copy is {tuple(copied.shape)}, the model's {tuple(own.shape)} (tokens added?)"]
    if own.is_meta or torch.equal(own.detach().cpu(), copied.to(own.dtype).cpu()):
        return []
    return [f"{path}: the file carries an embedding that differs from this base's, so it was made on another base"]


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict().items() if not k.startswith(("lora_heads.", "lora_slots."))}


def _remedy(value: AdapterValue, modules: Mapping[str, nn.Module]) -> str:
    """Say which base it wants; where the paths only lack or carry a prefix, say that."""
    path = next(iter(value.factors))
    longer = next((m for m in modules if m.endswith(f".{path}")), None)
    shorter = next((m for m in modules if m and path.endswith(f".{m}") and describe_layer(modules[m])), None)
    if path not in modules and longer:
        prefix = longer.removesuffix(path)
        return f"Its paths lack {prefix!r}: it was made on the model inside this one; load it into that ({prefix[:-1]})."
    if path not in modules and shorter:
        prefix = path.removesuffix(shorter)
        return f"Its paths begin with {prefix!r}: it was made on a model with a head around this one; load it there."
    base = value.config.base_model
    return f"Load it into the base it was made on: {base!r}." if base else "Load it into the base it was made on."


def _write(model: nn.Module, state: LoRAState, entry: Entry, value: AdapterValue, plan: _Plan) -> None:
    for path, factors in value.factors.items():
        module, info = plan.modules[path], plan.infos[path]
        slots = _slots(model, state, module, path, info, path in plan.inner)
        bias = value.biases.get(f"{path}.bias")
        slot = Slot(
            factors.rank,
            factors.alpha,
            factors.scaling,
            value.config.dropout,
            entry.trainable,
            blocks=tuple((block.role, block.rows) for block in factors.blocks),
            bias=bias is not None,
        )
        A, B = factors.A, factors.B
        if entry.trainable:
            master = torch.promote_types(A.dtype, torch.float32)
            if slot.blocks:
                rows, columns = block_index(slot.blocks, slot.rank)
                B = B[rows.to(B.device), columns.to(B.device)]
            slots.put_trainable(entry.slot, slot, A.to(master), B.to(master), _master(bias))
        else:
            slots.put_frozen(entry.slot, slot, A, B, _bias_change(module, bias))
    for path, bias in value.biases.items():
        owner = path.rpartition(".")[0]
        if owner in value.factors:
            continue
        module = plan.modules[owner]
        slots = _slots(model, state, module, owner, None, False)
        slot = Slot(trainable=entry.trainable, bias=True)
        if entry.trainable:
            slots.put_trainable(entry.slot, slot, None, None, _master(bias))
        else:
            slots.put_frozen(entry.slot, slot, None, None, _bias_change(module, bias))
    for path, tensors in value.modules.items():
        module = plan.modules[path]
        own = copy.deepcopy(module)
        if isinstance(own, LoRAHead):
            del own._modules["lora_heads"]
            restore(own)
        own.load_state_dict(dict(tensors))
        if not isinstance(module, LoRAHead):
            swap(module, LoRAHead, path)
            module.lora_heads = LoRAHeads(state)
            module.lora_heads.train(module.training)
        assert isinstance(module, LoRAHead)
        module.lora_heads.put(entry.slot, own, trainable=entry.trainable)


def _master(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32))


def _bias_change(module: nn.Module, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    own = module.bias
    assert isinstance(own, Tensor)
    return bias.to(own.device).float() - own.detach().float()


def _slots(
    model: nn.Module, state: LoRAState, module: nn.Module, path: str, info: LayerInfo | None, inner: bool
) -> LoRASlots:
    """The module's slots; its class is swapped and they are made if it has none."""
    if isinstance(module, LoRALinear):
        if info is not None and module.lora_slots.kind == "bias":
            raise LoRAUnsupportedError(
                f"{path}: an adapter on this model trains only its bias; factors cannot join it.",
                name=path,
                remedy="Load this adapter first.",
            )
        return module.lora_slots
    kind = "bias" if info is None else "embedding" if info.kind == "embedding" else "linear"
    sizes = (0, module.bias.numel()) if info is None else (info.in_features, info.out_features)  # type: ignore[operator,union-attr]
    mixin = {"bias": LoRABias, "embedding": LoRAEmbedding, "linear": LoRALinear}[kind]
    slots = LoRASlots(
        state, kind, *sizes, device=device_of(module), dtype=compute_dtype(module, model), inner=inner
    )  # fmt: skip
    slots.train(module.training)
    swap(module, mixin, path)
    module.lora_slots = slots
    return slots


def _attach(model: nn.Module) -> LoRAState:
    """Give the model a state and freeze its base."""
    state = LoRAState()
    state.facts["trained"] = [path for path, p in model.named_parameters() if p.requires_grad]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    setattr(model, _STATE, state)
    return state


def _detach(model: nn.Module, state: LoRAState) -> None:
    """The model as it was before its first adapter."""
    trained = set(state.facts["trained"])
    for path, parameter in model.named_parameters():
        if path in trained:
            parameter.requires_grad_(True)
    delattr(model, _STATE)


def _refuse_sharded(model: nn.Module) -> None:
    size = getattr(model, "_tp_size", None) or 1
    if size > 1 or getattr(model, "_tp_plan_active", False):
        raise LoRAUnsupportedError(
            f"This model is split over {size} devices by tensor parallelism, where a LoRA's factors would have to be "
            "sharded with it.",
            name="tp_plan",
            value=size,
            remedy="Load it without tp_plan (device_map, FSDP2 and DDP work), or merge the adapter first.",
        )


# ---- reading, training, removing ------------------------------------------------------------------------------------


def read(model: nn.Module, name: str) -> AdapterValue:
    """The adapter as a value: a frozen one as it came, a trainable one as it stands now (copies, on the CPU)."""
    state = require(model)
    entry = state.entry(name)
    resident: Resident = entry.record
    if resident.value is not None:
        return resident.value
    factors: dict[str, Factors] = {}
    biases: dict[str, Tensor] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in resident.layers:
        slots = _present(modules, path, LoRALinear).lora_slots
        slot, pair = slots.slots[entry.slot], slots.dense(entry.slot)
        assert pair is not None
        A, B = (t.detach().to("cpu", copy=True) if not t.is_meta else t.detach() for t in pair)
        kind = "embedding" if slots.kind == "embedding" else "linear"
        blocks = tuple(Block(role, rows) for role, rows in slot.blocks)
        factors[path] = Factors(kind, A, B, slot.alpha, resident.config.use_rslora, blocks)  # type: ignore[arg-type]
    for path in resident.biases:
        owner = _present(modules, path.rpartition(".")[0], LoRALinear)
        biases[path] = owner.lora_slots.get_parameter(f"bias{entry.slot}").detach().to("cpu", copy=True)
    heads = {
        path: {
            key: tensor.detach().to("cpu", copy=True)
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


def refill(model: nn.Module, name: str, value: AdapterValue) -> None:
    """Write a value into a resident trainable adapter's own Parameters (an optimizer keeps them), all of it or nothing.

    Raises:
        LoRAMismatchError: the value is not of the same layers, ranks, biases and heads.
    """
    state = require(model)
    entry = state.entry(name)
    have = read(model, name)
    problems = [f"{path}: not in the file" for path in have.factors.keys() - value.factors.keys()]
    problems += [f"{path}: not on the model" for path in value.factors.keys() - have.factors.keys()]
    for path in have.factors.keys() & value.factors.keys():
        mine, other = have.factors[path], value.factors[path]
        if (mine.A.shape, mine.B.shape, mine.blocks) != (other.A.shape, other.B.shape, other.blocks):
            problems.append(f"{path}: rank or slices differ ({other.rank} in the file, {mine.rank} on the model)")
        elif mine.scaling != other.scaling:
            problems.append(f"{path}: scaling {other.scaling} in the file, {mine.scaling} on the model")
    for what in ("biases", "modules"):
        a, b = getattr(have, what).keys(), getattr(value, what).keys()
        problems += [f"{path}: only on the model" for path in a - b] + [f"{path}: only in the file" for path in b - a]
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in value.modules:
        problems += _head_problems(path, modules.get(path), value.modules[path])
    if problems:
        raise LoRAMismatchError(
            f"The file is not of the adapter {name!r} on this model: {len(problems)} problem(s). Nothing was loaded.",
            name=name,
            facts=sorted(problems),
            remedy="Build the model with the config that the file was trained with.",
        )
    if not entry.trainable:
        put(model, value, name, replace=True)
        return
    with torch.no_grad():
        for path, factors in value.factors.items():
            slots: LoRASlots = modules[path].lora_slots  # type: ignore[assignment]
            slot, B = slots.slots[entry.slot], factors.B
            if slot.blocks:
                rows, columns = block_index(slot.blocks, slot.rank)
                B = B[rows, columns]
            slots.get_parameter(f"A{entry.slot}").copy_(factors.A)
            slots.get_parameter(f"B{entry.slot}").copy_(B)
        for path, bias in value.biases.items():
            owner = modules[path.rpartition(".")[0]]
            owner.lora_slots.get_parameter(f"bias{entry.slot}").copy_(bias)  # type: ignore[union-attr]
        for path, tensors in value.modules.items():
            modules[path].lora_heads.copies[str(entry.slot)].load_state_dict(dict(tensors))  # type: ignore[union-attr,index]


def train(model: nn.Module, names: Iterable[str]) -> None:
    """Choose which adapters train: these, and no others.

    An adapter that starts to train moves from the frozen banks to float32 Parameters, and back when it stops; a new
    optimizer is needed then.
    """
    state = require(model)
    state.require_unmerged("train_lora")
    if isinstance(names, str):
        names = [names]
    chosen = [state.entry(name) for name in names]
    with state.lock:
        for entry in list(state.entries.values()):
            if entry.trainable != (entry in chosen):
                _convert(model, state, entry)


def _convert(model: nn.Module, state: LoRAState, entry: Entry) -> None:
    value = read(model, entry.name)
    plan = _plan(model, value, None)
    resident: Resident = entry.record
    entry.trainable = not entry.trainable
    _write(model, state, entry, value, plan)
    resident.value = None if entry.trainable else value


def remove(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off the model, or all; with the last one the model is what it was, class by class, bit by bit.

    Raises:
        LoRAStateError: inside `use_lora` or `route_lora` of that adapter.
    """
    state = require(model)
    chosen = list(state.entries.values()) if name is None else [state.entry(name)]
    if state.overridden and any(entry in state.current.entries for entry in chosen):
        raise LoRAStateError(
            f"{', '.join(repr(e.name) for e in chosen)} cannot be removed inside use_lora() or route_lora().",
            remedy="Leave the with block first.",
        )
    with state.lock:
        for entry in chosen:
            _forget(model, state, entry)
            del state.entries[entry.name]
        if not state.entries:
            _detach(model, state)


def _forget(model: nn.Module, state: LoRAState, entry: Entry) -> None:
    entry.alive = False
    left = tuple((e, w) for e, w in state.default.mixture if e is not entry)
    if len(left) != len(state.default.mixture):
        state.default = Active(left) if left else NOTHING
    _erase(model, entry)


def _erase(model: nn.Module, entry: Entry) -> None:
    """Take an adapter out of every layer; a layer that holds none gets its class back."""
    for module in list(model.modules()):
        if isinstance(module, LoRALinear):
            module.lora_slots.remove(entry.slot)
            if not module.lora_slots.slots:
                del module.lora_slots
                restore(module)
        elif isinstance(module, LoRAHead):
            if str(entry.slot) in module.lora_heads.copies:
                del module.lora_heads.copies[str(entry.slot)]
            if not len(module.lora_heads.copies):
                del module.lora_heads
                restore(module)
