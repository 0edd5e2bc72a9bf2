"""A model's layers repeated: the list of layers is made anew from ranges of it, and replicas share the base's weights.

    [[0, 4], [2, 5]]: layers 0, 1, 2, 3, 2, 3, 4

Each replica is a module of its own, so that it has factors and a place in the cache of its own; its Parameters are
those of the layer that it repeats. What was there before is kept, untouched, to be put back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .errors import LoRAConfigError, LoRAStateError, LoRAUnsupportedError
from .sharding import refuse_sharded

__all__ = ["replicated", "replication_of", "require_plain", "restore_layers"]

Spans = Sequence[Sequence[int]]  # of a config: a tuple of pairs

_KEY = "_lora_replication"
_LISTS = (("layers",), ("encoder", "layer"), ("h",))  # where PEFT looks: Llama, BERT and Falcon, and their like
_FOLLOWS = (
    "training",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
)  # what a replica may be told meanwhile


@dataclass
class _Replication:
    """What a model was before its layers were repeated."""

    spans: Spans
    owner: nn.Module
    name: str
    before: nn.ModuleList
    settings: list[tuple[Any, str, Any]] = field(default_factory=list)  # a config, its attribute, the value it had


def replication_of(model: nn.Module) -> Spans | None:
    """The ranges of which the model's layers are made now; None if they are the base's own."""
    found = vars(model).get(_KEY)
    return found.spans if isinstance(found, _Replication) else None


@contextmanager
def replicated(model: nn.Module, spans: Spans | None, *, alone: bool) -> Iterator[None]:
    """Repeat the model's layers as an adapter that is to be put on it wants; as before if the block fails.

    Args:
        spans: what the adapter's config says.
        alone: there is no other adapter on the model.

    Raises:
        LoRAStateError: adapters on the model have other layers.
        LoRAUnsupportedError, LoRAConfigError: the model's layers cannot be repeated so.
    """
    begun = False
    if spans != replication_of(model):
        if not alone:
            raise LoRAStateError(
                f"layer_replication={_shown(spans)}, but the adapters on this model have "
                f"{_shown(replication_of(model))}: all adapters of a model have the same layers.",
                name="layer_replication",
                value=spans,
                expected=replication_of(model),
                remedy="Call remove_lora() first, or put this adapter on another copy of the base.",
            )
        begun = True
        restore_layers(model)
        if spans is not None:
            _repeat(model, spans)
    try:
        yield
    except BaseException:
        if begun:
            restore_layers(model)
        raise


def restore_layers(model: nn.Module) -> None:
    """Put back the model's own layers, and what its config said; every Parameter is the one that it was."""
    found = vars(model).pop(_KEY, None)
    if not isinstance(found, _Replication):
        return
    now = getattr(found.owner, found.name)
    replicas: dict[int, nn.Module] = {}
    for number, replica in zip(_order(found.spans), now, strict=True):
        replicas.setdefault(number, replica)
    like = next(now.parameters(), None)
    for number, layer in enumerate(found.before):
        replica = replicas.get(number)
        if replica is None:
            if like is not None:
                layer.to(like.device, like.dtype)  # the model may have moved without it
            continue
        theirs = dict(replica.named_modules())
        for path, module in layer.named_modules():
            other = theirs.get(path)
            if other is not None:
                module._buffers.update(
                    {name: other._buffers[name] for name in module._buffers if name in other._buffers}
                )
                vars(module).update({key: vars(other)[key] for key in _FOLLOWS if key in vars(other)})
    setattr(found.owner, found.name, found.before)
    for config, name, value in found.settings:
        setattr(config, name, value)


def require_plain(model: nn.Module, verb: str) -> None:
    """Raise `LoRAUnsupportedError` if layers share weights as replicas: no weight can take two changes."""
    spans = replication_of(model)
    if spans is not None:
        raise LoRAUnsupportedError(
            f"{verb}() cannot be used with layer_replication={_shown(spans)}: layers that repeat one share its "
            "weights, and each has a change of its own.",
            name="layer_replication",
            value=spans,
            remedy="Run it unmerged.",
        )


def _shown(spans: Spans | None) -> str:
    return "None" if spans is None else str([list(span) for span in spans])


def _order(spans: Spans) -> list[int]:
    return [number for start, stop in spans for number in range(start, stop)]


def _repeat(model: nn.Module, spans: Spans) -> None:
    refuse_sharded(model, "layer_replication cannot be used", "Add or load the adapter before fully_shard().")
    owner, name, before = _layers(model)
    count = len(before)
    if max(stop for _, stop in spans) > count:
        raise LoRAConfigError(
            f"layer_replication={_shown(spans)} goes beyond the model's {count} layers.",
            name="layer_replication",
            value=spans,
            expected=f"ranges within 0 and {count}",
            remedy="A range is [first, last + 1].",
        )
    if any(hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters()) for module in before.modules()):
        raise LoRAUnsupportedError(
            "layer_replication cannot be used while layers are offloaded: each replica would hold the weights anew.",
            name="layer_replication",
            value=spans,
            remedy="Load the base whole (device_map=None).",
        )
    configs = list({id(c): c for c in (getattr(m, "config", None) for m in (owner, model)) if c is not None}.values())
    settings: list[tuple[Any, str, Any]] = []
    for config in configs:
        kinds = getattr(config, "layer_types", None)
        if isinstance(kinds, list) and len(set(kinds)) > 1:
            raise LoRAUnsupportedError(
                f"layer_replication is for layers of one kind, and this {type(model).__name__} has "
                f"{', '.join(sorted(set(kinds)))}.",
                name="layer_replication",
                value=spans,
                remedy="Leave layer_replication out, or use another base.",
            )
        if isinstance(kinds, list) and len(kinds) == count:
            settings.append((config, "layer_types", kinds))
        if getattr(config, "num_hidden_layers", None) == count:
            settings.append((config, "num_hidden_layers", count))
    layers = nn.ModuleList()
    for place, number in enumerate(_order(spans)):
        layer = before[number]
        shared = {id(parameter): parameter for parameter in layer.parameters()}
        replica = copy.deepcopy(layer, shared)
        for module in replica.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", place)  # noqa: B010  (mypy takes an attribute for a Tensor or a Module)
        layers.append(replica)
    layers.train(before.training)
    for replica, number in zip(layers, _order(spans), strict=True):
        for module, own in zip(replica.modules(), before[number].modules(), strict=True):
            module.training = own.training
    vars(model)[_KEY] = _Replication(spans, owner, name, before, settings)
    setattr(owner, name, layers)
    for config, key, value in settings:
        setattr(config, key, len(layers) if key == "num_hidden_layers" else value[:1] * len(layers))


def _layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list of the model's layers, and whose it is, as PEFT finds it."""
    inner: Any = model
    while hasattr(inner, "model"):
        inner = inner.model
    inner = getattr(inner, "bert", inner)
    for *path, name in _LISTS:
        owner = inner
        for part in path:
            owner = getattr(owner, part, None)
        found = getattr(owner, name, None)
        if isinstance(found, nn.ModuleList) and len(found):
            return owner, name, found
    raise LoRAUnsupportedError(
        f"layer_replication: no list of layers was found in this {type(model).__name__}.",
        name="layer_replication",
        value=type(model).__name__,
        expected="model.layers, encoder.layer or h",
        remedy="Leave layer_replication out.",
    )
