"""A base layer's weight: where it computes, in which dtype, and whether it can be written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import LoRAUnsupportedError
from .sharding import whole

__all__ = ["compute_dtype", "dense_weight", "device_of", "is_dense", "is_here", "materialised", "mergeable"]


def device_of(module: nn.Module) -> torch.device:
    """Where the layer computes; for a weight offloaded by accelerate, the device it is brought to."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return next((t.device for t in tensors if t is not None), torch.device("cpu"))


def materialised(module: nn.Module, name: str) -> Tensor:
    """A tensor of the module's own, also where accelerate has offloaded it; on the CPU, or meta on a meta model."""
    tensor: Tensor = getattr(module, name)
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        offloaded = getattr(part, "weights_map", None)
        if tensor.is_meta and offloaded is not None:
            found: Tensor = offloaded[name]
            return found.detach().to("cpu", copy=True)
    tensor = whole(tensor).detach()
    return tensor if tensor.is_meta else tensor.to("cpu", copy=True)


def compute_dtype(module: nn.Module, model: nn.Module) -> torch.dtype:
    """The floating dtype in which the layer computes: its weight's, or the model's where the weight is quantised."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return weight.dtype
    for source in (getattr(module, "compute_dtype", None), getattr(getattr(model, "config", None), "dtype", None)):
        if isinstance(source, torch.dtype) and source.is_floating_point:
            return source
    return torch.get_default_dtype()


def is_dense(module: nn.Module) -> bool:
    """Whether the layer's weight is a matrix of floats, and no quantised one; in memory or not, split or not."""
    weight = getattr(module, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "full_tensor")
    return isinstance(weight, Tensor) and plain and weight.dtype.is_floating_point and weight.dtype.itemsize >= 2


def is_here(module: nn.Module) -> bool:
    """Whether the layer's weight is in memory whole: not offloaded, not split over processes."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_meta and whole(weight) is weight


def dense_weight(module: nn.Module) -> Tensor:
    """The layer's weight where it is; a copy of one that is offloaded, or split over processes."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return materialised(module, "weight") if weight.is_meta else whole(weight).detach()


def mergeable(module: nn.Module, path: str, name: str = "weight") -> Tensor:
    """The layer's dense weight, or a parameter of another name.

    Raises `LoRAUnsupportedError` where it is quantised or not in memory.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        found = type(weight).__name__ if not isinstance(weight, Tensor) else str(weight.dtype)
        raise LoRAUnsupportedError(
            f"{path}: cannot merge into a {type(module).__name__} whose weight is {found}.",
            name=path,
            value=found,
            expected="a dense float weight",
            remedy="Load the base model without quantisation, then merge.",
        )
    if weight.is_meta:
        raise LoRAUnsupportedError(
            f"{path}: its weight is offloaded (on the meta device), so nothing can be merged into it here.",
            name=path,
            remedy="Load the base model whole (device_map=None), then merge.",
        )
    return weight
