"""What has to hold of a model before an adapter is put on it or taken off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from .errors import LoRANameError, LoRAStateError, LoRAUnsupportedError
from .expertlayers import ExpertSlots
from .layers import LoRAHeads, Swapped
from .sharding import refuse_sharded
from .slots import LoRASlots
from .state import Entry, LoRAState
from .wrappers import refuse_peft

__all__ = ["refuse_foreign", "refuse_managed", "require_putable"]


def require_putable(
    model: nn.Module, name: str, replace: bool, state: LoRAState | None, modules: Mapping[str, nn.Module]
) -> None:
    """Raise if no adapter can be put under this name now, whatever it holds."""
    if not isinstance(name, str) or not name:
        raise LoRANameError(
            f"{name!r} is no name for an adapter.",
            value=name,
            expected="a string that is not empty",
            remedy='Give any string, such as "task" or "org/task".',
        )
    if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise LoRANameError(
            f"{name!r} is no name for an adapter: it holds half of a character, which no file or log can.",
            value=name,
            expected="text",
            remedy='Give any other string, such as "task" or "org/task".',
        )
    refuse_foreign(model, state, modules)
    if state is not None:
        state.require_unmerged("add_lora")
        if state.overridden and any(state.current.entries):
            raise LoRAStateError(
                "An adapter cannot be added inside use_lora() or route_lora().",
                remedy="Add or load it before the with block.",
            )
        if name in state.entries and not replace:
            raise LoRANameError(
                f"An adapter named {name!r} is already on this model.",
                name=name,
                value=name,
                remedy="Choose another name, remove_lora() it, or pass replace=True.",
            )
        if name in state.entries:
            state.require_unused("replace", [state.entries[name]])
        refuse_managed(model, [state.entries[name]] if name in state.entries else [], "replaced")


def refuse_foreign(model: nn.Module, state: LoRAState | None, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a model that is split by tensor parallelism, or carries adapters that are not its state's."""
    size = getattr(model, "_tp_size", None) or 1
    if size > 1:
        raise LoRAUnsupportedError(
            f"This model is split over {size} devices by tensor parallelism, where a LoRA's factors would have to be "
            "sharded with it.",
            name="tp_plan",
            value=size,
            remedy="Load it without tp_plan (device_map and DDP work).",
        )
    if state is None and getattr(model, "peft_config", None):
        raise LoRAUnsupportedError(
            f"This {type(model).__name__} carries adapters of PEFT: {', '.join(map(repr, model.peft_config))}.",  # type: ignore[arg-type]
            name="peft_config",
            remedy="Unload them (delete_adapter, or PeftModel.unload), or save them and load_lora() the files.",
        )
    refuse_peft(modules)
    for path, module in modules.items():
        held = module._modules.get("lora_slots") or module._modules.get("lora_heads")
        if isinstance(held, (LoRASlots, LoRAHeads, ExpertSlots)) and held.state is not state:
            raise LoRAStateError(
                f"{path} carries adapters that were added through another model (the one inside this, or around it).",
                name=path,
                remedy="Add all adapters through the same model, or remove_lora() there first.",
            )


def refuse_managed(model: nn.Module, entries: Iterable[Entry], what: str) -> None:
    """Refuse to take off a sharded model what fully_shard() manages: Parameters, and the classes of its own modules."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in entries:
        layers = [modules.get(path) for path in (*entry.record.layers, *entry.record.experts)]
        beneath = any(isinstance(m, Swapped) and "lora_base" not in vars(type(m)) for m in layers)
        if entry.trainable or entry.record.heads or beneath:
            refuse_sharded(
                model,
                f"Adapter {entry.name!r} was there before fully_shard() and cannot be {what}",
                "Choose what is on the model before fully_shard(), or save_lora() and build the model again.",
            )
