"""KaSA's regularisation, which a training loop adds to its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoRAStateError
from .layers import LoRALinear
from .model import require

__all__ = ["kasa_loss"]

_BETA, _GAMMA = 1e-4, 1e-3  # PEFT's, of the authors' runs on GLUE


def kasa_loss(model: nn.Module) -> Tensor:
    """β ‖σ‖² + γ (‖BᵀB − I‖ + ‖AAᵀ − I‖), Frobenius, summed over the layers of every KaSA adapter that trains.

    It holds A and B near to singular vectors, and σ small. β and γ are `beta` and `gamma` of each adapter's
    `kasa_config`, 1e-4 and 1e-3 if not given.

    Returns:
        a float32 scalar, differentiable in A, B and σ.

    Raises:
        LoRAStateError: no adapter with `kasa_config` trains.

    Source: Wang et al. 2024 (arXiv:2412.06071), equations 9 to 12.
    """
    chosen = {e.slot: e.record.config.kasa_config for e in require(model).entries.values() if e.trainable}
    total: Any = None
    for module in model.modules():
        if not isinstance(module, LoRALinear):
            continue
        slots = module.lora_slots
        for index, config in chosen.items():
            slot = slots.slots.get(index)
            if config is None or slot is None or "diagonal" not in slot.extras:
                continue
            A, B, sigma = (slots.get_parameter(f"{name}{index}").float() for name in ("A", "B", "diagonal"))
            one = torch.eye(slot.rank, device=A.device)
            apart = torch.linalg.norm(B.T @ B - one) + torch.linalg.norm(A @ A.T - one)
            own = config.get("beta", _BETA) * sigma.square().sum() + config.get("gamma", _GAMMA) * apart
            total = own if total is None else total + own.to(total.device)
    if total is None:
        raise LoRAStateError(
            "No adapter with kasa_config trains on this model.",
            name="kasa_config",
            remedy="Add one: add_lora(LoRAConfig(kasa_config={})), or leave kasa_loss out.",
        )
    found: Tensor = total
    return found
