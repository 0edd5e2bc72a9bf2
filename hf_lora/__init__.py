"""LoRA (Hu et al., 2021) as a native verb of every transformers model.

`import hf_lora` adds the verbs to `PreTrainedModel`; `hf_lora.unregister()` takes them away again.

    model.add_lora(LoRAConfig(r=8, target_modules=["q", "v"]))
    Trainer(model, args, train_dataset=ds).train()
    model.save_lora("out/")
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    LoRAConfigError,
    LoRAError,
    LoRAFileError,
    LoRAHubError,
    LoRAMismatchError,
    LoRANameError,
    LoRAPoolError,
    LoRARouteError,
    LoRAStateError,
    LoRATargetError,
    LoRAUnsupportedError,
)
from .registration import register, unregister

if TYPE_CHECKING:
    from . import analysis as analysis
    from .adapter import LoRAAdapter
    from .arithmetic import combine
    from .config import LoRAConfig
    from .hub import list_adapters
    from .importers import extract_lora
    from .kasa import kasa_loss
    from .monteclora import monteclora_loss
    from .optimizer import optimizer_groups
    from .planning import plan
    from .pool import LoRAPool
    from .rankcallback import RankCallback
    from .ranks import RankAllocator
    from .training import LoRACallback
    from .verbs import (
        active_lora,
        add_lora,
        base_state_dict,
        load_lora,
        lora_adapter,
        lora_names,
        lora_state_dict,
        lora_summary,
        merge_and_save,
        merge_lora,
        no_lora,
        prepare_lora,
        print_lora_summary,
        push_adapter_to_hub,
        remove_lora,
        reserve_lora,
        route_lora,
        save_lora,
        set_lora,
        train_lora,
        unmerge_lora,
        use_lora,
    )

__all__ = [
    "LoRAAdapter",
    "LoRACallback",
    "LoRAConfig",
    "LoRAConfigError",
    "LoRAError",
    "LoRAFileError",
    "LoRAHubError",
    "LoRAMismatchError",
    "LoRANameError",
    "LoRAPool",
    "LoRAPoolError",
    "LoRARouteError",
    "LoRAStateError",
    "LoRATargetError",
    "LoRAUnsupportedError",
    "RankAllocator",
    "RankCallback",
    "__version__",
    "active_lora",
    "add_lora",
    "base_state_dict",
    "combine",
    "extract_lora",
    "kasa_loss",
    "list_adapters",
    "load_lora",
    "lora_adapter",
    "lora_names",
    "lora_state_dict",
    "lora_summary",
    "merge_and_save",
    "merge_lora",
    "monteclora_loss",
    "no_lora",
    "optimizer_groups",
    "plan",
    "prepare_lora",
    "print_lora_summary",
    "push_adapter_to_hub",
    "register",
    "remove_lora",
    "reserve_lora",
    "route_lora",
    "save_lora",
    "set_lora",
    "train_lora",
    "unmerge_lora",
    "unregister",
    "use_lora",
]

__version__ = "0.1.0"

# Public name -> the file it lives in, imported at its first use: these need torch, which takes seconds to import.
_LATER = {
    "LoRAAdapter": "adapter",
    "LoRACallback": "training",
    "LoRAConfig": "config",
    "LoRAPool": "pool",
    "RankAllocator": "ranks",
    "RankCallback": "rankcallback",
    "combine": "arithmetic",
    "extract_lora": "importers",
    "kasa_loss": "kasa",
    "list_adapters": "hub",
    "monteclora_loss": "monteclora",
    "optimizer_groups": "optimizer",
    "plan": "planning",
    **dict.fromkeys(
        (
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
        ),
        "verbs",
    ),
}

# Rooms that are reached as `hf_lora.<room>.…`, imported at their first use.
_ROOMS = frozenset({"analysis"})


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_ROOMS})


register()
