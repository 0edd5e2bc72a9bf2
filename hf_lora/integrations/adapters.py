"""transformers' own adapter methods: as they were for a model without our LoRA, through ours for a model that has it.

`load_adapter` is also where `from_pretrained` ends when it was given an adapter.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from .. import loading, switching
from .. import model as placing
from ..config import LoRAConfig
from ..errors import LoRAFileError, LoRANameError, LoRAStateError, LoRAUnsupportedError
from ..model import state_of
from ..state import NOTHING, Active, LoRAState
from ..store import PICKLE_NAME, from_state_dict
from ..values import AdapterValue
from . import pretrained
from .importing import when_imported
from .patching import Registry

__all__ = ["LoadingInfo", "install", "needs_peft", "peft_installed", "without_own"]

logger = logging.getLogger(__name__)

# Keys of `adapter_kwargs` that only hf_lora knows.
OWN = frozenset({"allow_pickle"})
# Of the keys that transformers downloads with, those that `load_lora` takes too. The others have no effect on a LoRA.
_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
_PREFIX = "base_model.model."  # PEFT's keys on disk begin with it, those of the adapter methods do not
_DISABLED = "disabled_adapters"  # state.facts: the default while disabled, and what enable_adapters() brings back


def peft_installed() -> bool:
    """Whether transformers sees peft: its own answer, which is not replaced."""
    from transformers.utils.import_utils import is_peft_available

    return is_peft_available()


def without_own(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that transformers knows."""
    return {key: value for key, value in options.items() if key not in OWN}


def needs_peft(error: LoRAUnsupportedError, source: str) -> LoRAUnsupportedError:
    """`error`, with what it is about and what to do where peft is missing."""
    return LoRAUnsupportedError(
        f"{source}: {error.message}",
        name=error.name,
        value=error.value,
        expected=error.expected,
        facts=error.facts,
        remedy="Install peft, and transformers loads it through peft.",
    )


class LoadingInfo:
    """What `load_adapter` returns, as transformers' own: nothing is ever missing, since loading is all or nothing."""

    def __init__(self) -> None:
        self.missing_keys: set[str] = set()
        self.unexpected_keys: set[str] = set()
        self.mismatched_keys: set[tuple[str, Any, Any]] = set()
        self.error_msgs: list[str] = []
        self.conversion_errors: dict[str, str] = {}

    def to_dict(self) -> dict[str, Any]:
        """The keys that `from_pretrained(output_loading_info=True)` gives."""
        return {key: value for key, value in vars(self).items() if key != "conversion_errors"}


# ---- load_adapter ----------------------------------------------------------------------------------------------------


def _load_adapter(
    model: Any,
    peft_model_id: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    peft_config: Any = None,
    adapter_state_dict: dict[str, Tensor] | None = None,
    low_cpu_mem_usage: bool = False,
    is_trainable: bool = False,
    hotswap: bool | str = "auto",
    local_files_only: bool = False,
    adapter_kwargs: dict[str, Any] | None = None,
    load_config: Any = None,
    **kwargs: Any,
) -> LoadingInfo:
    """Load an adapter and make it the only active one. `low_cpu_mem_usage` changes nothing: it is low anyway."""
    name = "default" if adapter_name is None else adapter_name
    if peft_model_id is not None:
        options, allow_pickle = _options(load_config, adapter_kwargs, local_files_only, kwargs)
        if os.path.isdir(peft_model_id):
            options.pop("revision", None)  # as stock: it may be meant for the base
        try:
            value = loading.read_source(peft_model_id, allow_pickle=allow_pickle, **options)
        except LoRAFileError as error:
            if error.name == PICKLE_NAME and not allow_pickle:
                error.remedy = 'Pass adapter_kwargs={"allow_pickle": True} (weights only), or save it as safetensors.'
            raise
    else:
        value = _value(peft_config, adapter_state_dict)
    state = state_of(model)
    resident = state is not None and name in state.entries
    if hotswap is True and not resident:
        raise LoRANameError(
            f"There is no adapter {name!r} on this model to hotswap.",
            name=name,
            value=name,
            expected=() if state is None else tuple(state.entries),
            remedy="Load it under this name first, or pass hotswap=False.",
        )
    replace = resident and (hotswap is True or (hotswap == "auto" and getattr(model, "_hotswap_enabled", False)))
    placing.put(
        model,
        value,
        name,
        trainable=is_trainable,
        replace=replace,
        active=True if not replace else None,
        complete=peft_model_id is not None,
    )
    pretrained.attached(model)
    if not is_trainable:
        model.eval()
    return LoadingInfo()


def _options(
    load_config: Any, adapter_kwargs: Mapping[str, Any] | None, local_files_only: bool, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Where to fetch from, and whether a pickle may be read."""
    adapter_kwargs = {} if adapter_kwargs is None else adapter_kwargs
    given = {**vars(load_config), **kwargs} if load_config is not None else dict(kwargs)
    download = dict(given.get("download_kwargs") or {})
    # transformers resolved this revision for the base: what counts for the adapter is what the user asked for.
    download["revision"] = getattr(download.get("revision"), "initial", download.get("revision"))
    download |= {key: kwargs[key] for key in _OPTIONS if key in kwargs} | dict(adapter_kwargs)
    if local_files_only:
        download["local_files_only"] = True
    options = {key: download[key] for key in _OPTIONS if download.get(key)}
    return options, bool(adapter_kwargs.get("allow_pickle")) or given.get("use_safetensors") is False


def _value(peft_config: Any, tensors: Mapping[str, Tensor] | None) -> AdapterValue:
    if peft_config is None or tensors is None:
        raise LoRAStateError(
            "load_adapter() needs a folder or repo, or a config and a state dict.",
            name="peft_model_id",
            value=None,
            remedy="Pass peft_model_id, or both peft_config and adapter_state_dict; add_adapter() makes a new one.",
        )
    config = peft_config if isinstance(peft_config, LoRAConfig) else LoRAConfig.from_peft(peft_config)
    named = {key if key.startswith(_PREFIX) else _PREFIX + key: tensor for key, tensor in tensors.items()}
    return from_state_dict(config, named)


def _loader(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`load_adapter` for every model.

    Ours where the model has our LoRA, where `from_pretrained` calls (it passes `load_config`), and where there is no
    peft; what hf_lora does not compute goes on to stock if peft is there.
    """

    @functools.wraps(stock)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        mine = state_of(self) is not None
        theirs = not mine and bool(getattr(self, "_hf_peft_config_loaded", False))
        if theirs or not (mine or kwargs.get("load_config") is not None or not peft_installed()):
            return stock(self, *args, **kwargs)
        try:
            return _load_adapter(self, *args, **kwargs)
        except LoRAUnsupportedError as error:
            source = str(args[0] if args else kwargs.get("peft_model_id"))
            if not peft_installed():
                raise needs_peft(error, source) from None
            if mine:
                raise
            if error.name != "peft_type":
                logger.warning("%s is loaded through peft: %s", source, error.message)
            if kwargs.get("adapter_kwargs"):
                kwargs["adapter_kwargs"] = without_own(kwargs["adapter_kwargs"])
            return stock(self, *args, **kwargs)

    return load_adapter


def _wrap_language_adapters(registry: Registry, module: ModuleType) -> None:
    """Wav2Vec2's `load_adapter` means a language; what `from_pretrained` calls is not that."""
    owner: Any = module.Wav2Vec2PreTrainedModel
    language = owner.load_adapter

    @functools.wraps(language)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("load_config") is None:
            return language(self, *args, **kwargs)
        return super(owner, self).load_adapter(*args, **kwargs)

    registry.set(owner, "load_adapter", load_adapter)


# ---- the other methods, of a model with our LoRA ---------------------------------------------------------------------


def _add_adapter(model: Any, adapter_config: Any, adapter_name: str | None = None) -> None:
    placing.add(model, adapter_config, adapter_name or "default")
    pretrained.attached(model)


def _delete_adapter(model: Any, adapter_names: list[str] | str) -> None:
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    state = placing.require(model)
    state.require_unmerged("delete_adapter")
    for name in names:  # all of them, or none
        state.entry(name)
    for name in dict.fromkeys(names):
        placing.remove(model, name)
    pretrained.detached(model)


def _set_adapter(model: Any, adapter_name: list[str] | str) -> None:
    state = placing.require(model)
    if _remembered(state) is None:
        switching.set_lora(model, adapter_name)
    else:  # as stock: while disabled, only what enable_adapters() brings back changes
        state.facts[_DISABLED] = (state.default, switching.selection(state, adapter_name))


def _disable_adapters(model: Any) -> None:
    state = placing.require(model)
    state.require_unmerged("disable_adapters")
    if _remembered(state) is None:
        nothing = Active()  # its own object: whatever makes something else the default ends the disabling
        state.facts[_DISABLED] = (nothing, state.default)
        state.default = nothing


def _enable_adapters(model: Any) -> None:
    state = placing.require(model)
    state.require_unmerged("enable_adapters")
    active = _remembered(state)
    if active is not None:
        state.widen(active)
        state.default = active


def _active_adapters(model: Any) -> list[str]:
    state = placing.require(model)
    active = _remembered(state)
    return [entry.name for entry in (state.current if active is None or state.overridden else active).entries]


def _remembered(state: LoRAState) -> Active | None:
    """What enable_adapters() brings back, less what has been removed since; None if adapters are not disabled."""
    nothing, active = state.facts.get(_DISABLED, (None, NOTHING))
    if state.default is not nothing:
        return None
    left = tuple((entry, weight) for entry, weight in active.mixture if entry.alive)
    return Active(left) if left else NOTHING


def _get_adapter_state_dict(
    model: Any, adapter_name: str | None = None, state_dict: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    if state_dict is not None:
        raise LoRAUnsupportedError(
            "get_adapter_state_dict(state_dict=...) is not supported for a model with a LoRA of hf_lora.",
            name="state_dict",
            remedy="Leave it out: the adapter is read from the model.",
        )
    tensors = loading.lora_state_dict(model, adapter_name or next(iter(_active_adapters(model)), None))
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


def _enable_peft_hotswap(model: Any, target_rank: int = 128, check_compiled: str = "error") -> None:
    """From now on loading under a taken name replaces that adapter; up to this rank that compiles nothing anew."""
    if check_compiled not in ("error", "warn", "ignore"):
        raise LoRAStateError(
            f"check_compiled={check_compiled!r} is none of 'error', 'warn', 'ignore'.",
            name="check_compiled",
            value=check_compiled,
            expected=("error", "warn", "ignore"),
        )
    state = placing.require(model)
    placing.reserve(model, len(state.entries) + 1, target_rank)
    model._hotswap_enabled = True


METHODS: dict[str, Callable[..., Any]] = {
    "add_adapter": _add_adapter,
    "set_adapter": _set_adapter,
    "disable_adapters": _disable_adapters,
    "enable_adapters": _enable_adapters,
    "active_adapters": _active_adapters,
    "get_adapter_state_dict": _get_adapter_state_dict,
    "delete_adapter": _delete_adapter,
    "enable_peft_hotswap": _enable_peft_hotswap,
}


def _either(stock: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (stock if state_of(self) is None else ours)(self, *args, **kwargs)

    return method


def install(registry: Registry, cls: Any) -> None:
    """Wrap the adapter methods of `cls`, which is PreTrainedModel."""
    for name, ours in METHODS.items():
        registry.set(cls, name, _either(getattr(cls, name), ours))
    registry.set(cls, "load_adapter", _loader(cls.load_adapter))
    wav2vec2 = "transformers.models.wav2vec2.modeling_wav2vec2"
    when_imported(wav2vec2, functools.partial(_wrap_language_adapters, registry))
