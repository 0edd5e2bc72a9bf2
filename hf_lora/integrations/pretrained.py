"""PreTrainedModel's own methods, for a model with our LoRA: saving, activation checkpointing, resizing embeddings.

Each is called through for any other model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRAFileError, LoRAStateError, LoRAUnsupportedError
from ..layerinfo import is_held
from ..loading import push_lora, save_checkpoint
from ..model import exclusive, put, read, remove, state_of
from ..sharding import is_sharded
from ..state import Active, LoRAState
from ..tokenfields import ids_of
from ..tokens import rows_of
from ..values import AdapterValue
from .checkpointing import bind_checkpoints, unbind_checkpoints
from .patching import Registry

__all__ = ["attached", "base_state_dict", "detached", "install"]

_PUSH_OPTIONS = frozenset(
    {"commit_message", "private", "token", "revision", "create_pr"}
)  # of push_to_hub, and of ours


def attached(model: nn.Module) -> None:
    """What transformers has to know of a model that has just got a LoRA."""
    with exclusive(model) as state:  # it walks the modules, which another thread may be changing
        if state is None:
            return
        bind_checkpoints(model, state)
        if hasattr(type(model), "_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = True  # type: ignore[assignment]


def detached(model: nn.Module) -> None:
    """Forget it again once the last adapter is gone."""
    with exclusive(model) as state:
        if state is None:
            unbind_checkpoints(model)
            model.__dict__.pop("_hf_peft_config_loaded", None)


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without a key of ours."""
    return {key: tensor for key, tensor in model.state_dict().items() if not is_held(key)}


def install(registry: Registry, cls: Any) -> None:
    """Wrap the methods of `cls`, which is PreTrainedModel."""
    save, checkpointing, resize = cls.save_pretrained, cls._set_gradient_checkpointing, cls.resize_token_embeddings
    push, tie_weights = cls.push_to_hub, cls.tie_weights

    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self) or _state_around(self)
        if state is None:
            return save(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        options = given.arguments | given.arguments.get("kwargs", {})
        tensors = options.get("state_dict")
        if state.merged is not None:  # the whole merged model, as stock writes it
            _refuse_beside_an_adapter(options["save_directory"])
            tensors = base_state_dict(self) if tensors is None else {k: t for k, t in tensors.items() if not is_held(k)}
            given.arguments["state_dict"] = tensors
            loaded = self.__dict__.pop("_hf_peft_config_loaded", None)
            try:
                with _parted(self, tensors) if state.merged.ties else contextlib.nullcontext():
                    return save(*given.args, **given.kwargs)
            finally:
                if loaded is not None:
                    self._hf_peft_config_loaded = loaded
        if options.get("push_to_hub"):
            raise LoRAUnsupportedError(
                "save_pretrained(push_to_hub=True) of a model with a LoRA is not supported.",
                name="push_to_hub",
                value=True,
                remedy="Call push_adapter_to_hub(repo_id), which adds a card.",
            )
        sharded = is_sharded(self)
        if tensors is not None and not sharded:
            _require_own(self, tensors)
        if not options.get("is_main_process", True) and (tensors is not None or not sharded):
            return None  # of a sharded model every process takes part in gathering it
        return save_checkpoint(self, options["save_directory"], tensors if sharded else None)

    @functools.wraps(checkpointing)
    def _set_gradient_checkpointing(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = checkpointing(self, *args, **kwargs)
        state = state_of(self)
        if state is not None:
            bind_checkpoints(self, state)
        return result

    @functools.wraps(resize)
    def resize_token_embeddings(self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        unchanged = new_num_tokens is None and not (args and args[0]) and not kwargs.get("pad_to_multiple_of")
        touched = set() if state is None or unchanged else _embeddings(self)
        residents = [] if state is None else [entry.record for entry in state.entries.values()]
        if not any(touched & {*resident.layers, *resident.heads} for resident in residents):
            return resize(self, new_num_tokens, *args, **kwargs)
        _require_rows(residents, new_num_tokens, args, kwargs)
        with _taken_off(self) as values:
            embeddings = resize(self, new_num_tokens, *args, **kwargs)
            for path in touched:  # a new layer is born in training mode, where the adapter's dropout would run
                self.get_submodule(path).train(self.training)
            values[:] = [_resized(self, value, touched) for value in values]
        return embeddings

    @functools.wraps(tie_weights)
    def tying(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        if state is not None and state.merged is not None and state.merged.ties:
            raise LoRAStateError(
                f"tie_weights() would take away what a merge wrote into {', '.join(state.merged.ties)}, which has a "
                "copy of its own while merged (untie=True).",
                name="tie_weights",
                value=tuple(state.merged.ties),
                remedy="Call unmerge_lora() first, or merge_and_save().",
            )
        return tie_weights(self, *args, **kwargs)

    @functools.wraps(push)
    def push_to_hub(self: Any, repo_id: str, *args: Any, **options: Any) -> Any:
        state = state_of(self)
        if state is None or state.merged is not None:
            return push(self, repo_id, *args, **options)
        others = sorted(options.keys() - _PUSH_OPTIONS)
        if args or others:
            raise LoRAUnsupportedError(
                f"push_to_hub() of a model with a LoRA pushes the adapter, and does not take {', '.join(others)}.",
                name=others[0] if others else None,
                expected=sorted(_PUSH_OPTIONS),
                remedy="Leave it out, or call push_adapter_to_hub().",
            )
        return push_lora(self, repo_id, **options)  # stock would publish the path of a base that lies in a folder

    registry.set(cls, "save_pretrained", save_pretrained)
    registry.set(cls, "push_to_hub", push_to_hub)
    registry.set(cls, "tie_weights", tying)
    registry.set(cls, "_set_gradient_checkpointing", _set_gradient_checkpointing)
    registry.set(cls, "resize_token_embeddings", resize_token_embeddings)


def _state_around(model: nn.Module) -> LoRAState | None:
    """The state of the model that this one lies in, if its adapters are merged; stock would write their keys, too.

    Raises:
        LoRAStateError: they are not merged.
    """
    for path, module in model.named_modules():
        if is_held(path) and isinstance(state := getattr(module, "state", None), LoRAState):
            if state.merged is not None:
                return state
            raise LoRAStateError(
                f"{path.rpartition('.')[0]} carries adapters that were added through the model around this one.",
                name=path,
                remedy="Save them with hf_lora.save_lora(model, directory) of that model; to save the whole, call "
                "merge_lora() or remove_lora() there first.",
            )
    return None


def _refuse_beside_an_adapter(directory: str | os.PathLike[str]) -> None:
    """Refuse a folder with an adapter in it for a merged model: `from_pretrained` would apply the adapter again."""
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", ".adapter_config.json.pending")
    found = [name for name in names if os.path.lexists(os.path.join(directory, name))]
    if found:
        raise LoRAFileError(
            f"{os.fspath(directory)} holds {', '.join(found)}: from_pretrained() of a merged model there would add the "
            "adapter a second time. Nothing was written.",
            name=found[0],
            value=os.fspath(directory),
            remedy="Save the merged model to a folder of its own, or delete the adapter's files there.",
        )


@contextlib.contextmanager
def _parted(model: Any, tensors: dict[str, Tensor]) -> Iterator[None]:
    """While a model of which a merge has untied weights is saved, it ties none: its configs say so, all are written.

    With `tie_word_embeddings=False` from_pretrained() would leave what is still shared, and so written once, random.
    """
    seen: set[int] = set()
    for key, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[key] = tensor.detach().clone()
        seen.add(tensor.data_ptr())
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    tying = list({id(c): c for c in configs if getattr(c, "tie_word_embeddings", False)}.values())
    for config in tying:
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        for config in tying:
            config.tie_word_embeddings = True


def _require_own(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless a state dict that a caller hands over holds what the adapters on the model are."""
    for name, own in model.state_dict().items():
        other = tensors.get(name) if is_held(name) else own
        if other is None or not (other is own or torch.equal(other.detach().cpu(), own.detach().cpu())):
            raise LoRAUnsupportedError(
                f"save_pretrained() was given a state dict in which {name!r} is not what the model holds.",
                name=name,
                remedy="Leave state_dict out: the adapter is read from the model.",
            )


def _embeddings(model: Any) -> set[str]:
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {path for path, module in model.named_modules(remove_duplicate=False) if any(module is x for x in layers)}


def _require_rows(
    residents: Sequence[Any], tokens: int | None, args: tuple[Any, ...], options: Mapping[str, Any]
) -> None:
    """Raise if an embedding would be cut below a token whose row an adapter trains."""
    multiple = (args[0] if args else options.get("pad_to_multiple_of")) or 1
    for resident in residents:
        indices = resident.config.trainable_token_indices
        ids = [i for path in resident.heads for i in ids_of(indices, path) or ()]
        if tokens is not None and ids and max(ids) >= -(-tokens // multiple) * multiple:
            raise LoRAStateError(
                f"resize_token_embeddings({tokens}) would take away token {max(ids)}, whose row an adapter trains.",
                name="trainable_token_indices",
                value=tokens,
                remedy="Keep more tokens, or remove_lora() that adapter first.",
            )


class _taken_off:
    """Take every adapter off a model, and put them back with the same names, slots' order, activity and training."""

    def __init__(self, model: Any) -> None:
        self.model, self.state = model, state_of(model)

    def __enter__(self) -> list[AdapterValue]:
        assert self.state is not None
        self.state.require_unmerged("resize_token_embeddings")
        if self.state.overridden:
            raise LoRAStateError(
                "resize_token_embeddings() cannot be used inside use_lora() or route_lora().",
                remedy="Leave the with block first.",
            )
        # Heads of which single rows train are resized: their rows stay, by the ids of their tokens.
        heads = sorted(
            {
                path
                for entry in self.state.entries.values()
                for path in entry.record.heads
                if rows_of(self.model.get_submodule(path), entry.slot) is None
            }
            & _embeddings(self.model)
        )
        if heads:
            raise LoRAUnsupportedError(
                f"{', '.join(heads)}: an adapter trains it whole, so its tokens cannot be resized any more.",
                name=heads[0],
                remedy="Call resize_token_embeddings() before add_lora().",
            )
        self.names = [(entry.name, entry.trainable) for entry in self.state.entries.values()]
        self.notes = [(e.record.skipped, e.record.architecture, e.record.run) for e in self.state.entries.values()]
        self.active = [(entry.name, weight) for entry, weight in self.state.default.mixture]
        self.values = [read(self.model, name) for name, _ in self.names]
        self.facts = self.state.facts
        remove(self.model)
        return self.values

    def __exit__(self, *error: Any) -> None:
        for (name, trainable), value in zip(self.names, self.values, strict=True):
            put(self.model, value, name, trainable=trainable, active=False)
        attached(self.model)
        state = state_of(self.model)
        assert state is not None
        for (name, _), (skipped, architecture, run) in zip(self.names, self.notes, strict=True):
            record = state.entry(name).record
            record.skipped, record.architecture, record.run = skipped, architecture, run
        state.facts = {**self.facts, **state.facts}
        state.default = Active(tuple((state.entry(name), weight) for name, weight in self.active))


def _resized(model: Any, value: AdapterValue, touched: set[str]) -> AdapterValue:
    """The value with columns (an embedding) or rows (an output head) of zeros for new tokens, and without lost ones."""
    factors = dict(value.factors)
    for path in touched & factors.keys():
        pair, tokens = factors[path], model.get_submodule(path).weight.shape[0]
        if pair.kind == "embedding":
            factors[path] = dataclasses.replace(pair, A=_to_length(pair.A.T, tokens).T.contiguous())
        else:
            factors[path] = dataclasses.replace(pair, B=_to_length(pair.B, tokens))
    copies = {name: copied for name, copied in value.embeddings.items() if name.rpartition(".")[0] not in touched}
    return dataclasses.replace(value, factors=factors, embeddings=copies)


def _to_length(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(max(rows - len(tensor), 0), tensor.shape[1])])[:rows]
