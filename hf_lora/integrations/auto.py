"""`from_pretrained(adapter)` and `pipeline(model=adapter)`: base + adapter, with and without peft installed.

transformers looks for an adapter_config.json in three places (Auto classes, concrete classes, pipelines), but only
where peft is installed; then it loads the base that the file names and calls `model.load_adapter`. So three things are
replaced: what these places see as `is_peft_available` and `find_adapter_config_file`, and `load_adapter` (`adapters`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import hub, store
from ..errors import LoRAConfigError, LoRAUnsupportedError
from . import adapters
from .importing import when_imported
from .patching import Registry

__all__ = ["install"]

# Modules that import the two names, and the functions in them that use both.
LOOKING = {
    "transformers.integrations.peft": "maybe_load_adapters",
    "transformers.models.auto.auto_factory": "_BaseAutoModelClass.from_pretrained",
    "transformers.pipelines": "pipeline",
}


def install(registry: Registry) -> None:
    """Replace what transformers looks with, in each module once that is imported, and the adapter methods."""
    from transformers import PreTrainedModel

    adapters.install(registry, PreTrainedModel)
    for name in LOOKING:
        when_imported(name, functools.partial(_wrap, registry))


def _wrap(registry: Registry, module: ModuleType) -> None:
    names = vars(module)
    if not names["is_peft_available"]():
        registry.set(module, "is_peft_available", _adapters_available)
    registry.set(module, "find_adapter_config_file", _checked(names["find_adapter_config_file"]))


def _adapters_available() -> bool:
    """What replaces `is_peft_available` where peft is not installed: hf_lora loads the adapter."""
    return True


def _checked(find: Callable[..., str | None]) -> Callable[..., str | None]:
    """`find_adapter_config_file`, refusing what nobody here can load before the base is loaded for nothing."""

    @functools.wraps(find)
    def find_adapter_config_file(model_id: Any, *args: Any, **kwargs: Any) -> str | None:
        found = find(model_id, *args, **adapters.without_own(kwargs))
        if found is not None and not hub.is_whole(found):  # a damaged file would stay in the cache for ever
            found = find(model_id, *args, **adapters.without_own(kwargs))
        if found is None and kwargs.get("subfolder"):  # transformers 5.0 knows subfolders of repos alone
            local = os.path.join(model_id, kwargs["subfolder"], store.CONFIG_NAME)
            found = local if os.path.isfile(local) else None
        if found is None:
            return None
        try:
            config = store.read_config(os.path.dirname(found))
            if not adapters.peft_installed():
                config.require_supported()
        except LoRAUnsupportedError as error:
            if adapters.peft_installed():
                return found  # transformers and peft see to it
            raise adapters.needs_peft(error, str(model_id)) from None
        except LoRAConfigError as error:
            # AdapterHub's files have the same name. In a folder with a whole model stock overlooks them without peft.
            if error.name == "peft_type" and _whole_model(model_id) and not adapters.peft_installed():
                return None
            raise
        if not config.base_model and not _whole_model(model_id):
            raise LoRAConfigError(
                f"The adapter {str(model_id)!r} does not say which base model it belongs to.",
                name="base_model_name_or_path",
                value=config.base_model,
                expected="a folder, or 'user/name'",
                remedy="Load the base with from_pretrained() and the adapter with model.load_lora().",
            )
        return found

    return find_adapter_config_file


def _whole_model(model_id: Any) -> bool:
    return os.path.isfile(os.path.join(model_id, "config.json"))
