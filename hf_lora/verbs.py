"""The verbs: functions of any `nn.Module`, and by `mixin` the methods of every transformers model."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor, nn

from . import loading, merging, preparing, summary, switching
from . import model as placing
from .config import LoRAConfig
from .integrations import generation, pretrained
from .summary import Summary
from .switching import Which
from .values import AdapterValue
from .wrappers import unwrapped

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, ModelCard

    from .adapter import LoRAAdapter

__all__ = [
    "active_lora",
    "add_lora",
    "base_state_dict",
    "load_lora",
    "lora_adapter",
    "lora_names",
    "lora_state_dict",
    "lora_summary",
    "merge_and_save",
    "merge_lora",
    "no_lora",
    "prepare_lora",
    "print_lora_summary",
    "push_adapter_to_hub",
    "remove_lora",
    "reserve_lora",
    "route_lora",
    "save_lora",
    "set_lora",
    "train_lora",
    "unmerge_lora",
    "use_lora",
]

P = ParamSpec("P")
R = TypeVar("R")


def _verb(function: Callable[Concatenate[nn.Module, P], R]) -> Callable[Concatenate[nn.Module, P], R]:
    """A function of the model itself, whatever it is wrapped in (`torch.compile`, DataParallel)."""

    @functools.wraps(function)
    def verb(model: nn.Module, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return function(unwrapped(model), *args, **kwargs)

    return verb


@_verb
def add_lora(
    model: nn.Module,
    config: LoRAConfig | Any,
    name: str = "default",
    *,
    active: bool = True,
    trainable: bool = True,
    replace: bool = False,
    data: Iterable[Any] | None = None,
) -> None:
    """Put a new adapter on the model and freeze the base: h = x W^T + s · x A^T B^T, B = 0.

    Args:
        config: a `LoRAConfig` (or a `peft.LoraConfig`).
        name: any string that is not taken.
        active: make it the only active one; the others stay, frozen.
        trainable: let it train; its factors are float32 Parameters.
        replace: put it in place of an adapter of this name.
        data: batches for an initialisation that looks at data (init "eva", "lora_ga" or "corda"): a DataLoader.

    Raises:
        LoRATargetError: a target matches nothing (near matches are named) or no layer.
        LoRAConfigError: an impossible rank for a layer. LoRANameError: the name is taken.
        LoRAUnsupportedError: the config or layer asks for what hf_lora does not compute.

    Source: Hu et al. 2021, section 4.1.
    """
    placing.add(model, config, name, active=active, trainable=trainable, replace=replace, data=data)
    pretrained.attached(model)


@_verb
def prepare_lora(
    model: nn.Module,
    *,
    norms: bool = True,
    gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Make a base ready for training, before `add_lora`: frozen, norms in float32, gradient checkpointing.

    Args:
        norms: half-precision norms compute in float32, and give their output in their input's dtype.
        gradient_checkpointing: compute activations again in the backward.
        gradient_checkpointing_kwargs: for transformers; None is {"use_reentrant": False}.

    Raises:
        LoRAUnsupportedError: the model has no gradient checkpointing.

    Source: Dettmers et al. 2023 (arXiv:2305.14314), section 3.
    """
    preparing.prepare(
        model,
        norms=norms,
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs=gradient_checkpointing_kwargs,
    )


@_verb
def reserve_lora(
    model: nn.Module, slots: int | None, rank: int | None = None, targets: str | Sequence[str] | None = None
) -> None:
    """Make room for adapters to come, so that a compiled model takes them without compiling anew.

    load_lora(…, replace=True) then swaps an adapter for another of any rank, alpha and targets within the room.

    Args:
        slots: how many adapters are on the model at a time; None forgets what was reserved.
        rank: the largest of theirs.
        targets: every layer that one of them may have factors in, as `target_modules`; None is where adapters are.

    Raises:
        LoRAStateError: `slots` or `rank` is no positive number, or the model is merged.
        LoRATargetError: `targets` matches nothing.
    """
    spare = isinstance(slots, int) and not isinstance(slots, bool) and slots > 0  # one more, to swap through
    placing.reserve(model, slots + 1 if spare and slots is not None else slots, rank, targets)


@_verb
def load_lora(
    model: nn.Module,
    source: str | os.PathLike[str] | AdapterValue,
    *,
    name: str | None = None,
    trainable: bool = False,
    replace: bool = False,
    force: bool = False,
    allow_pickle: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool | None = None,
) -> str:
    """Load an adapter from a folder, a repo on the Hub, or a value: all of it, or nothing.

    Args:
        source: a folder (wins), "user/name", or an adapter.
        name: what to call it; None takes the repo's id or the folder's name.
        trainable: as Parameters that train; otherwise frozen, cast once to the base's dtype.
        replace: put it in place of an adapter of this name.
        force: load it although it says that it was made on another base; its shapes have to fit all the same.
        allow_pickle: read an adapter_model.bin (weights only) where there are no safetensors.
        subfolder: of the folder or repo. revision, token, cache_dir, local_files_only: as of huggingface_hub.

    Returns:
        its name. It is active only if nothing else is; `set_lora` switches.

    Raises:
        LoRAFileError, LoRAHubError, LoRAMismatchError, LoRAUnsupportedError, LoRANameError: nothing was loaded.
    """
    name = loading.load_lora(
        model,
        source,
        name=name,
        trainable=trainable,
        replace=replace,
        force=force,
        allow_pickle=allow_pickle,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    pretrained.attached(model)
    return name


@_verb
def save_lora(model: nn.Module, directory: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write one adapter in PEFT's format, atomically; None takes the only (active) one. Returns the folder.

    Of a model that is sharded over processes, every process must call this, and the first one writes.
    """
    return loading.save_lora(model, directory, name)


@_verb
def push_adapter_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    adapter: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    card: str | Path | ModelCard | None = None,
    subfolder: str | None = None,
    base_model: str | None = None,
    force: bool = False,
) -> CommitInfo:
    """Push one adapter to the Hub as one commit: its config, its weights and a model card.

    Args:
        repo_id: "user/name", or "name" for the token's own user; made if it is missing.
        adapter: which; None takes the only one, or the only one active.
        private: visibility of a new repo; an existing one must have it already.
        token: as of huggingface_hub.
        revision: the branch, made if it is missing; None is main.
        create_pr: open a pull request instead of committing.
        commit_message: None says what is pushed.
        card: words for the README: text, the path of a README.md, or a `huggingface_hub.ModelCard`. None keeps
            what stands there.
        subfolder: a folder for this adapter, in a repo of several.
        base_model: the base's id on the Hub; None takes the one that the base was loaded by.
        force: push an adapter that is not finite or was never trained.

    Raises:
        LoRAHubError: the Hub refused or failed; `kind` says how. Nothing was pushed.
        LoRAMismatchError: the adapter is not finite, was never trained, or its base has no id on the Hub.
        LoRAFileError: the README's metadata is damaged, or a token or local path would be published.
        LoRANameError: no such adapter, or several and none named.
    """
    return loading.push_lora(
        model,
        repo_id,
        adapter=adapter,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        card=card,
        subfolder=subfolder,
        base_model=base_model,
        force=force,
    )


@_verb
def set_lora(model: nn.Module, which: Which) -> None:
    """Make a name, names, or {name: weight} the model's default; None is the base alone. O(1)."""
    switching.set_lora(model, which)


@_verb
def use_lora(model: nn.Module, which: Which) -> AbstractContextManager[nn.Module]:
    """Within the block, in this thread or task alone, `which` is active."""
    return switching.use_lora(model, which)


@_verb
def no_lora(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Within the block, in this thread or task alone, the model is its base."""
    return switching.no_lora(model)


@_verb
def route_lora(model: nn.Module, names: Sequence[str | None]) -> AbstractContextManager[nn.Module]:
    """Within the block, row i of every batch goes through `names[i]`; None is the base alone."""
    generation.prepare(model)
    return switching.route_lora(model, names)


@_verb
def train_lora(model: nn.Module, names: str | Iterable[str]) -> None:
    """Choose which adapters train: these and no others. Make a new optimizer afterwards."""
    placing.train(model, names)


@_verb
def merge_lora(
    model: nn.Module,
    which: Which = None,
    *,
    replace: bool = False,
    untie: bool = False,
    dequantize: bool = False,
) -> None:
    """W ← W + ΔW of what is active (or of `which`); `unmerge_lora` restores every bit.

    Args:
        which: a name, names, or {name: weight}; None is what is active by default.
        replace: in place of what is merged already, if anything: W + ΔA → W + ΔB, layer by layer.
        untie: a weight that is tied to another layer's gets a copy of its own while merged, instead of an error.
        dequantize: a quantised base is dense while merged; otherwise W + ΔW is quantised as W was.

    Raises:
        LoRAStateError, LoRAUnsupportedError: nothing has changed then, and what was merged still is.
    """
    merging.merge_lora(model, which, replace=replace, untie=untie, dequantize=dequantize)


@_verb
def unmerge_lora(model: nn.Module) -> None:
    """Take out what `merge_lora` put in; every bit of the base is as before."""
    merging.unmerge_lora(model)


@_verb
def merge_and_save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    which: Which = None,
    *,
    untie: bool = False,
    max_shard_size: int | str | None = None,
    dequantize: bool = False,
) -> Path:
    """Write base + adapters as a standalone model folder, for any tool; the model here stays as it is.

    Args:
        directory: a new or empty folder; it appears when everything is written.
        which: a name, names, or {name: weight}; None is what is active by default, or what is merged already.
        untie: write tied weights of which the adapter changes one as two; otherwise they are refused.
        max_shard_size: bytes, or such as "5GB", of each file of weights.
        dequantize: of a quantised base write what it holds + ΔW; otherwise the files that it was loaded from + ΔW.

    Raises:
        LoRAFileError, LoRAStateError, LoRAUnsupportedError: nothing was written, and the model is as before.
    """
    from .export import merge_and_save

    return merge_and_save(model, directory, which, untie=untie, max_shard_size=max_shard_size, dequantize=dequantize)


@_verb
def remove_lora(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off, or all; without any, the model is what it was, bit for bit. Unmerges first."""
    state = placing.require(model)
    if name is not None:
        state.entry(name)
    if state.merged is not None:
        merging.unmerge_lora(model)
    placing.remove(model, name)
    pretrained.detached(model)


@_verb
def lora_adapter(model: nn.Module, name: str | None = None) -> LoRAAdapter:
    """One adapter as a value of its own (copies, on the CPU); of a sharded model every process calls it."""
    from .adapter import LoRAAdapter

    return LoRAAdapter.of(loading.read_adapter_of(model, name).copy())


@_verb
def lora_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """One adapter's tensors under PEFT's names (copies, on the CPU); of a sharded model every process calls it."""
    return loading.lora_state_dict(model, name)


@_verb
def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without a key of LoRA's: what the base's own class loads. While merged, with ΔW in it."""
    return pretrained.base_state_dict(model)


@_verb
def lora_summary(model: nn.Module) -> Summary:
    """Adapters, targets, trainable share and bytes, as data."""
    return summary.summarise(model)


@_verb
def print_lora_summary(model: nn.Module) -> None:
    """Print targets, trainable share, bytes, and what did not match."""
    print(summary.summarise(model))  # noqa: T201  # printing is what it is for


@_verb
def lora_names(model: nn.Module) -> tuple[str, ...]:
    """The adapters on this model, in the order they came."""
    state = placing.state_of(model)
    return () if state is None else tuple(state.entries)


@_verb
def active_lora(model: nn.Module) -> str | Mapping[str, float] | list[str | None] | None:
    """What is active here and now: a name, {name: weight}, a route's list, or None."""
    state = placing.state_of(model)
    return None if state is None else switching.described(state.current)
