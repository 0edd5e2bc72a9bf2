"""A base made ready for training adapters on it, in half precision or quantised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoRAUnsupportedError
from .layerinfo import is_held, modules_of

__all__ = ["prepare", "unprepare"]

_FROZEN = "_lora_frozen"  # the Parameters that it froze
_PREPARED = "_lora_prepared"  # norm's path -> the dtype it had
_NORM = re.compile(r"Norm(\d+d)?(V\d+)?$")


def prepare(
    model: nn.Module,
    *,
    norms: bool = True,
    gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Make a base ready for training (k-bit training, QLoRA): freeze it, norms in float32, gradient checkpointing.

    Call it before `add_lora`. It may be called again. `remove_lora()` of the last adapter undoes it, but that
    checkpointing stays until `gradient_checkpointing_disable()`.

    Args:
        norms: normalisation layers in half precision hold their weights, and compute, in float32, and give their output
            in their input's dtype: what passes between layers stays as it is.
        gradient_checkpointing: compute activations again in the backward.
        gradient_checkpointing_kwargs: for transformers; None is {"use_reentrant": False}. With a reentrant one the
            embeddings' output is made to require gradients, without which it would lose them.

    Raises:
        LoRAUnsupportedError: the model has no gradient checkpointing.

    Source: Dettmers et al. 2023 (arXiv:2305.14314), section 3.
    """
    with_checkpoints: Any = model
    if gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise LoRAUnsupportedError(
            f"{type(model).__name__} has no gradient checkpointing.",
            name="gradient_checkpointing",
            value=True,
            remedy="Pass gradient_checkpointing=False.",
        )
    frozen: list[nn.Parameter] = vars(model).setdefault(_FROZEN, [])
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and not is_held(path):
            frozen.append(parameter)
            parameter.requires_grad_(False)
    if norms:
        _widen(model)
    if gradient_checkpointing:
        settings = dict(gradient_checkpointing_kwargs or {"use_reentrant": False})
        if settings.get("use_reentrant", True):
            with_checkpoints.enable_input_require_grads()
        with_checkpoints.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def unprepare(model: nn.Module) -> None:
    """Undo `prepare`: what it froze may train again, and norms have their dtype back, every bit: none was rounded."""
    for parameter in vars(model).pop(_FROZEN, []):
        parameter.requires_grad_(True)
    before: dict[str, torch.dtype] = vars(model).pop(_PREPARED, {})
    for path, dtype in before.items():
        module = model.get_submodule(path)
        _cast(module, dtype)
        for key in [key for key, hook in module._forward_hooks.items() if hook is _as_given]:
            del module._forward_hooks[key]


def _widen(model: nn.Module) -> None:
    before: dict[str, torch.dtype] = vars(model).setdefault(_PREPARED, {})
    for path, module in modules_of(model).items():
        weight = module._parameters.get("weight")
        if path in before or weight is None or weight.dim() != 1 or not _is_norm(module):
            continue
        if weight.dtype in (torch.float16, torch.bfloat16):
            before[path] = weight.dtype
            _cast(module, torch.float32)
            module.register_forward_hook(_as_given)


def _is_norm(module: nn.Module) -> bool:
    return any(_NORM.search(cls.__name__) for cls in type(module).__mro__)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for tensor in [t for t in module._parameters.values() if t is not None]:
        if tensor.dtype.is_floating_point:
            tensor.data = tensor.data.to(dtype)


def _as_given(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """What a widened norm gives, in its input's dtype."""
    given = args[0] if args else None
    if isinstance(output, Tensor) and isinstance(given, Tensor) and given.dtype.is_floating_point:
        return output.to(given.dtype)
    return output
