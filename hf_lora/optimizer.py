"""What an optimizer is given of a model with a LoRA: parameters grouped by what they are, never by their names."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .errors import LoRAConfigError, LoRAStateError
from .expertlayers import banks_of
from .layers import LoRAHead
from .model import require

__all__ = ["optimizer_groups"]

# kind -> whether weight decay applies
_KINDS = {"A": True, "B": True, "embedding": True, "whole": True, "vector": False}


def optimizer_groups(
    model: nn.Module,
    lr: float,
    *,
    b_lr_ratio: float = 1.0,
    weight_decay: float = 0.0,
    embedding_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: every parameter that requires gradients, with LoRA+'s two rates.

        lr(A) = lr,   lr(B) = b_lr_ratio · lr

    A group has the optimizer's own keys `params`, `lr`, `weight_decay`, and `name`:

    | name | what | lr | weight decay |
    |---|---|---|---|
    | A | A, (r, in) | lr | yes |
    | B | B, (out, r) | b_lr_ratio · lr | yes |
    | embedding | both factors of embeddings, if `embedding_lr` is given | embedding_lr | yes |
    | whole | matrices that train whole (a head) | lr | yes |
    | vector | biases and norm weights | b_lr_ratio · lr | no |

    Args:
        lr: learning rate, above 0.
        b_lr_ratio: above 0; LoRA+ takes more than 1 (about 16 in its experiments), 1 is plain LoRA.
        weight_decay: the optimizer's weight decay, 0 or more.
        embedding_lr: learning rate of both factors of adapted embeddings; None treats them as other factors.

    Returns:
        the groups that are not empty, in the order of the table; each parameter is in one.

    Raises:
        LoRAConfigError: a rate, ratio or decay is out of range. LoRAStateError: no adapter trains.

    Source: Hayou, Ghosh & Yu 2024, "LoRA+" (arXiv:2402.12354); vectors get B's rate, as in its authors' code.
    """
    _require_positive("lr", lr)
    _require_positive("b_lr_ratio", b_lr_ratio)
    if embedding_lr is not None:
        _require_positive("embedding_lr", embedding_lr)
    if not _number(weight_decay) or not 0 <= weight_decay < math.inf:
        raise LoRAConfigError(
            f"weight_decay={weight_decay!r} is not a number of 0 or more.",
            name="weight_decay",
            value=weight_decay,
            expected="a finite number, 0 or more",
        )
    kinds, held = _kinds(model, embedding_lr is not None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # each once, though tied
    if not any(id(parameter) in held for parameter in trained):
        raise LoRAStateError(
            f"No adapter on this {type(model).__name__} trains, so there is nothing to optimise.",
            value=tuple(require(model).entries),
            remedy="Call train_lora('…') first, or add one that trains with add_lora().",
        )
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in _KINDS}
    for parameter in trained:
        members[kinds.get(id(parameter), "vector" if parameter.ndim < 2 else "whole")].append(parameter)
    rates = {"B": lr * b_lr_ratio, "vector": lr * b_lr_ratio, "embedding": embedding_lr}
    return [
        {
            "params": found,
            "lr": rates.get(kind, lr),
            "weight_decay": weight_decay if _KINDS[kind] else 0.0,
            "name": kind,
        }
        for kind, found in members.items()
        if found
    ]


def _kinds(model: nn.Module, embeddings_apart: bool) -> tuple[dict[int, str], set[int]]:
    """The kind of each factor by its id, and the ids of all that adapters hold."""
    require(model)
    kinds: dict[int, str] = {}
    held: set[int] = set()
    for module in model.modules():
        for slots in banks_of(module):
            apart = embeddings_apart and slots.kind == "embedding"
            for index, slot in slots.slots.items():
                if slot.trainable and slot.rank and index not in slots.leaders:
                    for side in ("A", "B"):
                        kinds[id(slots.get_parameter(f"{side}{index}"))] = "embedding" if apart else side
            held.update(id(parameter) for parameter in slots.parameters())
        if isinstance(module, LoRAHead):
            held.update(id(parameter) for parameter in module.lora_heads.parameters())
    return kinds, held


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require_positive(name: str, value: Any) -> None:
    if not _number(value) or not 0 < value < math.inf:
        raise LoRAConfigError(
            f"{name}={value!r} is not a positive number.", name=name, value=value, expected="a finite number above 0"
        )
