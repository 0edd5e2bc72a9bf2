"""Layers that hold other tensors for a while: what they had is kept as it is, and put back.

While an adapter is merged a quantised layer holds round(Q + ΔW), quantised as Q was, or (`dense`) a matrix of floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from .backends import backend_of, stored_bytes
from .errors import LoRAStateError, LoRAUnsupportedError
from .layerinfo import is_held, modules_of
from .layers import Swapped, swapped_class
from .weights import compute_dtype, device_of

__all__ = ["Kept", "KeptModel", "dense", "only_said", "quantised_layers"]

_NOT_KEPT = frozenset({"training", "_modules"})  # what may change meanwhile, and stays


class Kept:
    """One layer as it is, until `restore`."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own = module, type(module)
        self.names = {name: value for name, value in vars(module).items() if name not in _NOT_KEPT}
        self.tensors = {name: dict(vars(module)[name]) for name in ("_parameters", "_buffers")}
        slots = module._modules.get("lora_slots")
        self.base = None if slots is None else (slots.base, slots.fresh)
        self.device = device_of(module)
        self.instead: Any = None  # the weight that took its place

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(stored_bytes(tensor) for tensor in self.tensors["_parameters"].values() if tensor is not None)

    def hold(self) -> None:
        """The layer holds now what it is to hold meanwhile."""
        self.instead = self.module._parameters.get("weight")

    def require_unchanged(self, path: str) -> None:
        """Raise if the layer does not hold any more what took the weight's place."""
        if self.module._parameters.get("weight") is not self.instead:
            raise LoRAStateError(
                f"{path}: the weight changed since it was merged, so the base cannot be restored.",
                name=path,
                remedy="Load the base model again; do not train or overwrite weights while an adapter is merged.",
            )

    def restore(self) -> None:
        """Let the layer hold what it had, the very tensors; on the device where the layer is now."""
        module, device = self.module, device_of(self.module)
        names = vars(module)
        for name in [name for name in names if name not in self.names and name not in _NOT_KEPT]:
            del names[name]
        names.update(self.names)
        for name, tensors in self.tensors.items():
            names[name].clear()
            names[name].update(tensors)
        object.__setattr__(module, "__class__", self.own)
        slots: Any = module._modules.get("lora_slots")
        if slots is not None and self.base is not None:
            vars(slots)["base"], vars(slots)["fresh"] = self.base
        if device != self.device:
            module.to(device)


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer of the model whose weight is quantised."""
    for path, module in modules_of(model).items():
        if backend_of(module) is not None:
            yield path, module


def only_said(model: nn.Module) -> bool:
    """Whether the model calls itself quantised, and no layer of it is: one that was dequantised from a GGUF file."""
    return vars(model).get("hf_quantizer") is not None and next(quantised_layers(model), None) is None


# ---- a model of floats -----------------------------------------------------------------------------------------------

_SAYS = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


class KeptModel:
    """A quantised model while all of it is dense."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, Kept] = {}
        self.says = {name: vars(model)[name] for name in _SAYS if name in vars(model)}
        config = getattr(model, "config", None)
        self.config = getattr(config, "quantization_config", None)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(kept.nbytes for kept in self.layers.values())

    def restore(self) -> None:
        """The model as it was."""
        for kept in self.layers.values():
            kept.restore()
        vars(self.model).update(self.says)
        if self.config is not None:
            cast(Any, self.model).config.quantization_config = self.config


def dense(model: nn.Module) -> KeptModel:
    """Let every quantised layer compute with a matrix of floats, and the model say that it is not quantised.

    Raises:
        LoRAUnsupportedError: a layer's weight cannot be read, or nothing is quantised; the model is as before.
    """
    kept = KeptModel(model)
    layers = dict(quantised_layers(model))
    if not layers and not only_said(model):
        raise LoRAUnsupportedError(
            f"dequantize=True is for a quantised base; no layer of this {type(model).__name__} is one.",
            name="dequantize",
            value=True,
            remedy="Leave it out.",
        )
    try:
        for path, module in layers.items():
            kept.layers[path] = Kept(module)
            _densify(module, model)
            kept.layers[path].hold()
        for name in kept.says:
            vars(model)[name] = None if name in ("hf_quantizer", "quantization_method") else False
        if kept.config is not None:
            with suppress(AttributeError):
                del model.config.quantization_config  # type: ignore[union-attr]
    except BaseException:
        kept.restore()
        raise
    return kept


def _densify(module: Any, model: nn.Module) -> None:
    backend = backend_of(module)
    assert backend is not None
    dtype = _dtype_of(model) or compute_dtype(module, model)  # a quantised layer casts its input, and a dense one not
    weight: Tensor = backend.read(module).detach().to(dtype).contiguous()
    if isinstance(module, Swapped):
        own = _dense_class(module.lora_base)
        object.__setattr__(module, "__class__", swapped_class(module.lora_mixin, own))
        vars(module.lora_slots)["base"], vars(module.lora_slots)["fresh"] = own, True
    else:
        object.__setattr__(module, "__class__", _dense_class(type(module)))
    for name in [name for name in module._parameters if name != "bias"]:
        del module._parameters[name]
    for name in [name for name in module._buffers if name != "bias"]:
        del module._buffers[name]
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    """Of what the model computes between its layers: that of its embeddings, norms and heads."""
    for path, module in modules_of(model).items():
        own = module._parameters.get("weight")
        if own is not None and own.dtype.is_floating_point and backend_of(module) is None and not is_held(path):
            return own.dtype
    return None


_DENSE: dict[type[nn.Module], type[nn.Module]] = {}


def _dense_class(base: type[nn.Module]) -> type[nn.Module]:
    """The same class, of the same layout, computing and saving as an nn.Linear."""
    if base not in _DENSE:
        names: dict[str, Any] = {"forward": nn.Linear.forward}
        for name in ("_save_to_state_dict", "_load_from_state_dict", "state_dict", "load_state_dict", "_apply"):
            names[name] = getattr(nn.Module, name)
        _DENSE[base] = type(f"Dense{base.__name__}", (base,), names)
    return _DENSE[base]
