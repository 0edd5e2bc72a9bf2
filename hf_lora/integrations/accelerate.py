"""accelerate's `save_state` and `load_state`, with the adapters alone instead of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..errors import LoRAUnsupportedError
from ..loading import load_checkpoint, save_checkpoint
from ..model import state_of

__all__ = ["save_adapters_alone"]

_ALONE = "_lora_alone"


def save_adapters_alone(accelerator: Any) -> None:
    """Let `save_state` write, and `load_state` read, the adapters that train of models with a LoRA.

    Without it both work too, and the base is written with every checkpoint. The first prepared model's adapters lie in
    the folder itself in PEFT's format (several in a folder each), those of further models in `model_1`, ….
    Optimizers, schedulers, the random state, and models without a LoRA are written as ever.

    Args:
        accelerator: an `accelerate.Accelerator` of one process or DDP; call this before save_state or load_state.
            A second call changes nothing.

    Raises:
        LoRAUnsupportedError: from save_state and load_state, where FSDP, DeepSpeed or Megatron save models themselves.
    """
    if getattr(accelerator, _ALONE, False):  # a second hook would find the models taken away by the first
        return
    setattr(accelerator, _ALONE, True)

    def save(models: list[nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
        _require_all(accelerator, models, weights)
        for index in reversed(range(len(models))):
            model = _own(accelerator, models[index])
            if state_of(model) is not None:
                weights.pop(index)
                if accelerator.is_main_process:
                    save_checkpoint(model, _folder(output_dir, index))

    def load(models: list[nn.Module], input_dir: str) -> None:
        _require_all(accelerator, accelerator._models, models)
        for index in reversed(range(len(models))):
            model = _own(accelerator, models[index])
            if state_of(model) is not None:
                models.pop(index)
                load_checkpoint(model, _folder(input_dir, index))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _own(accelerator: Any, model: nn.Module) -> nn.Module:
    found: nn.Module = accelerator.unwrap_model(model, keep_torch_compile=False)
    return found


def _folder(directory: str, index: int) -> Path:
    return Path(directory) / f"model_{index}" if index else Path(directory)


def _require_all(accelerator: Any, models: list[Any], handed: list[Any]) -> None:
    """Raise unless accelerate leaves the models to its hooks."""
    if len(handed) != len(models):
        raise LoRAUnsupportedError(
            f"save_adapters_alone() does not reach models under {accelerator.distributed_type.value}.",
            name="distributed_type",
            value=accelerator.distributed_type.value,
            remedy="Use one process or DDP, or leave save_adapters_alone() out.",
        )
