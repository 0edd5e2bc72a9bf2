"""The stock Trainer: resume and load-best for a model with our LoRA.

`Trainer._save` calls `model.save_pretrained`, which writes the adapters alone. What stock Trainer cannot do is read
them back: `_load_from_checkpoint` finds no index, `_load_best_model` no pytorch_model.bin. Both are private; for a
model without our LoRA they are called through.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from ..loading import load_checkpoint
from ..model import state_of
from .importing import when_imported
from .patching import Registry

__all__ = ["install"]


def install(registry: Registry) -> None:
    """Wrap the two methods once `transformers.trainer` is imported; it is not imported here."""
    when_imported("transformers.trainer", lambda module: _wrap(registry, module))


def _wrap(registry: Registry, module: ModuleType) -> None:
    trainer: Any = module.Trainer
    resume, best = trainer._load_from_checkpoint, trainer._load_best_model

    @functools.wraps(resume)
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> Any:
        own = _base(self, self.model if model is None else model)
        if own is None:
            return resume(self, resume_from_checkpoint, model)
        return load_checkpoint(own, resume_from_checkpoint)

    @functools.wraps(best)
    def _load_best_model(self: Any) -> Any:
        own = _base(self, self.model)
        if own is None:
            return best(self)
        return load_checkpoint(own, self.state.best_model_checkpoint)

    registry.set(trainer, "_load_from_checkpoint", _load_from_checkpoint)
    registry.set(trainer, "_load_best_model", _load_best_model)


def _base(trainer: Any, model: Any) -> Any:
    """The model inside what Trainer holds, if it has our LoRA and Trainer loads it itself (no FSDP, no DeepSpeed)."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    model = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    return model if state_of(model) is not None else None
