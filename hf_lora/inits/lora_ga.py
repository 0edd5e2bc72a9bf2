"""LoRA-GA: the first step of the pair points where the first step of full fine-tuning does.

    G = U Σ Vᵀ, the gradient of the loss in W        A₀: r of the first 2r rows of Vᵀ, B₀: r others of U Σ, scaled

Source: Wang, Yu & Li 2024 (arXiv:2407.05000) §3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRAConfigError, LoRAUnsupportedError
from ..fields import one_of, positive
from ..targeting import Target
from .base import Init, Layer, Settings, dense
from .inputs import bar, empty, moved, outside, require_seen

__all__ = ["LORA_GA"]

_DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
_SCALES = ("stable", "weight_svd", "gd_scale", "unit")
_ITERATIONS = 4


def _lora_ga(layer: Layer, settings: Settings) -> tuple[Tensor, Tensor]:
    r = layer.rank
    layer.require_rank("lora_ga", min(layer.in_features, layer.out_features) // 2)
    G: Tensor = layer.seen[layer.rows.to(layer.seen.device)].to(layer.dtype)
    U, values, V = torch.svd_lowrank(G, q=min(4 * r, *G.shape), niter=_ITERATIONS)
    of_A, of_B = {
        "ArBr": lambda: (torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)),
        "A2rBr": lambda: (torch.arange(r, 2 * r), torch.arange(r)),
        "ArB2r": lambda: (torch.arange(r), torch.arange(r, 2 * r)),
        "random": lambda: 2 * (torch.randperm(2 * r)[:r],),
    }[settings["direction"]]()
    A, B = V.T[of_A], U[:, of_B] * values[of_B]
    if settings["scale"] == "stable":
        B = B * (layer.out_features**0.25 / settings["stable_gamma"] ** 0.5)
    elif settings["scale"] == "weight_svd" and values[of_B][0] > 0:
        _, largest, _ = torch.svd_lowrank(layer.weight(), q=r, niter=_ITERATIONS)
        B = B * (largest[0] / values[of_B][0])
    elif settings["scale"] == "gd_scale":
        A, B = A / layer.scaling, B / layer.scaling
    return A, B


def _look(
    model: nn.Module, targets: tuple[Target, ...], data: Iterable[Any], settings: Settings
) -> tuple[tuple[Target, ...], dict[str, Any]]:
    """The mean gradient of every target's weight over the batches, (out, in), in training mode as a step would be."""
    one_of("direction", settings["direction"], _DIRECTIONS)
    one_of("scale", settings["scale"], _SCALES)
    positive("stable_gamma", settings["stable_gamma"])
    modules = {target.path: model.get_submodule(target.path) for target in targets}
    for target in targets:  # refuses what has no dense weight before anything runs
        dense(modules[target.path], target.path, target.info.kind, torch.float32)
    weights: dict[str, nn.Parameter] = {path: module.weight for path, module in modules.items()}  # type: ignore[misc]
    sums: dict[str, Tensor] = {}
    batches = 0
    held = {path: weight.grad for path, weight in weights.items()}
    with outside(model), torch.enable_grad():
        model.train()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for path, weight in weights.items():
            if weight.is_meta:
                raise _offloaded(path)
            weight.requires_grad_(True)
            weight.grad = None
        try:
            for batch in bar(data, "LoRA-GA"):
                _loss(model(**moved(batch, model))).backward()
                batches += 1
                for path, weight in weights.items():
                    if weight.grad is not None:
                        sums[path] = sums.get(path, 0) + weight.grad.float()
                        weight.grad = None
        finally:
            for path, weight in weights.items():
                weight.grad = held[path]
    if not batches:
        raise empty()
    require_seen(modules, sums)
    turned = {target.path for target in targets if target.info.kind == "conv1d"}
    return targets, {path: (g.T if path in turned else g) / batches for path, g in sums.items()}


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise LoRAConfigError(
            "The model gave no loss, so there is no gradient to begin from.",
            name="data",
            remedy='Give batches with "labels".',
        )
    return loss


def _offloaded(path: str) -> LoRAUnsupportedError:
    return LoRAUnsupportedError(
        f"{path}: its weight is offloaded, so it gets no gradient here.",
        name=path,
        remedy="Load the base model whole (device_map=None).",
    )


LORA_GA = Init(_lora_ga, anchored=True, embeddings=False, look=_look)
