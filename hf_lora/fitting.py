"""Whether an adapter fits a model: every problem is found, and listed, before anything is touched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import row_maps
from .errors import LoRAMismatchError
from .expertnames import expert_of, path_of
from .expertputting import expert_problems
from .extras import EXTRAS
from .layerinfo import is_held, modules_of, only_read, out_of
from .layers import BIAS_ADDED, LoRAHead, LoRALinear
from .quantised import rounding_problem
from .rounding import rounding_of
from .sharding import whole
from .state import LoRAState
from .targeting import LayerInfo, describe_layer, resolve
from .tokenfields import ROWS, ids_of
from .tokens import problems_of
from .tying import tie_problems
from .values import AdapterValue, Factors, group_blocks
from .weights import compute_dtype, is_dense, materialised

__all__ = [
    "Plan",
    "adds_bias",
    "attention_kinds",
    "base_state",
    "head_problems",
    "make_plan",
    "own_state",
    "unpooled",
    "weight_problem",
]

_MOST_NAMED = 64  # kinds of adapters (sets of targets) of which a model remembers what they name


@dataclass
class Plan:
    """What `put` found in the model for each path of the value."""

    modules: Mapping[str, nn.Module]
    infos: dict[str, LayerInfo]  # of layers that hold no adapter yet
    row_maps: dict[str, str]  # of the same layers, as `batches.row_maps`
    shared: Mapping[str, tuple[str, ...]]  # of modules whose rows train: those that share the weight
    together: tuple[str, ...] = ()  # modules that train as one, the input embedding first (ensure_weight_tying)


def make_plan(
    model: nn.Module,
    value: AdapterValue,
    state: LoRAState | None,
    *,
    complete: bool = False,
    finite: bool = False,
    modules: Mapping[str, nn.Module] | None = None,
) -> Plan:
    """Find the module of every path of the value.

    Args:
        state: the adapters on the model already, or None.
        complete: also refuse a value that lacks what its config names on this model.
        finite: its tensors were looked through already.
        modules: the model's modules by name, if at hand.

    Raises:
        LoRAMismatchError: it does not fit; lists every problem.
    """
    modules = modules_of(model) if modules is None else modules
    infos: dict[str, LayerInfo] = {}
    problems: list[str] = []
    rounding = rounding_of(value.config)
    heads = {h for e in (state.entries.values() if state else ()) for h in e.record.heads}
    problems += expert_problems(value.factors, modules)
    for path, factors in value.factors.items():
        module = modules.get(path)
        if expert_of(path) is not None:
            continue
        if module is None:
            problems.append(f"{path}: the model has no such module")
            continue
        if path in heads or isinstance(module, LoRAHead):
            problems.append(f"{path}: another adapter on this model trains it whole (modules_to_save)")
            continue
        around = out_of(path, modules)
        held: Any = module._modules.get("lora_slots")
        if held is not None and held.kind != "bias":
            kind, want = held.kind, (held.in_features, held.out_features)
        else:
            info = describe_layer(module)
            above, _, leaf = path.rpartition(".")
            if reason := only_read(modules.get(above), leaf):
                problems.append(f"{path}: {reason}")
                continue
            if info is None or (around is not None and describe_layer(modules[around]) is None):
                problems.append(f"{path}: a {type(module).__name__} takes no LoRA")
                continue
            infos[path] = info
            kind = info.pair
            want = (info.in_features, info.out_features)
        got = (factors.in_features, factors.out_features)
        if kind != factors.kind:
            problems.append(f"{path}: the adapter's factors are of a {factors.kind}, the layer is a {kind}")
        elif (lacking := weight_problem(module, factors.extras, factors.rank)) is not None:
            problems.append(f"{path}: {lacking[1]}")
        elif (rounding is not None and (odd := rounding_problem(module, rounding, kind, len(factors.blocks)))) or (
            kind == "conv" and (odd := _odd_kernel(module, factors))
        ):
            problems.append(f"{path}: {odd}")
        elif want != got:
            problems.append(f"{path}: the factors are {got[0]} -> {got[1]}, the layer is {want[0]} -> {want[1]}")
    problems += _attention_problems(value, modules)
    for path, bias in value.biases.items():
        owner = modules.get(path.rpartition(".")[0])
        own = getattr(owner, "bias", None)
        if owner is None or not isinstance(own, Tensor):
            problems.append(f"{path}: the model has no such bias")
        elif own.shape != bias.shape:
            problems.append(f"{path}: {tuple(bias.shape)}, the model's is {tuple(own.shape)}")
        elif not adds_bias(owner):
            problems.append(f"{path}: the bias of a {type(owner).__name__} cannot be adapted")
    shared, unfit = problems_of(model, modules, value)
    together, differing = tie_problems(model, value)
    problems += unfit + differing
    for path, tensors in value.modules.items():
        problems += head_problems(path, modules.get(path), tensors)
        for other in shared.get(path, ()):
            problems += head_problems(other, modules[other], tensors)
    for path, copied in value.embeddings.items():
        embedding = path.rpartition(".")[0]
        instead = ids_of(value.config.trainable_token_indices, embedding) if embedding in value.modules else None
        problems += _embedding_problems(path, modules.get(embedding), copied, instead or ())
    if not finite:
        problems += _not_finite(value)
    if not problems:
        problems += _overflows(model, value, modules)
    if complete and not problems:
        problems += _missing(model, value, state, modules)
    if problems:
        raise LoRAMismatchError(
            f"The adapter does not fit this {type(model).__name__}: {len(problems)} problem(s). Nothing was loaded.",
            value=type(model).__name__,
            expected=value.config.base_model,
            remedy=_remedy(value, modules),
            facts=problems,
        )
    halves = [around for path in infos if (around := out_of(path, modules)) is not None]
    fresh = [*infos, *halves, *(path.rpartition(".")[0] for path in value.biases), *value.modules]
    fresh += [other for others in shared.values() for other in others]
    return Plan(modules, infos, row_maps(model, fresh, modules) if fresh else {}, shared, together)


def attention_kinds(value: AdapterValue, modules: Mapping[str, nn.Module]) -> AdapterValue:
    """The value with pairs of in_proj's kind, which a file does not tell from a Linear's where they are alone."""
    changed = {}
    for path, pair in value.factors.items():
        if pair.kind == "linear" and isinstance(modules.get(path), nn.MultiheadAttention) and not pair.extras:
            changed[path] = dataclasses.replace(pair, kind="attention", form=None)
    return dataclasses.replace(value, factors={**value.factors, **changed}) if changed else value


def _attention_problems(value: AdapterValue, modules: Mapping[str, nn.Module]) -> list[str]:
    """Biases beside nn.MultiheadAttention, which reads them and calls no layer."""
    if value.config.bias == "none":
        return []
    found = [path for path, pair in value.factors.items() if pair.kind == "attention"]
    return [f"{path}: bias={value.config.bias!r} is not for nn.MultiheadAttention" for path in found]


def _odd_kernel(module: nn.Module, factors: Factors) -> str | None:
    """Why a pair is of another convolution than this one."""
    info = describe_layer(module)
    assert info is not None
    if info.kernel != factors.kernel:
        return f"the factors are of a kernel {factors.kernel}, the layer's is {info.kernel}"
    if factors.blocks != group_blocks(info.out_features, info.groups):
        return f"the factors are of a convolution of {max(len(factors.blocks), 1)} groups, the layer has {info.groups}"
    return None


def unpooled(value: AdapterValue, modules: Mapping[str, nn.Module]) -> AdapterValue:
    """The value with a plain pair for each layer of the width that the stored A of a pooled pair has.

    PEFT pools the inputs of a layer that GPTQ quantised, and of no other; a file does not say which those were.
    """
    if not value.config.use_qalora:
        return value
    changed = {}
    for path, pair in value.factors.items():
        info = describe_layer(modules[path]) if path in modules else None
        A, B = pair.stored()
        if pair.form is not None and pair.form.pooled and info is not None and info.in_features == A.shape[1]:
            changed[path] = dataclasses.replace(pair, A=A, B=B, form=None)
    return dataclasses.replace(value, factors={**value.factors, **changed}) if changed else value


def _not_finite(value: AdapterValue) -> list[str]:
    tensors = {path: t for path, t in _tensors(value) if t.is_floating_point() and not t.is_meta}
    # A finite sum has finite terms; only where it is not are the terms looked at, since finite terms may overflow.
    doubtful = [path for path, t in tensors.items() if not math.isfinite(float(t.detach().sum(dtype=_wide(t))))]
    return [
        f"{path}: holds NaN or infinite values" for path in doubtful if not bool(torch.isfinite(tensors[path]).all())
    ]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _overflows(model: nn.Module, value: AdapterValue, modules: Mapping[str, nn.Module]) -> list[str]:
    """What would be infinite in the dtype that its layer computes in (float16 ends at 65504)."""
    problems = []
    changes = [(path, "A", f.A, 1.0) for path, f in value.factors.items()]
    changes += [(path, "scaling · B", f.B, f.scaling) for path, f in value.factors.items()]
    changes += [(path.rpartition(".")[0], "its bias", bias, 1.0) for path, bias in value.biases.items()]
    changes += [(path, name, t, f.scaling) for path, f in value.factors.items() for name, t in f.extras.items()]
    fits: dict[tuple[torch.dtype, torch.dtype, float], bool] = {}  # whatever the values
    dtypes: dict[str, torch.dtype] = {}
    for path, what, tensor, scaling in changes:
        dtype = dtypes.get(path)
        if dtype is None:
            dtype = dtypes[path] = _dtype_at(model, modules, path)
        key = (dtype, tensor.dtype, scaling)
        if key not in fits:
            fits[key] = torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max / max(abs(scaling), 1)
        if fits[key] or tensor.is_meta:
            continue
        largest, most = float(tensor.abs().max()) * abs(scaling), torch.finfo(dtype).max
        if largest > most:
            problems.append(f"{path}: {what} reaches {largest:.3g}, which {dtype} cannot hold (most {most:.3g})")
    return problems


def _dtype_at(model: nn.Module, modules: Mapping[str, nn.Module], path: str) -> torch.dtype:
    at = expert_of(path)
    if at is None:
        return compute_dtype(modules[path], model)
    owner, _, name = at[0].rpartition(".")
    parameter = modules[owner]._parameters[name]
    assert parameter is not None
    return parameter.dtype


def _missing(
    model: nn.Module, value: AdapterValue, state: LoRAState | None, modules: Mapping[str, nn.Module]
) -> list[str]:
    """What the config names on this model and the file does not hold."""
    targets, heads = _named(model, value, state, modules)
    halves = {
        out_of(path, modules): path for path in targets
    }  # either projection of nn.MultiheadAttention may be alone
    beside = {path: halves.get(path) or out_of(path, modules) for path in targets}
    missing = [path for path in targets if path not in value.factors and beside[path] not in value.factors]
    wanted: list[str] = []
    if value.config.bias != "none":
        biases = [f"{path}.bias" for path in value.factors if getattr(modules.get(path), "bias", None) is not None]
        wanted = [path for path in biases if path not in value.biases]
    return (
        [f"{path}: the config names it, the file has no factors for it" for path in missing]
        + [
            f"{path}: the config names it (modules_to_save), the file does not hold it"
            for path in heads
            if path not in value.modules
        ]
        + [f"{path}: the config trains it (bias={value.config.bias!r}), the file does not hold it" for path in wanted]
    )


def _named(
    model: nn.Module, value: AdapterValue, state: LoRAState | None, modules: Mapping[str, nn.Module]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the targets and heads that a file's config names; remembered for the next adapter of the same kind."""
    c = value.config
    asked = (
        *(c.target_modules, c.exclude_modules, c.layers_to_transform, c.layers_pattern),
        *(c.modules_to_save, c.task_type, c.target_parameters),
    )
    known = {} if state is None else state.facts.setdefault("named", {})
    layers = tuple((path, getattr(type(m), "lora_base", type(m))) for path, m in modules.items())
    found = known.get(asked)
    if found is None or found[0] != layers:
        resolved = resolve(model, c, from_file=True)
        experts = [path_of(target.path, e) for target in resolved.parameters for e in range(target.experts)]
        found = (layers, (*(target.path for target in resolved.targets), *experts), resolved.heads)
        if len(known) < _MOST_NAMED:
            known[asked] = found
    return found[1:]


def _tensors(value: AdapterValue) -> Iterator[tuple[str, Tensor]]:
    for path, factors in value.factors.items():
        yield f"{path}.A", factors.A
        yield f"{path}.B", factors.B
        yield from ((f"{path}.{name}", tensor) for name, tensor in factors.extras.items())
    yield from value.biases.items()
    for path, tensors in value.modules.items():
        yield from ((f"{path}.{key}", tensor) for key, tensor in tensors.items())


def weight_problem(module: nn.Module, extras: Iterable[str], rank: int) -> tuple[str, str] | None:
    """The field of a variant that the layer's weight cannot serve, and why."""
    for name in extras:
        field = EXTRAS[name].field
        if EXTRAS[name].weight and not is_dense(module):
            return field, f"{field} needs the weight of the base, which is quantised in this {type(module).__name__}"
        if EXTRAS[name].weight and EXTRAS[name].size == "rank":
            weight: Any = module.weight
            if rank >= min(weight.shape):
                return field, f"{field} with rank {rank} leaves no singular value of a weight {tuple(weight.shape)}"
    return None


def head_problems(path: str, module: nn.Module | None, tensors: Mapping[str, Tensor]) -> list[str]:
    """Why `tensors` is not the state dict of a module that an adapter may train whole; empty if it is."""
    if module is None:
        return [f"{path}: the model has no such module (a head of another class of model?)"]
    if (info := describe_layer(module)) is not None and info.kind == "attention" and info.weight == "weight":
        return [f"{path}: nn.MultiheadAttention reads this layer's weight and never calls it"]
    if isinstance(module, LoRALinear):
        if not module.lora_slots.slots:
            return [f"{path}: room for factors is reserved there (reserve_lora), so it cannot train whole"]
        return [f"{path}: another adapter has LoRA factors there, so this one cannot train it whole"]
    if ROWS in tensors:
        return []  # see `tokens.token_problems`
    own = own_state(module)
    problems = [f"{path}.{key}: not in the adapter" for key in own.keys() - tensors.keys()]
    problems += [f"{path}.{key}: not in the model" for key in tensors.keys() - own.keys()]
    for key in own.keys() & tensors.keys():
        if own[key].shape != tensors[key].shape:
            problems.append(f"{path}.{key}: {tuple(tensors[key].shape)}, the model's is {tuple(own[key].shape)}")
    return sorted(problems)


def _embedding_problems(path: str, module: nn.Module | None, copied: Tensor, instead: Sequence[int] = ()) -> list[str]:
    # PEFT copies a base embedding into the file. It must be this base's, or the outputs would not be the adapter's.
    own = getattr(module, "weight", None)
    if not isinstance(own, Tensor):
        return [f"{path}: the model has no such embedding"]
    if own.shape != copied.shape:
        return [f"{path}: the file's copy is {tuple(copied.shape)}, the model's {tuple(own.shape)} (tokens added?)"]
    if own.is_meta:
        return []
    ours, theirs = whole(own).detach().cpu(), copied.to(own.dtype).cpu()
    if instead:  # rows that the adapter brings: what a base was resized to began at random
        ids = torch.tensor(instead)
        ours, theirs = (t.index_fill(0, ids[ids < len(t)], 0) for t in (ours, theirs))
    if torch.equal(ours, theirs):
        return []
    return [f"{path}: the file carries an embedding that differs from this base's, so it was made on another base"]


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the module's state dict as it is in the base, offloaded tensors included."""
    return {
        key: materialised(module.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2])
        for key in own_state(module)
    }


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict as it is in the base."""
    return {k: v for k, v in module.state_dict().items() if not is_held(k)}


def _remedy(value: AdapterValue, modules: Mapping[str, nn.Module]) -> str:
    """Say which base it wants; where the paths only lack or carry a prefix, say that."""
    path = next(iter(value.factors))
    longer = next((m for m in modules if m.endswith(f".{path}")), None)
    shorter = next((m for m in modules if m and path.endswith(f".{m}") and describe_layer(modules[m])), None)
    if path not in modules and longer:
        prefix = longer.removesuffix(path)
        return (
            f"Its paths lack {prefix!r}: it was made on the model inside this one; load it into that ({prefix[:-1]})."
        )
    if path not in modules and shorter:
        prefix = path.removesuffix(shorter)
        return f"Its paths begin with {prefix!r}: it was made on a model with a head around this one; load it there."
    base = value.config.base_model
    return f"Load it into the base it was made on: {base!r}." if base else "Load it into the base it was made on."


def adds_bias(module: nn.Module) -> bool:
    """Whether the layer simply adds its bias to its output, so that an adapter can change it there."""
    info = describe_layer(module)
    if info is not None and info.kind == "attention":  # nobody calls it
        return False
    if isinstance(module, nn.LayerNorm):  # a subclass with a forward of its own may have its channels elsewhere
        return getattr(type(module), "lora_base", type(module)).forward is nn.LayerNorm.forward
    return isinstance(module, BIAS_ADDED) or (info is not None and info.kind != "embedding")
