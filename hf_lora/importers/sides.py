"""The two models of an extraction, read a tensor at a time: from memory, a state dict, or a folder's files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRAMismatchError, LoRAUnsupportedError
from ..export.base import config_of, open_base
from ..integrations.checkpoint_keys import map_keys, meta_model
from ..layerinfo import is_held
from ..weights import materialised

__all__ = ["Side", "model_of", "open_side"]

Source = nn.Module | str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Side:
    """One of two models.

    Args:
        name: for messages, and as the base's id.
        read: key of the model's state dict → what reads it; each parameter and saved buffer once, ties by their first
            name.
    """

    name: str
    read: Mapping[str, Callable[[], Tensor]]


def model_of(source: str | os.PathLike[str]) -> nn.Module:
    """The model that a folder or repo on the Hub holds, of the class that its config names, without memory.

    Raises:
        LoRAFileError, LoRAHubError: it is not there. LoRAUnsupportedError: transformers has no such class.
    """
    import transformers

    config = config_of(os.fspath(source))
    names = getattr(config, "architectures", None) or [None]
    cls = getattr(transformers, str(names[0]), None)
    if cls is None:
        raise LoRAUnsupportedError(
            f"transformers has no class {names[0]!r}, which the config of {os.fspath(source)!r} names.",
            name="architectures",
            value=names[0],
            remedy="Load the model and give it instead of its name.",
        )
    model: nn.Module = meta_model(cls, config, torch.float32)
    return model


def open_side(source: Source, model: nn.Module, what: str) -> Side:
    """A source of `model`'s tensors.

    Raises:
        LoRAUnsupportedError: weights that are quantised, or converted when they are loaded. LoRAMismatchError: a state
            dict with names that the model does not have.
    """
    first = _first_names(model)
    if isinstance(source, nn.Module):
        return Side(_name(source) or what, _of_module(source))
    if isinstance(source, Mapping):
        known = {key: tensor for key, tensor in source.items() if key in first}
        unknown = sorted(source.keys() - known.keys())
        _refuse_unknown(what, unknown)
        return Side(what, {first[key]: (lambda t=t: t.detach().to("cpu")) for key, t in known.items()})  # type: ignore[misc]
    base = open_base(os.fspath(source))
    placed = map_keys(model, base.tensors)
    _refuse_unknown(base.name, sorted(base.tensors.keys() - placed.keys()))
    converted = [f"{name}: becomes {where.key}" for name, where in placed.items() if where.converted]
    if converted:
        raise LoRAUnsupportedError(
            f"{base.name!r} has {len(converted)} tensors that transformers converts when it loads them.",
            name=converted[0].partition(":")[0],
            facts=converted,
            remedy="Load both models with from_pretrained() and give them.",
        )
    return Side(base.name, {first[where.key]: base.tensors[name].read for name, where in placed.items()})


def _name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _refuse_unknown(what: str, unknown: list[str]) -> None:
    if unknown:
        raise LoRAMismatchError(
            f"{what} has {len(unknown)} tensors that the base model has no place for.",
            name=unknown[0],
            value=unknown,
            facts=unknown,
            remedy="Give two models of one class: the head of another class cannot be compared.",
        )


def _first_names(model: nn.Module) -> dict[str, str]:
    """Key of the state dict → the first name of the same tensor."""
    seen: dict[int, str] = {}
    state: dict[str, Any] = {k: t for k, t in model.state_dict(keep_vars=True).items() if not is_held(k)}
    return {key: seen.setdefault(id(tensor), key) for key, tensor in state.items()}


def _of_module(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    def reader(key: str) -> Callable[[], Tensor]:
        path, _, leaf = key.rpartition(".")
        return lambda: materialised(model.get_submodule(path), leaf)

    return {first: reader(first) for first in dict.fromkeys(_first_names(model).values())}
