"""What a model may be wrapped in: the model itself is inside, and a LoRA is put on it, not on the wrapper."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .errors import LoRAUnsupportedError

__all__ = ["refuse_peft", "unwrapped"]

# Class -> the child that is the model. These call it as it is, so that a layer that is swapped inside is seen.
_WRAPPERS: Mapping[str, str] = {
    "OptimizedModule": "_orig_mod",  # torch.compile(model)
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}

_FLATTENED: Mapping[str, str] = {
    "FullyShardedDataParallel": "its parameters are flattened into one",
    "DeepSpeedEngine": "its optimizer holds the parameters already",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of `torch.compile`, DataParallel and DistributedDataParallel, however deep.

    Raises:
        LoRAUnsupportedError: it is wrapped by what has taken its parameters away. TypeError: it is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is wanted, an nn.Module; {type(model).__name__} is none")
    while (name := type(model).__name__) in _WRAPPERS or name in _FLATTENED:
        if name in _FLATTENED:
            raise LoRAUnsupportedError(
                f"The model is wrapped in a {name}: {_FLATTENED[name]}.",
                name=name,
                value=name,
                remedy="Give the model itself, before it is wrapped; fully_shard() works before and after.",
            )
        inside = model._modules.get(_WRAPPERS[name])
        if inside is None:  # somebody's own class of that name
            return model
        model = inside
    return model


def refuse_peft(modules: Mapping[str, nn.Module]) -> None:
    """Raise if PEFT has put layers of its own into a model: they have other names, and theirs would be adapted too."""
    for path, module in modules.items():
        if type(module).__module__.startswith("peft."):
            raise LoRAUnsupportedError(
                f"The model carries an adapter of PEFT already: {path or 'the model itself'} is a "
                f"{type(module).__module__}.{type(module).__name__}.",
                name=path,
                value=type(module).__name__,
                remedy="Take it off first (model.unload(), or delete_adapter() of the model), save it with "
                "save_pretrained() and load it with load_lora().",
            )
