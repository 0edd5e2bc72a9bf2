"""A base layer's weight: where it computes, in which dtype, and whether it can be written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import LoRAUnsupportedError
from .sharding import whole

__all__ = [
    "as_matrix",
    "compute_dtype",
    "dense_weight",
    "device_of",
    "is_dense",
    "is_here",
    "materialised",
    "mergeable",
    "weight_name",
]


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
    weight = getattr(module, weight_name(module), None)
    if isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return weight.dtype
    for source in (getattr(module, "compute_dtype", None), getattr(getattr(model, "config", None), "dtype", None)):
        if isinstance(source, torch.dtype) and source.is_floating_point:
            return source
    return torch.get_default_dtype()


def is_dense(module: nn.Module) -> bool:
    """Whether the layer's weight is a matrix of floats, and no quantised one; in memory or not, split or not."""
    weight = getattr(module, weight_name(module), None)
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


def weight_name(module: nn.Module) -> str:
    """What the layer calls the weight that a LoRA changes."""
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as (out, in), or as it lies; a convolution's is (out, in·∏k), a copy where it is channels_last."""
    return weight.flatten(1) if weight.dim() > 2 else weight


def mergeable(module: nn.Module, path: str, name: str = "") -> Tensor:
    """The layer's dense weight, or a parameter of another name.

    Raises:
        LoRAUnsupportedError: it is quantised, not in memory, computed from others, or of a convolution with groups.
    """
    weight = getattr(module, name or weight_name(module), None)
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        raise LoRAUnsupportedError(
            f"{path}: cannot merge into a {type(module).__name__} with groups={module.groups}: a LoRA's A reads all "
            "input channels, so that W + ΔW is no grouped weight.",
            name=path,
            value=module.groups,
            expected=1,
            remedy="Run it unmerged: set_lora(), use_lora() or route_lora().",
        )
    if isinstance(module, nn.modules.conv._ConvNd) and "weight" not in module._parameters:
        raise LoRAUnsupportedError(
            f"{path}: cannot merge into a {type(module).__name__} whose weight is computed from others (weight_norm).",
            name=path,
            remedy="Take the parametrization off first (torch.nn.utils.parametrize.remove_parametrizations).",
        )
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
