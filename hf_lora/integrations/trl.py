"""TRL's trainers, given a model with our LoRA: the reference of DPO and KTO, the dropout, a head that TRL would bypass.

TRL knows PEFT's models by their class. For any other model its DPO and KTO load a second copy of the base as reference,
its `disable_dropout` leaves a LoRA's dropout on, and its fused output head multiplies by `lm_head.weight` itself, so
that an adapter there would neither be applied nor trained. A `peft_config` as well would freeze ours. Each function is
called through for a model without our LoRA.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import LoRAUnsupportedError
from ..layers import LoRALinear, Swapped
from ..model import state_of
from ..reference import ReferenceModel
from .importing import when_imported
from .patching import Registry

__all__ = ["install"]

_SHARDED = ("prepare_deepspeed", "prepare_fsdp")
_PEFT = "get_peft_model"
# Module -> the functions that it has imported from trl.trainer.utils, trl.models or peft, and that are wrapped there.
_WRAPPED = {
    "trl.trainer.sft_trainer": (_PEFT, "add_fused_lm_head"),
    "trl.trainer.dpo_trainer": (_PEFT, "add_fused_lm_head", "disable_dropout_in_model", *_SHARDED),
    "trl.trainer.kto_trainer": (_PEFT, "add_fused_lm_head", "disable_dropout_in_model", *_SHARDED),
    "trl.trainer.grpo_trainer": (_PEFT, "add_fused_lm_head", "disable_dropout_in_model", *_SHARDED),
    "trl.trainer.rloo_trainer": (_PEFT, "add_fused_lm_head", "disable_dropout_in_model", *_SHARDED),
    "trl.trainer.reward_trainer": (_PEFT, "disable_dropout_in_model"),
}

# Module -> the trainer that takes a reference model.
_REFERENCED = {"trl.trainer.dpo_trainer": "DPOTrainer", "trl.trainer.kto_trainer": "KTOTrainer"}


def install(registry: Registry) -> None:
    """Wrap them in each trainer's module once it is imported; none is imported here."""
    for name in _WRAPPED:
        when_imported(name, lambda module: _wrap(registry, module))


def _wrap(registry: Registry, module: ModuleType) -> None:
    for name in _WRAPPED[module.__name__]:
        before, original = _BEFORE[name], getattr(module, name, None)
        if original is None:  # no peft, or another TRL; a contract test says what the tested one has
            continue

        @functools.wraps(original)
        def function(model: Any, *args: Any, _before: Any = before, _original: Any = original, **kwargs: Any) -> Any:
            _before(model)
            return _original(model, *args, **kwargs)

        registry.set(module, name, function)
    if module.__name__ in _REFERENCED:
        _give_reference(registry, getattr(module, _REFERENCED[module.__name__]))


def _give_reference(registry: Registry, trainer: Any) -> None:
    """DPO or KTO without a `ref_model`: the reference is the same base, without its adapters."""
    original = trainer.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        model, options = given.get("model"), given.get("args")
        ours = isinstance(model, nn.Module) and state_of(model) is not None and given.get("peft_config") is None
        if ours and getattr(options, "sync_ref_model", False):
            raise LoRAUnsupportedError(
                "sync_ref_model=True moves a reference model's own weights towards the trained ones; with a LoRA the "
                "reference is the same base.",
                name="sync_ref_model",
                value=True,
                remedy="Leave sync_ref_model out.",
            )
        if ours and given.get("ref_model") is None:
            assert isinstance(model, nn.Module)
            given["ref_model"] = ReferenceModel(model)
            given.pop("self")
            original(self, **given)
        else:
            original(self, *args, **kwargs)

    registry.set(trainer, "__init__", __init__)


def _refuse_head(model: Any) -> None:
    """Raise if an adapter is on the output head, of which TRL reads the base's weight."""
    if isinstance(model, ReferenceModel) or state_of(model) is None:
        return
    path = next((p for p, m in model.named_modules() if m is model.get_output_embeddings()), "lm_head")
    if isinstance(model.get_output_embeddings(), Swapped):
        raise LoRAUnsupportedError(
            f"{path}: TRL multiplies by its weight directly, so an adapter there would not be applied or trained.",
            name=path,
            remedy="Leave it out of target_modules and modules_to_save (and bias='all' where it has a bias), "
            "or use the stock Trainer.",
        )


def _refuse_peft(model: Any) -> None:
    """Raise for `peft_config` on a model with an adapter of ours that trains: PEFT would freeze it."""
    state = state_of(model)
    training = [] if state is None else [entry.name for entry in state.entries.values() if entry.trainable]
    if training:
        raise LoRAUnsupportedError(
            f"peft_config was given with a model whose adapter {training[0]!r} trains: PEFT's would train instead.",
            name="peft_config",
            value=tuple(training),
            remedy="Leave peft_config out; or freeze what is there, with train_lora([]).",
        )


def _without_dropout(model: Any) -> None:
    """Turn the adapters' dropout off too: it is no module of its own."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            for slot in module.lora_slots.slots.values():
                slot.dropout = 0.0


def _refuse_sharded(model: Any) -> None:
    """Raise for a reference that shares the policy's weights: it would be split over processes twice."""
    if isinstance(model, ReferenceModel):
        raise LoRAUnsupportedError(
            "TRL splits the reference model over processes (FSDP, DeepSpeed), and this one is the policy's own base.",
            name="ref_model",
            remedy="Train with DDP, or give a ref_model of its own.",
        )


_BEFORE = {
    _PEFT: _refuse_peft,
    "add_fused_lm_head": _refuse_head,
    "disable_dropout_in_model": _without_dropout,
    **dict.fromkeys(_SHARDED, _refuse_sharded),
}
