"""Merge adapters into the base's weights, and take them out again, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import LoRAStateError, LoRAUnsupportedError
from .layerinfo import is_held
from .layers import LoRAHead, LoRALinear
from .model import read, require
from .sharding import refuse_sharded
from .state import Active
from .switching import Which, selection
from .targeting import describe_layer
from .weights import MergeRecord, device_of, merge, mergeable, unmerge

__all__ = ["Merged", "merge_lora", "require_mergeable", "unmerge_lora"]


@dataclass(eq=False)
class Merged:
    """A merge, as `unmerge_lora` needs it."""

    active: Active
    weights: dict[str, MergeRecord] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)  # biases and heads: the base's own values

    @property
    def nbytes(self) -> int:
        """What undoing the merge holds in memory."""
        return sum(r.nbytes for r in self.weights.values()) + sum(t.nbytes for t in self.tensors.values())


def merge_lora(model: nn.Module, which: Which = None) -> Merged:
    """W ← round(W + Σ wᵢ ΔWᵢ), so that the model runs at the base's speed; exactly undone by `unmerge_lora`.

    Until then the record keeps, for each weight matrix, the factors, one bit a weight, and the weights that rounding
    moved (about a tenth of them where ‖ΔW‖/‖W‖ is 0.1).

    Args:
        which: what to merge, as in `set_lora`; None merges what is active by default.

    Raises:
        LoRAStateError: merged already, routed, training, nothing active, or an adapter that is not finite or
            overflows the weights' dtype; the weights are then as before.
        LoRAUnsupportedError: a quantised, offloaded or tied weight.
    """
    state = require(model)
    state.require_unmerged("merge_lora")
    if state.overridden:
        raise LoRAStateError(
            "merge_lora() cannot be used inside use_lora(), no_lora() or route_lora().", remedy="Leave the with block."
        )
    if model.training:
        raise LoRAStateError("merge_lora() cannot be used while the model trains.", remedy="Call model.eval() first.")
    remedy = "save_lora(), and merge where the base is whole, in one process."
    refuse_sharded(model, "merge_lora() cannot be used", remedy, zero3=True)
    active = state.default if which is None else selection(state, which)
    if not active.mixture:
        raise LoRAStateError("No adapter is active, so there is nothing to merge.", remedy="Name one: merge_lora('…').")
    with state.lock:
        merged, modules = Merged(active), dict(model.named_modules())
        pairs = _pairs(model, active)
        require_mergeable(model, active)
        _refuse_not_finite(model, active)
        try:
            for path, (A, B) in pairs.items():
                module = modules[path]
                weight = mergeable(module, path)
                device = device_of(module)
                merged.weights[path] = merge(
                    weight, A.to(device), B.to(device), transposed=_transposed(module), path=path
                )
            _put_whole(model, active, merged)
        except BaseException:
            _undo(model, merged)
            raise
        state.merged = merged
    return merged


def unmerge_lora(model: nn.Module) -> None:
    """Take out what `merge_lora` put in; every bit of the base is as before.

    Raises:
        LoRAStateError: nothing is merged, or a weight changed since; the model is then still merged.
    """
    state = require(model)
    if state.merged is None:
        raise LoRAStateError("No adapter is merged into this model.", remedy="Call merge_lora() first.")
    with state.lock:
        _undo(model, state.merged)
        state.merged = None


def require_mergeable(model: nn.Module, active: Active) -> None:
    """Raise `LoRAUnsupportedError` if a weight that a merge of `active` changes is quantised, offloaded or tied."""
    layers = dict.fromkeys(path for entry in active.entries for path in entry.record.layers)
    for path in layers:
        mergeable(model.get_submodule(path), path)
    whole = [path for entry in active.entries for path in entry.record.biases]
    for head in [path for entry in active.entries for path in entry.record.heads]:
        whole += [f"{head}.{key}" for key, _ in model.get_submodule(head).named_parameters() if not is_held(key)]
    _refuse_tied(model, [*(f"{path}.weight" for path in layers), *whole])


def _pairs(model: nn.Module, active: Active) -> dict[str, tuple[Tensor, Tensor]]:
    """A (ΣR, in) and B (out, ΣR), scaled and weighted, of every layer that the mixture touches; float32 or wider."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for entry, weight in active.mixture:
        for path, factors in read(model, entry.name).factors.items():
            wide = torch.promote_types(factors.A.dtype, torch.float32)
            parts.setdefault(path, []).append((factors.A.to(wide), factors.B.to(wide) * (factors.scaling * weight)))
    return {path: (torch.cat([a for a, _ in pair]), torch.cat([b for _, b in pair], 1)) for path, pair in parts.items()}


def _transposed(module: nn.Module) -> bool:
    info = describe_layer(module)
    return info is not None and info.kind in ("conv1d", "embedding")


def _refuse_tied(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse parameters that another module uses too: it would change with a merge, and was not to."""
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if not is_held(path):
            owners.setdefault(id(parameter), []).append(path)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        owner, _, leaf = path.rpartition(".")
        module = modules[owner]
        names = owners.get(id(module._parameters.get(leaf)), [])
        others = [name for name in names if modules[name.rpartition(".")[0]] is not module]
        if others:
            raise LoRAUnsupportedError(
                f"{owner}: its {leaf} is tied to {', '.join(others)}; a merge would change both.",
                name=path,
                value=others,
                remedy="Untie them first (tie_word_embeddings=False and a copy of the weight), or do not adapt it.",
            )


def _refuse_not_finite(model: nn.Module, active: Active) -> None:
    """What replaces a bias or a head; factors are looked at as ΔW."""
    for entry, _ in active.mixture:
        if not entry.record.whole:
            continue
        value = read(model, entry.name)
        heads = [(f"{p}.{key}", t) for p, state in value.modules.items() for key, t in state.items()]
        for name, tensor in [*value.biases.items(), *heads]:
            own = model.get_parameter(name).dtype if name in value.biases else tensor.dtype
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.to(own)).all()):
                raise LoRAStateError(
                    f"{name}: adapter {entry.name!r} holds values there that are NaN or infinite in {own}, "
                    "so it was not merged.",
                    name=name,
                    remedy="Check the adapter (a diverged training run?).",
                )


def _put_whole(model: nn.Module, active: Active, merged: Merged) -> None:
    """Write the adapter's biases and heads over the base's; a mixture holds none."""
    for entry, _ in active.mixture:
        for path in entry.record.biases:
            owner = model.get_submodule(path.rpartition(".")[0])
            assert isinstance(owner, LoRALinear)
            assert isinstance(owner.bias, Tensor)
            merged.tensors[path] = owner.bias.detach().clone()
            trained = read(model, entry.name).biases[path]
            owner.bias.detach().copy_(trained)
        for path in entry.record.heads:
            head = model.get_submodule(path)
            assert isinstance(head, LoRAHead)
            own = dict(head.named_parameters(remove_duplicate=False)) | dict(head.named_buffers())
            for key, tensor in head.lora_heads.copies[str(entry.slot)].state_dict().items():
                merged.tensors[f"{path}.{key}"] = own[key].detach().clone()
                own[key].detach().copy_(tensor)


def _undo(model: nn.Module, merged: Merged) -> None:
    modules = dict(model.named_modules())
    done: list[str] = []
    try:
        for path, record in merged.weights.items():
            module = modules[path]
            unmerge(mergeable(module, path), record, transposed=_transposed(module), path=path)
            done.append(path)
    except BaseException:
        for path in done:  # all or nothing: what was taken out goes in again, as it was
            module, record = modules[path], merged.weights[path]
            merge(mergeable(module, path), record.A, record.B, transposed=_transposed(module), path=path)
        raise
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, value in merged.tensors.items():
        tensors[name].detach().copy_(value)
