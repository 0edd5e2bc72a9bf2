"""Adapters between disk (or Hub) and model."""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import hub, store
from .bases import hub_id, same_base
from .errors import LoRAFileError, LoRAMismatchError, LoRANameError
from .expertnames import expert_of
from .layerinfo import is_held
from .model import put, read, refill, require
from .quantised import described
from .sharding import first_alone
from .tokenfields import ROWS
from .values import AdapterValue

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = [
    "checkpoint_folders",
    "load_checkpoint",
    "load_lora",
    "lora_state_dict",
    "push_lora",
    "read_adapter_of",
    "read_checkpoint",
    "read_source",
    "require_same_base",
    "save_checkpoint",
    "save_lora",
]

PathLike = str | os.PathLike[str]


def read_source(source: PathLike, *, allow_pickle: bool = False, **options: Any) -> AdapterValue:
    """The adapter in a folder, or in a repo on the Hub; an existing folder wins.

    Args:
        source: a folder, or "user/name".
        allow_pickle: read an adapter_model.bin (weights only, never code) where there are no safetensors.
        options: subfolder, revision, token, cache_dir, local_files_only, force_download.

    Raises:
        LoRAHubError: the Hub did not give it; `kind` says why.
        LoRAFileError, LoRAConfigError, LoRAUnsupportedError: as `store.read_adapter`.
    """
    options = {key: value for key, value in options.items() if value is not None}
    folder = Path(source)
    if os.path.isdir(folder):
        if "revision" in options:
            raise LoRAFileError(
                f"{os.fspath(source)!r} is a folder here, and a folder has no revision {options['revision']!r}.",
                name="revision",
                value=options["revision"],
                remedy="Leave revision out; to load the repo of that name, pass LoRAAdapter.pull(...).",
            )
        return store.read_adapter(folder / options.get("subfolder", ""), allow_pickle=allow_pickle)
    if os.path.exists(folder):
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
    force: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> str:
    """Load an adapter: all of it, or nothing. It becomes active only if nothing is.

    Args:
        source: a folder, a repo's id, or an adapter as a value.
        name: what to call it; None takes the repo's id or the folder's name.
        trainable: as float32 Parameters that train; otherwise frozen, in the base's dtype.
        replace: put it in place of an adapter of this name.
        force: load it although it says that it was made on another base. Its shapes have to fit all the same.
        allow_pickle: read an adapter_model.bin.
        options: subfolder, revision, token, cache_dir, local_files_only, as of the Hub.

    Returns:
        its name.

    Raises:
        LoRAFileError: a file is missing or malformed. LoRAHubError: the Hub did not give it.
        LoRAMismatchError: it was made on another base, or does not fit this model; lists why.
        LoRAUnsupportedError: a kind of adapter that hf_lora does not compute. LoRANameError: the name is taken.
    """
    if isinstance(source, AdapterValue):
        value, called = source.copy(), "default"
    else:
        value = read_source(source, allow_pickle=allow_pickle, **options)
        folder = Path(source)
        called = folder.resolve().name if os.path.isdir(folder) else os.fspath(source)
        if options.get("subfolder"):
            called = f"{called}/{options['subfolder'].strip('/')}"
    name = called if name is None else name
    if not force:
        require_same_base(model, value)
    read_here = not isinstance(source, AdapterValue)
    put(model, value, name, trainable=trainable, replace=replace, complete=read_here, finite=read_here)
    return name


def require_same_base(model: nn.Module, value: AdapterValue) -> None:
    """Raise if the adapter says that it was made on another base. What it does not say is not held against it."""
    config = getattr(model, "config", None)
    theirs, ours = hub_id(value.config.base_model), hub_id(getattr(config, "_name_or_path", None))
    problems = []
    if theirs and ours and not same_base(theirs, ours):
        problems.append(f"base model: the adapter says {theirs!r}, the model is {ours!r}")
    mapping = value.config.peft_fields.get("auto_mapping")
    mapping = mapping if isinstance(mapping, Mapping) else {}
    made_on, family = str(mapping.get("base_model_class")), str(mapping.get("parent_library"))
    classes = [cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models.")]
    if (
        classes
        and family.startswith("transformers.models.")
        and made_on not in {cls.__name__ for cls in classes}
        and _family(family) not in {_family(cls.__module__) for cls in classes}
    ):
        problems.append(f"architecture: the adapter says {made_on!r}, the model is a {type(model).__name__!r}")
    if problems:
        raise LoRAMismatchError(
            "The adapter was made on another base. Nothing was loaded.",
            name="base_model_name_or_path",
            value=theirs,
            expected=ours,
            facts=problems,
            remedy=f"Load it onto {theirs or made_on}; force=True loads it here if its shapes fit.",
        )


def _family(module: str) -> str:
    """The package: "transformers.models.llama" of "transformers.models.llama.modeling_llama"."""
    return ".".join(module.split(".")[:3])


def push_lora(model: nn.Module, repo_id: str, *, adapter: str | None = None, **options: Any) -> CommitInfo:
    """Push one adapter to the Hub as one commit: its two files and a card with what is known of its training.

    Args:
        repo_id: "user/name", or "name" for the token's own user.
        adapter: which; None takes the only one, or the only one active.
        options: private, token, revision, create_pr, commit_message, card, subfolder, base_model, force, as of
            `hub.push`.

    Raises:
        LoRANameError: no such adapter, or several and none named. As `hub.push` else; nothing was pushed.
    """
    name = _chosen(model, adapter)
    value = read_adapter_of(model, name).copy()
    if options.get("base_model") is None and hub_id(value.config.base_model) is None:
        options["base_model"] = hub_id(getattr(getattr(model, "config", None), "_name_or_path", None))
    options.setdefault("run", require(model).entry(name).record.run)
    plain = next((cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models.")), None)
    if plain is None and not hasattr(model, "base_model_prefix"):  # a class of another library, or of the user's
        plain = getattr(type(model), "lora_base", type(model))
    return hub.push(value, repo_id, architecture=plain, quantised=described(model), **options)


def save_lora(
    model: nn.Module, directory: PathLike, name: str | None = None, tensors: Mapping[str, Tensor] | None = None
) -> Path:
    """Write one adapter in PEFT's format, atomically.

    On a model that fully_shard() has split, every process must call this; the first one alone writes.

    Args:
        directory: made if missing; other files in it stay.
        name: which adapter; None takes the only one, or the only one active.
        tensors: the model's whole state dict, where it was gathered already: then nothing is asked of other processes.

    Returns:
        the folder.

    Raises:
        LoRANameError: no such adapter, or several and none named.
        LoRAFileError: it cannot be written; what was there stays.
    """
    value = read_adapter_of(model, name, tensors)
    if tensors is not None:
        return store.write_adapter(value, directory)
    first_alone(model, lambda: store.write_adapter(value, directory))
    return Path(directory)


def read_adapter_of(
    model: nn.Module, name: str | None = None, tensors: Mapping[str, Tensor] | None = None
) -> AdapterValue:
    """One adapter as a value, with names that PEFT understands."""
    return _portable(model, read(model, _chosen(model, name), tensors))


def lora_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, as `save_lora` writes them (copies, on the CPU)."""
    return store.to_state_dict(read(model, _chosen(model, name)).copy())


def _chosen(model: nn.Module, name: str | None) -> str:
    state = require(model)
    if name is not None:
        return state.entry(name).name
    active = state.current if state.merged is None else state.default
    for entries in (list(state.entries.values()), active.entries):
        if len(entries) == 1:
            return entries[0].name
    raise LoRANameError(
        f"There are {len(state.entries)} adapters on this model: {', '.join(map(repr, state.entries))}.",
        value=None,
        expected=tuple(state.entries),
        remedy="Name one.",
    )


def _portable(model: nn.Module, value: AdapterValue) -> AdapterValue:
    """The value with a config that means the same modules to PEFT, which knows names and no roles."""
    config = value.config.replace(
        target_modules=_targets(model, {path for path in value.factors if expert_of(path) is None}),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=_closed_names(model, [p for p, state in value.modules.items() if ROWS not in state]) or None,
    )
    return dataclasses.replace(value, config=config)


def _closed_names(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The shortest names that mean these modules alone: `q_proj` where every q_proj is meant, else whole paths."""
    paths = set(paths)
    others = [
        path for path, _ in model.named_modules(remove_duplicate=False) if path not in paths and not is_held(path)
    ]
    lasts = {path.rpartition(".")[2] for path in others}
    return sorted({path if (last := path.rpartition(".")[2]) in lasts else last for path in paths})


def _targets(model: nn.Module, paths: Iterable[str]) -> list[str] | str:
    """The names of targets; a regular expression where a whole path would also be the end of another's."""
    names = _closed_names(model, paths)
    ends = tuple(f".{name}" for name in names if name in paths)
    others = (path for path, _ in model.named_modules(remove_duplicate=False) if path not in paths)
    if not any(path.endswith(ends) for path in others):
        return names
    return "|".join(re.escape(path) for path in sorted(paths))


# ---- a checkpoint: every adapter that trains ------------------------------------------------------------------------

_PREFIX = "lora-"  # of an adapter's folder, where several train


def _checkpointed(model: nn.Module) -> list[str]:
    """The adapters of a checkpoint: all that train, or those active (or all there are) if none does."""
    state = require(model)
    training = [entry.name for entry in state.entries.values() if entry.trainable]
    return training or [entry.name for entry in state.default.entries] or list(state.entries)


def checkpoint_folders(model: nn.Module, directory: PathLike) -> dict[str, Path]:
    """Where each adapter of a checkpoint lies: one alone at the root, several in a folder each."""
    names = _checkpointed(model)
    if len(names) == 1:
        return {names[0]: Path(directory)}
    return {name: Path(directory) / (_PREFIX + urllib.parse.quote(name, safe="")) for name in names}


def save_checkpoint(model: nn.Module, directory: PathLike, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write every adapter that trains: one alone at the root, several in a folder each. `tensors`: see `save_lora`."""
    for name, folder in checkpoint_folders(model, directory).items():
        save_lora(model, folder, name, tensors)


def load_checkpoint(model: nn.Module, directory: PathLike) -> None:
    """Put back, into the same Parameters, what `save_checkpoint` wrote: all of it, or nothing."""
    refill(model, read_checkpoint(model, directory))
    require(model).facts["checkpoint"] = str(directory)  # for callbacks, which Trainer does not tell


def read_checkpoint(model: nn.Module, directory: PathLike) -> dict[str, AdapterValue]:
    """What `save_checkpoint` wrote, by adapter, for the adapters that train on the model now.

    Raises:
        LoRAFileError: an adapter's files are missing or damaged.
        LoRAMismatchError: the checkpoint is of other adapters.
    """
    folders = checkpoint_folders(model, directory)
    held = {urllib.parse.unquote(path.name.removeprefix(_PREFIX)) for path in Path(directory).glob(f"{_PREFIX}*")}
    alone = (Path(directory) / store.CONFIG_NAME).exists()
    wanted = set(folders) if len(folders) > 1 else set()
    if (held - wanted or (alone and not held)) if wanted else (held and not alone):
        raise _other_adapters(directory, held, folders)
    return {name: store.read_adapter(folder) for name, folder in folders.items()}


def _other_adapters(directory: PathLike, held: Iterable[str], training: Iterable[str]) -> LoRAMismatchError:
    names = ", ".join(map(repr, sorted(held))) or "one adapter alone"
    return LoRAMismatchError(
        f"{os.fspath(directory)} holds {names}; on this model {', '.join(map(repr, training))} would be loaded.",
        name=os.fspath(directory),
        value=tuple(sorted(held)),
        expected=tuple(training),
        remedy="Let the same adapters train, with train_lora(), as when the checkpoint was written.",
    )
