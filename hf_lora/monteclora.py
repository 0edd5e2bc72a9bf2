"""MonteCLoRA's regularisation, which a training loop adds to its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoRAStateError
from .layers import LoRALinear
from .model import require
from .variants.monteclora import expert_weights, variances

__all__ = ["monteclora_loss"]


def monteclora_loss(model: nn.Module) -> Tensor:
    """The mean over layers of weight · (KL of π + KL of σ + KL of the draw) + Σ wₖ², for what trains with MonteCLoRA.

        KL of π      lnΓ(Σα)/Γ(Σβ) + Σ lnΓ(αₖ)/Γ(βₖ) + Σ (αₖ − βₖ) (ψ(αₖ) − ψ(Σα))    α = e^π, β: dirichlet_prior
        KL of σ      R/2 · (Σ e^{2σ} − 2 Σ σ − R)
        KL of draw   n/2 · (Σ v − Σ ln v − R)                                          v: the variances drawn last

    as PEFT computes it. `weight` is `kl_loss_weight`; Σ wₖ², of the weights drawn last, is added with `use_entropy`.

    Returns:
        a float32 scalar (float64 of such adapters), differentiable in σ and π; 0 in eval mode.

    Raises:
        LoRAStateError: no adapter with `monteclora_config` trains, or nothing was drawn yet: call it after the forward.

    Source: Sengupta et al. 2024 (arXiv:2411.04358); peft 0.21.2, `_get_monteclora_loss`.
    """
    chosen = {e.slot: e.record.config.monteclora_config for e in require(model).entries.values() if e.trainable}
    found: list[Tensor] = []
    drawn: list[Tensor] = []
    for module in model.modules():
        if not isinstance(module, LoRALinear):
            continue
        slots = module.lora_slots
        for index, settings in chosen.items():
            if settings is None or index not in slots.slots or "deviation" not in slots.slots[index].extras:
                continue
            noise = slots.get_buffer(f"noise{index}").clone()  # a recompute writes into it
            deviation, experts = (slots.get_parameter(f"{name}{index}") for name in ("deviation", "experts"))
            drawn.append(noise[0])
            found.append(_of_layer(deviation, experts, noise, settings) if slots.training else noise.new_zeros(()))
    if not found:
        raise LoRAStateError(
            "No adapter with monteclora_config trains on this model.",
            name="monteclora_config",
            remedy="Add one: add_lora(LoRAConfig(monteclora_config={})), or leave monteclora_loss out.",
        )
    device = found[0].device
    if model.training and not bool(torch.stack([own.to(device) for own in drawn]).any()):
        raise LoRAStateError(
            "monteclora_loss is of what a forward in training mode drew, and there was none yet.",
            name="monteclora_config",
            remedy="Call it after the model's forward.",
        )
    return torch.stack([own.to(device) for own in found]).mean()


def _of_layer(deviation: Tensor, experts: Tensor, noise: Tensor, settings: Mapping[str, Any]) -> Tensor:
    rank, n = len(deviation), len(experts)
    chi, own = noise.split([rank, n])
    alpha = torch.exp(experts)
    prior = torch.full_like(alpha, settings["dirichlet_prior"])
    of_experts = (
        torch.lgamma(alpha.sum())
        - torch.lgamma(prior.sum())
        + (torch.lgamma(alpha) - torch.lgamma(prior)).sum()
        + ((alpha - prior) * (torch.digamma(alpha) - torch.digamma(alpha.sum()))).sum()
    )
    of_deviation = 0.5 * rank * (torch.exp(2 * deviation).sum() - 2 * deviation.sum() - rank)
    drawn = variances(deviation, chi)
    of_draw = 0.5 * n * (drawn.sum() - torch.log(drawn).sum() - rank)
    total = settings["kl_loss_weight"] * (of_experts + of_deviation + of_draw)
    return total + expert_weights(experts, own).square().sum() if settings["use_entropy"] else total
