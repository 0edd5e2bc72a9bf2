"""Weights that several modules use: who they are, and a copy of its own for one of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .errors import LoRAUnsupportedError
from .layerinfo import is_held

__all__ = ["as_before", "refuse_tied", "retie", "tied", "untie"]

_REMEDY = (
    "Pass untie=True, which gives it a copy of its own while it is merged (merge_and_save() then saves both), or do "
    "not adapt it."
)


def tied(model: nn.Module, paths: Iterable[str]) -> dict[str, list[str]]:
    """Path of a Parameter → the paths of others that share its memory with another module.

    Tied are one Parameter in two modules, and two Parameters in the same memory (`a.weight.data = b.weight.data`).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    together: dict[tuple[torch.device, int], list[tuple[str, nn.Module, Tensor]]] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for path, tensor in tensors:
        if not is_held(path) and not tensor.is_meta:
            owner = modules[path.rpartition(".")[0]]
            together.setdefault(_memory(tensor), []).append((path, owner, tensor))
    found = {}
    for path in paths:
        module, _, leaf = path.rpartition(".")
        own = modules[module]._parameters.get(leaf)
        if own is None or own.is_meta:
            continue
        near = together.get(_memory(own), [])
        others = [name for name, owner, tensor in near if owner is not modules[module] and _overlap(own, tensor)]
        if others:
            found[path] = others
    return found


def refuse_tied(
    model: nn.Module, paths: Iterable[str], meant: Mapping[str, Collection[str]] = MappingProxyType({})
) -> None:
    """Refuse Parameters that another module uses too: it would change with a merge, and was not to.

    `meant`: those that are to change together, by path.
    """
    for path, others in tied(model, paths).items():
        others = [name for name in others if name not in meant.get(path, ())]
        if not others:
            continue
        owner, _, leaf = path.rpartition(".")
        raise LoRAUnsupportedError(
            f"{owner}: its {leaf} is tied to {', '.join(others)}; a merge would change both.",
            name=path,
            value=others,
            remedy=_REMEDY,
        )


def untie(model: nn.Module, paths: Iterable[str], ties: dict[str, nn.Parameter]) -> None:
    """Give each of these Parameters that is tied memory of its own, with the same bits.

    Args:
        ties: takes, by path, the Parameter that was there, for `retie`.
    """
    for path in tied(model, paths):
        if tied(model, [path]):  # what was tied to the last one may be alone now
            owner, _, leaf = path.rpartition(".")
            module = model.get_submodule(owner)
            shared = module._parameters[leaf]
            assert shared is not None
            ties[path] = shared
            module._parameters[leaf] = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)


def retie(model: nn.Module, ties: Mapping[str, nn.Parameter]) -> None:
    """Put the Parameters of before in their places."""
    for path, shared in ties.items():
        owner, _, leaf = path.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = shared


@contextmanager
def as_before(model: nn.Module, ties: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within the block the Parameters of before `untie` stand in their places, to see what is tied without it."""
    own = {path: model.get_parameter(path) for path in ties}
    retie(model, ties)
    try:
        yield
    finally:
        retie(model, own)


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    if hasattr(tensor, "__tensor_flatten__"):  # made of others (torchao, quanto): it has no memory of its own
        return tensor.device, id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr() or id(tensor)


def _overlap(one: Tensor, other: Tensor) -> bool:
    (start, stop), (first, last) = _extent(one), _extent(other)
    return one is other or (start < last and first < stop)


def _extent(tensor: Tensor) -> tuple[int, int]:
    if not tensor.numel():
        return 0, 0
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()
