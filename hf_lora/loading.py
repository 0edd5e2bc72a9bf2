"""Adapters between disk (or Hub) and model."""

from __future__ import annotations

import dataclasses
import os
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import hub, store
from .errors import LoRAFileError, LoRANameError
from .layerinfo import is_held
from .model import put, read, refill, require
from .values import AdapterValue

__all__ = [
    "load_checkpoint",
    "load_lora",
    "lora_state_dict",
    "read_adapter_of",
    "read_source",
    "save_checkpoint",
    "save_lora",
]

PathLike = str | os.PathLike[str]


def read_source(source: PathLike, *, allow_pickle: bool = False, **options: Any) -> AdapterValue:
    """The adapter in a folder, or in a repo on the Hub; an existing folder wins.

    Args:
        source: a folder, or "user/name".
        allow_pickle: read an adapter_model.bin (weights only, never code) where there are no safetensors.
        options: subfolder, revision, token, cache_dir, local_files_only.
    """
    options = {key: value for key, value in options.items() if value is not None}
    folder = Path(source)
    if folder.is_dir():
        return store.read_adapter(folder / options.get("subfolder", ""), allow_pickle=allow_pickle)
    if folder.exists():
        raise LoRAFileError(
            f"{os.fspath(source)!r} is a file; an adapter is a folder with {store.CONFIG_NAME}.",
            name=os.fspath(source),
            value=os.fspath(source),
            remedy="Give the folder.",
        )
    return store.read_adapter(
        hub.fetch(os.fspath(source), allow_pickle=allow_pickle, **options), allow_pickle=allow_pickle
    )


def load_lora(
    model: nn.Module,
    source: PathLike | AdapterValue,
    *,
    name: str | None = None,
    trainable: bool = False,
    replace: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> str:
    """Load an adapter: all of it, or nothing. It becomes active only if nothing is.

    Args:
        source: a folder, a repo's id, or an adapter as a value.
        name: what to call it; None takes the repo's id or the folder's name.
        trainable: as float32 Parameters that train; otherwise frozen, in the base's dtype.
        replace: put it in place of an adapter of this name.
        allow_pickle: read an adapter_model.bin.
        options: subfolder, revision, token, cache_dir, local_files_only, as of the Hub.

    Returns:
        its name.

    Raises:
        LoRAFileError: a file is missing or malformed. LoRAMismatchError: it does not fit this model; lists why.
        LoRAUnsupportedError: a kind of adapter that hf_lora does not compute. LoRANameError: the name is taken.
    """
    if isinstance(source, AdapterValue):
        value, called = source, "default"
    else:
        value = read_source(source, allow_pickle=allow_pickle, **options)
        folder = Path(source)
        called = folder.resolve().name if folder.is_dir() else os.fspath(source)
        if options.get("subfolder"):
            called = f"{called}/{options['subfolder']}"
    name = called if name is None else name
    put(model, value, name, trainable=trainable, replace=replace, complete=not isinstance(source, AdapterValue))
    return name


def save_lora(model: nn.Module, directory: PathLike, name: str | None = None) -> Path:
    """Write one adapter in PEFT's format, atomically.

    Args:
        directory: made if missing; other files in it stay.
        name: which adapter; None takes the only one, or the only one active.

    Returns:
        the folder.

    Raises:
        LoRANameError: no such adapter, or several and none named.
        LoRAFileError: it cannot be written; what was there stays.
    """
    return store.write_adapter(read_adapter_of(model, name), directory)


def read_adapter_of(model: nn.Module, name: str | None = None) -> AdapterValue:
    """One adapter as a value, with names that PEFT understands."""
    return _portable(model, read(model, _chosen(model, name)))


def lora_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, as `save_lora` writes them (copies, on the CPU)."""
    return store.to_state_dict(read(model, _chosen(model, name)))


def _chosen(model: nn.Module, name: str | None) -> str:
    state = require(model)
    if name is not None:
        return state.entry(name).name
    active = [entry.name for entry in state.default.entries]
    for names in (list(state.entries), active):
        if len(names) == 1:
            return names[0]
    raise LoRANameError(
        f"There are {len(state.entries)} adapters on this model: {', '.join(map(repr, state.entries))}.",
        value=None,
        expected=tuple(state.entries),
        remedy="Name one.",
    )


def _portable(model: nn.Module, value: AdapterValue) -> AdapterValue:
    """The value with a config that means the same modules to PEFT, which knows names and no roles."""
    config = value.config.replace(
        target_modules=_closed_names(model, value.factors),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=_closed_names(model, value.modules) or None,
    )
    return dataclasses.replace(value, config=config)


def _closed_names(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The shortest names that mean these modules alone: `q_proj` where every q_proj is meant, else whole paths."""
    paths = set(paths)
    others = {
        path.rpartition(".")[2]
        for path, _ in model.named_modules(remove_duplicate=False)
        if path not in paths and not is_held(path)
    }
    return sorted({path if (last := path.rpartition(".")[2]) in others else last for path in paths})


# ---- a checkpoint: every adapter that trains ------------------------------------------------------------------------


def _checkpointed(model: nn.Module) -> tuple[str, list[str]]:
    """The adapter at a checkpoint's root, and those in subfolders: all that train, or what is active if none does."""
    state = require(model)
    training = [entry.name for entry in state.entries.values() if entry.trainable]
    active = [entry.name for entry in state.default.entries]
    first = next((name for name in active if name in training), (training or active or list(state.entries))[0])
    return first, [name for name in training if name != first]


def _folder(name: str) -> str:
    return "lora-" + urllib.parse.quote(name, safe="")


def save_checkpoint(model: nn.Module, directory: PathLike) -> None:
    """Write every adapter that trains: the active one at the root, further ones in subfolders."""
    first, others = _checkpointed(model)
    for name in others:
        save_lora(model, Path(directory) / _folder(name), name)
    save_lora(model, directory, first)


def load_checkpoint(model: nn.Module, directory: PathLike) -> None:
    """Put back, into the same Parameters, what `save_checkpoint` wrote."""
    first, others = _checkpointed(model)
    values = {name: store.read_adapter(Path(directory) / _folder(name)) for name in others}
    values[first] = store.read_adapter(directory)
    for name, value in values.items():
        refill(model, name, value)
