"""The stock Trainer, for a model with our LoRA: resume, load the best, survive a kill, begin again.

`Trainer._save` calls `model.save_pretrained`, which writes the adapters alone. What stock Trainer cannot do is read
them back: `_load_from_checkpoint` finds no index, `_load_best_model` no pytorch_model.bin. It also resumes from the
newest folder, half-written or not, writes over old checkpoints file by file, and begins again with half-trained weights
where `auto_find_batch_size` runs out of memory. For a model without our LoRA every method is called through, and so it
is under FSDP and DeepSpeed, which have checkpoints of their own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import LoRAFileError, LoRAStateError
from ..loading import load_checkpoint
from ..model import require, state_of
from .importing import when_imported
from .patching import Registry
from .resuming import Start, newest_whole, recover, require_whole, writing

__all__ = ["install"]

logger = logging.getLogger(__name__)

Method = Callable[..., Any]
_START, _WHOLE = "_lora_start", "_lora_whole"  # on a Trainer, while it trains


def install(registry: Registry) -> None:
    """Wrap the methods once `transformers.trainer` is imported; it is not imported here."""
    when_imported("transformers.trainer", lambda module: _wrap(registry, module))


def _wrap(registry: Registry, module: ModuleType) -> None:
    for name, wrapper in _WRAPPERS.items():
        stock = getattr(module.Trainer, name, None)
        if stock is None:
            import transformers

            logger.warning(
                "transformers %s has no Trainer.%s. Without it: %s", transformers.__version__, name, wrapper.__doc__
            )
        else:
            registry.set(module.Trainer, name, functools.wraps(stock)(wrapper(stock)))


def _base(trainer: Any, model: Any) -> Any:
    """The model inside what Trainer holds, if it has our LoRA and Trainer loads it itself (no FSDP, no DeepSpeed)."""
    if model is None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    model = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    return model if state_of(model) is not None else None


def _needs(trainer: Any) -> dict[str, bool]:
    """What a checkpoint of this run has to hold."""
    return {"weights_only": bool(trainer.args.save_only_model)}


def _train(stock: Method) -> Method:
    """resume_from_checkpoint=True does not skip a half-written checkpoint of a LoRA."""
    signature = inspect.signature(stock)

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        own = _base(self, self.model)
        if own is None:
            return stock(self, *args, **kwargs)
        if not any(parameter.requires_grad for parameter in own.parameters()):
            names = tuple(require(own).entries)
            raise LoRAStateError(
                f"Nothing on this {type(own).__name__} trains: its adapters {', '.join(map(repr, names))} are frozen.",
                value=names,
                remedy=f"Call train_lora({names[0]!r}) before making the Trainer, or load_lora(…, trainable=True).",
            )
        if given.arguments.get("resume_from_checkpoint") is True:
            run = Path(self.args.output_dir)
            if self.args.should_save:
                recover(own, run, **_needs(self))
            self.accelerator.wait_for_everyone()
            found = _newest(own, run, _needs(self))
            given.arguments["resume_from_checkpoint"] = True if found is None else str(found)
            self.__dict__[_WHOLE] = str(found)
        try:
            return stock(*given.args, **given.kwargs)
        finally:
            self.__dict__.pop(_START, None)
            self.__dict__.pop(_WHOLE, None)

    return train


def _newest(model: Any, run: Path, needs: dict[str, bool]) -> Path | None:
    """The newest complete checkpoint; None if there is none at all, which stock Trainer says."""
    whole, damaged = newest_whole(model, run, **needs)
    lines = [f"{path}: {'; '.join(wrong)}" for path, wrong in damaged.items()]
    if whole is not None:
        for line in lines:
            logger.warning("Resuming from %s: a newer checkpoint is not complete. %s", whole, line)
    elif lines:
        raise LoRAFileError(
            f"No checkpoint in {run} is complete, so training cannot go on from one.",
            name=str(run),
            value=str(run),
            facts=lines,
            remedy="Train without resume_from_checkpoint.",
        )
    return whole


def _load_from_checkpoint(stock: Method) -> Method:
    """Training with a LoRA cannot be resumed."""

    def load(self: Any, resume_from_checkpoint: str, model: Any = None) -> Any:
        own = _base(self, self.model if model is None else model)
        if own is None:
            return stock(self, resume_from_checkpoint, model)
        if self.__dict__.get(_WHOLE) != resume_from_checkpoint:  # `train` has looked at what it chose itself
            require_whole(own, Path(resume_from_checkpoint), **_needs(self))
        if self.args.save_only_model:
            logger.warning(
                "save_only_model: what %s lacks of optimizer and generators begins anew.", resume_from_checkpoint
            )
        return load_checkpoint(own, resume_from_checkpoint)

    return load


def _load_best_model(stock: Method) -> Method:
    """load_best_model_at_end does not load a LoRA."""

    def load(self: Any) -> Any:
        own = _base(self, self.model)
        return stock(self) if own is None else load_checkpoint(own, self.state.best_model_checkpoint)

    return load


def _save_checkpoint(stock: Method) -> Method:
    """A run that is killed while it writes over an older checkpoint leaves a mixture of both."""

    def save(self: Any, model: Any, trial: Any) -> Any:
        own = _base(self, self.model)
        if own is None:
            return stock(self, model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with writing(own, folder, **_needs(self)) if self.args.should_save else contextlib.nullcontext():
            self.accelerator.wait_for_everyone()  # nobody writes into a folder that is being put aside
            return stock(self, model, trial)

    return save


def _inner_training_loop(stock: Method) -> Method:
    """After running out of memory, auto_find_batch_size begins again with half-trained adapters."""

    def loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = _base(self, self.model)
        if own is not None and self.args.auto_find_batch_size:
            if _START in self.__dict__:
                self.__dict__[_START].restore(self, own)
            else:
                self.__dict__[_START] = Start.of(self, own)
        return stock(self, *args, **kwargs)

    return loop


_WRAPPERS: dict[str, Callable[[Method], Method]] = {
    "train": _train,
    "_load_from_checkpoint": _load_from_checkpoint,
    "_load_best_model": _load_best_model,
    "_save_checkpoint": _save_checkpoint,
    "_inner_training_loop": _inner_training_loop,
}
"""Each wrapper's docstring is what is lost where transformers no longer has the method."""
