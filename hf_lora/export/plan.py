"""What a merge will write, decided from headers and a model without memory, before the first byte is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bases import hub_id, is_local_path, same_base
from ..errors import LoRAConfigError, LoRAError, LoRAMismatchError, LoRAUnsupportedError
from ..expertnames import expert_of
from ..fitting import make_plan
from ..integrations.checkpoint_keys import Placed, auto_classes, dtype_of_keys, map_keys, meta_model, missing_is_fine
from ..layerinfo import describe_layer, modules_of
from ..values import AdapterValue, Factors, refuse_invoked, refuse_rows
from ..weights import weight_name
from .base import BaseFiles, Stored
from .shards import Spec

__all__ = ["CHUNK", "Item", "MergePlan", "decide", "refuse_other_base", "stored_weights"]

CHUNK = 16 * 2**20  # bytes read at a time where nothing has to be whole
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_IN_MEMORY = "Load the base with from_pretrained(), load_lora() the adapter, merge_lora() and save_pretrained()."

# task_type → the Auto class of models with its head.
_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# task_type whose head has one output for each label → where its last weight is, in a module that was saved whole.
_LABELS = {"SEQ_CLS", "TOKEN_CLS"}
_LAST = {"score": "weight", "classifier": "weight", "classification_head": "out_proj.weight"}


@dataclass(frozen=True)
class Item:
    """One tensor of the merged model.

    Args:
        spec: as it will be written.
        source: the base's tensor; None for one that the adapter brings.
        factors: what is added to it.
        transposed: the weight is (in, out), as a Conv1D's or an embedding's.
        value: what takes its place, of the adapter.
        path: in the model, for messages.
    """

    spec: Spec
    source: Stored | None
    path: str
    factors: Factors | None = None
    transposed: bool = False
    value: Tensor | None = None


@dataclass(frozen=True)
class MergePlan:
    """The merged model, tensor by tensor.

    Args:
        model: on the meta device; its config is the merged model's.
        dtype: of most of its tensors.
        items: in the order of the base's files.
        dropped: tensors of the base that this class of model does not use.
    """

    model: Any
    dtype: torch.dtype
    items: tuple[Item, ...]
    dropped: tuple[str, ...]


def refuse_other_base(value: AdapterValue, base: BaseFiles, force: bool) -> None:
    """Raise `LoRAMismatchError` where the adapter names another base; folders that say nothing are not judged."""
    wanted = value.config.base_model
    if force or not wanted or is_local_path(wanted):
        return
    here = hub_id(base.name) or hub_id(str(base.folder.resolve())) or hub_id(base.config.get("_name_or_path"))
    if here is None or hub_id(wanted) is None or same_base(here, wanted):
        return
    raise LoRAMismatchError(
        f"The adapter was made on {wanted!r}, the base is {here!r}.",
        name="base_model_name_or_path",
        value=here,
        expected=wanted,
        remedy=f"Give {wanted!r} as the base, or pass force=True (--force) if it is the same model under another name.",
    )


def decide(value: AdapterValue, base: BaseFiles, dtype: torch.dtype | None, *, complete: bool) -> MergePlan:
    """Match an adapter with a base's files.

    Args:
        dtype: of the merged model; None takes the base's, as from_pretrained does.
        complete: refuse an adapter that lacks what its config names.

    Raises:
        LoRAMismatchError: they do not fit; lists every problem.
        LoRAUnsupportedError: a tensor that the adapter changes has no place of its own in the files; the message
            says what to do instead.
    """
    refuse_invoked(value.config)
    refuse_rows(value, "A merge on disk")
    _refuse_experts(value)
    config = _config(base)
    _set_labels(value, config)
    dtype = _dtype(base, config) if dtype is None else dtype
    if dtype not in DTYPES:
        raise LoRAUnsupportedError(
            f"A model of {dtype} takes no ΔW.",
            name="dtype",
            value=dtype,
            expected=DTYPES,
            remedy="Choose bf16 or fp32.",
        )
    model = _fitting_model(value, base, config, dtype, complete)
    placed = map_keys(model, base.tensors)
    dtypes, shapes = dtype_of_keys(model, dtype), {key: tuple(t.shape) for key, t in model.state_dict().items()}
    replaced = dict(value.biases)
    for path, state in value.modules.items():
        replaced |= {f"{path}.{key}": tensor for key, tensor in state.items()}
    files = _one_each(base, placed)
    tied = _tied(model, base, placed, files)
    modules = modules_of(model)
    touched = {f"{path}.{weight_name(modules[path])}": factors for path, factors in value.factors.items()}
    _refuse_tied([*touched, *replaced], tied)
    _refuse_unreachable([*touched, *replaced], value, placed, files)
    _refuse_shapes(base, placed, shapes, replaced)
    _refuse_missing(model, placed, {*files, *replaced}, tied)
    _refuse_not_finite(replaced, dtypes)
    _refuse_other_embeddings(value, files, dtypes)

    items = []
    for name, stored in sorted(base.tensors.items(), key=lambda item: (str(item[1].file), item[1].at)):
        where = placed.get(name)
        if where is None or (where.key in tied.copies and not where.converted):
            continue
        key = where.key
        plain = not where.converted
        own = stored.dtype if not stored.dtype.is_floating_point else dtypes[key]
        called = key if plain and not where.renamed else name
        change = touched.get(key) if plain else None
        other = replaced.get(key) if plain else None
        shape = stored.shape if other is None else tuple(other.shape)
        info = describe_layer(model.get_submodule(key.rpartition(".")[0])) if change is not None else None
        if info is not None and info.groups > 1:
            raise LoRAUnsupportedError(
                f"{key}: a LoRA on a convolution with groups={info.groups} cannot be merged: its A reads all input "
                "channels, so that W + ΔW is no grouped weight.",
                name=key,
                value=info.groups,
                remedy="Run it unmerged on the base.",
            )
        turned = info is not None and info.kind in ("conv1d", "embedding")
        items.append(Item(Spec(called, own, shape), stored, key, change, turned, other))
    there = {item.path for item in items}
    for key, tensor in replaced.items():
        if key not in there:
            items.append(Item(Spec(key, dtypes[key], tuple(tensor.shape)), None, key, value=tensor))
    _refuse_same_names(items)
    return MergePlan(model, dtype, tuple(items), tuple(sorted(base.tensors.keys() - placed.keys())))


def stored_weights(value: AdapterValue, base: BaseFiles) -> dict[str, tuple[Stored, bool]]:
    """Module path → the base's tensor that its ΔW is added to, and whether it lies (in, out), not (out, in).

    Layers whose weight does not stand in the files by itself are left out. Shapes are not compared.
    """
    config, best = _config(base), None
    layers: dict[str, Any] = {}
    more = [cls for auto in _AUTO.values() for cls in auto_classes(auto, config)[:1]]
    for cls in dict.fromkeys([*_classes(value, base, config), *more]):  # the likeliest of those that fit alike
        model = meta_model(cls, config, _dtype(base, config))
        modules = modules_of(model)
        there = {path: modules[path] for path in value.factors if path in modules}
        if best is None or len(there) > len(layers):
            best, layers = model, there
        if len(layers) == len(value.factors):
            break
    if best is None:
        raise _no_class(base)
    files = _one_each(base, map_keys(best, base.tensors))
    for target, source in best.all_tied_weights_keys.items():
        for key, other in ((target, source), (source, target)):
            if key not in files and other in files:
                files[key] = files[other]
    infos = {path: describe_layer(module) for path, module in layers.items()}
    return {
        path: (files[f"{path}.weight"], info.kind in ("conv1d", "embedding"))
        for path, info in infos.items()
        if info is not None and f"{path}.weight" in files
    }


# ---- which model -----------------------------------------------------------------------------------------------------


def _config(base: BaseFiles) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base.folder)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise LoRAUnsupportedError(
            f"transformers cannot read the config of the base {base.name!r}: {str(error).splitlines()[0]}",
            name="config.json",
            value=base.config.get("model_type"),
            remedy="A model with code of its own is not merged file by file. " + _IN_MEMORY,
        ) from error


def _set_labels(value: AdapterValue, config: Any) -> None:
    """A head that the adapter brings says how many labels there are, where the base's config has another number."""
    if value.config.task_type not in _LABELS:
        return
    for path, state in value.modules.items():
        last = _LAST.get(path.rpartition(".")[2], "")
        tensor = state.get(last, state.get("out_proj.weight"))
        if tensor is not None and last and tensor.dim() == 2 and tensor.shape[0] != config.num_labels:
            config.num_labels = tensor.shape[0]


def _dtype(base: BaseFiles, config: Any) -> torch.dtype:
    """As from_pretrained(dtype="auto"): the config's, or that of the first floating tensor."""
    text = getattr(config, "dtype", None)
    named = getattr(torch, text, None) if isinstance(text, str) else text
    if isinstance(named, torch.dtype):
        return named
    floating = (stored.dtype for stored in base.tensors.values() if stored.dtype.is_floating_point)
    return next(floating, torch.float32)


def _classes(value: AdapterValue, base: BaseFiles, config: Any) -> Iterator[Any]:
    """The classes that the merged model may be of, the likeliest first."""
    import transformers

    named = [getattr(transformers, str(name), None) for name in base.config.get("architectures") or ()]
    of_task = auto_classes(_AUTO.get(value.config.task_type or "", ""), config)
    yield from (cls for cls in of_task if cls in named)
    yield from of_task[:1]
    yield from (cls for cls in named if isinstance(cls, type))
    yield from auto_classes("AutoModel", config)[:1]


def _fitting_model(value: AdapterValue, base: BaseFiles, config: Any, dtype: torch.dtype, complete: bool) -> Any:
    """The first class of model that the adapter fits, on the meta device."""
    first: LoRAError | None = None
    for cls in dict.fromkeys(_classes(value, base, config)):
        model = meta_model(cls, config, dtype)
        try:
            make_plan(model, value, None, complete=complete)
        except LoRAError as error:
            error.message = error.message.replace("Nothing was loaded", "Nothing was written")
            error.args = (error.message,)
            first = first or error
            continue
        model.config.architectures = [cls.__name__]
        model.config.dtype = str(dtype).removeprefix("torch.")  # as save_pretrained writes it
        return model
    raise first or _no_class(base)


def _no_class(base: BaseFiles) -> LoRAUnsupportedError:
    return LoRAUnsupportedError(
        f"The config of the base {base.name!r} names no class of transformers.",
        name="architectures",
        value=base.config.get("architectures"),
        remedy=_IN_MEMORY,
    )


# ---- which tensors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ties:
    groups: Mapping[str, tuple[str, ...]]  # key → the other keys of the same weight
    copies: frozenset[str]  # keys that stand in the files although another of their group does


def _one_each(base: BaseFiles, placed: Mapping[str, Placed]) -> dict[str, Stored]:
    """Key in the model → the one tensor that is copied to it as it is."""
    found: dict[str, Stored] = {}
    for name, where in placed.items():
        if where.converted:
            continue
        if where.key in found:
            raise LoRAMismatchError(
                f"The base {base.name!r} has {where.key!r} under two names, one of them {name!r}.",
                name=name,
                value=where.key,
                remedy="Save the base again with save_pretrained().",
            )
        found[where.key] = base.tensors[name]
    return found


def _tied(model: Any, base: BaseFiles, placed: Mapping[str, Placed], files: Mapping[str, Stored]) -> _Ties:
    """What transformers ties when it loads these files: all the config names, but for pairs that differ there."""
    groups: dict[str, set[str]] = {}
    copies = set()
    for target, source in model.all_tied_weights_keys.items():
        if target in files and source in files:
            if not _equal(files[target], files[source]):
                continue
            copies.add(target)
        members = groups.setdefault(source, {source})
        members.add(target)
    return _Ties({key: tuple(sorted(group - {key})) for group in groups.values() for key in group}, frozenset(copies))


def _equal(one: Stored, other: Stored) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pairs = zip(one.chunks(CHUNK), other.chunks(CHUNK), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def _refuse_tied(keys: list[str], tied: _Ties) -> None:
    for key in keys:
        if tied.groups.get(key):
            others = ", ".join(tied.groups[key])
            raise LoRAUnsupportedError(
                f"{key} is tied to {others}; a merge would change both.",
                name=key,
                value=tied.groups[key],
                remedy="Load the model and the adapter, and merge_and_save(…, untie=True); or do not adapt it.",
            )


def _refuse_unreachable(
    keys: list[str], value: AdapterValue, placed: Mapping[str, Placed], files: Mapping[str, Stored]
) -> None:
    """Refuse a weight that the adapter changes and that stands in no file by itself, in the model's own layout."""
    made: dict[str, list[str]] = {}
    for name, where in placed.items():
        for key in (where.key, *where.also) if where.converted else ():
            made.setdefault(key, []).append(name)
    brought = {f"{path}.{key}" for path, state in value.modules.items() for key in state}
    facts = [f"{key}: made of {', '.join(made[key][:4])} when the base is loaded" for key in keys if key in made]
    facts += [f"{key}: not in the base's files" for key in keys if key not in {*made, *files, *brought}]
    if facts:
        raise LoRAUnsupportedError(
            f"{len(facts)} of the weights that the adapter changes do not stand in the base's files as the model "
            "has them, so they cannot be merged file by file. Nothing was written.",
            name=facts[0].partition(":")[0],
            facts=facts,
            remedy=_IN_MEMORY,
        )


def _refuse_experts(value: AdapterValue) -> None:
    experts = next((found[0] for path in value.factors if (found := expert_of(path)) is not None), None)
    if experts is not None:
        raise LoRAUnsupportedError(
            f"{experts} is not merged file by file, where each of the experts may be a tensor of its own.",
            name="target_parameters",
            value=experts,
            remedy=_IN_MEMORY,
        )


def _refuse_shapes(
    base: BaseFiles, placed: Mapping[str, Placed], shapes: Mapping[str, tuple[int, ...]], replaced: Mapping[str, Tensor]
) -> None:
    facts = [
        f"{name}: {list(base.tensors[name].shape)}, the model's is {list(shapes[where.key])}"
        for name, where in placed.items()
        if not where.converted and where.key not in replaced and base.tensors[name].shape != shapes[where.key]
    ]
    if facts:
        raise LoRAMismatchError(
            f"{len(facts)} tensors of the base {base.name!r} do not have the shapes that its config says. "
            "Nothing was written.",
            name=facts[0].partition(":")[0],
            facts=facts,
            remedy="Give the base with the config that belongs to it.",
        )


def _refuse_missing(model: Any, placed: Mapping[str, Placed], there: set[str], tied: _Ties) -> None:
    there = there | {key for where in placed.values() for key in (where.key, *where.also)}
    missing = [
        key
        for key in model.state_dict()
        if key not in there and there.isdisjoint(tied.groups.get(key, ())) and not missing_is_fine(model, key)
    ]
    if missing:
        raise LoRAMismatchError(
            f"{len(missing)} tensors of {type(model).__name__} are neither in the base's files nor in the adapter: "
            "they would be random. Nothing was written.",
            name=missing[0],
            value=missing,
            facts=missing,
            remedy="Give the base that has them; or load the very model that the adapter was trained on, load_lora(), "
            "merge_lora() and save_pretrained().",
        )


def _refuse_not_finite(replaced: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """What replaces a bias or a head; factors are looked at as ΔW."""
    for key, tensor in replaced.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.to(dtypes[key])).all()):
            raise LoRAMismatchError(
                f"{key}: the adapter holds values there that are NaN or infinite in {dtypes[key]}.",
                name=key,
                value=math.nan,
                remedy="Check the adapter (a diverged training run?), or merge in bfloat16 or float32 (--dtype).",
            )


def _refuse_other_embeddings(
    value: AdapterValue, files: Mapping[str, Stored], dtypes: Mapping[str, torch.dtype]
) -> None:
    """PEFT copies a base embedding into the file: it must be this base's."""
    for key, copied in value.embeddings.items():
        stored, at = files.get(key), 0
        if stored is None:  # tied, and tied weights with factors are refused
            continue
        flat = copied.reshape(-1)
        for part in stored.chunks(CHUNK):
            mine = part.to(dtypes[key])
            if not torch.equal(mine, flat[at : at + len(part)].to(mine.dtype)):
                raise LoRAMismatchError(
                    f"{key}: the adapter carries an embedding that differs from this base's, so it was made on "
                    "another base.",
                    name=key,
                    remedy=f"Give the base that it was made on: {value.config.base_model!r}.",
                )
            at += len(part)


def _refuse_same_names(items: list[Item]) -> None:
    names: dict[str, str] = {}
    for item in items:
        if item.spec.name in names:
            raise LoRAConfigError(
                f"{item.spec.name!r} would be written twice, for {names[item.spec.name]!r} and {item.path!r}.",
                name=item.spec.name,
                remedy=_IN_MEMORY,
            )
        names[item.spec.name] = item.path
