"""CorDA: the pair begins as what the weight does to the data's own directions.

    C = the covariance of the inputs (damped)        W C = U Σ Vᵀ        s · B₀ A₀ = U_r Σ_r V_rᵀ C⁻¹

"ipm" takes the largest r of Σ, to learn the data's task; "kpm" the smallest, to keep what the data stand for.

Source: Yang et al. 2024 (arXiv:2406.05223) §3.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRAStateError
from ..fields import one_of
from ..targeting import Target
from .base import Init, Layer, Settings, dense
from .inputs import bar, empty, moved, outside, positions, same_input, watching

__all__ = ["CORDA"]

_DAMPING, _ERROR = 0.01, 0.05  # of C's diagonal; of C C⁻¹, above which the damping doubles


class _Covariance:
    """Σ xᵀx of samples, each scaled by its largest entry."""

    def __init__(self) -> None:
        self.total: Any = 0
        self.samples = 0

    def add(self, x: Tensor) -> None:
        """Take in one sample, (T, in)."""
        x = x.float()
        x = x / x.max().abs()
        product = x.T @ x
        if not bool(torch.isfinite(product).all()):
            raise LoRAStateError(
                "What goes into a layer is not finite (or zero), so it has no covariance.",
                remedy="Check the data, and the model in this dtype.",
            )
        self.total, self.samples = self.total + product, self.samples + 1

    @functools.cached_property
    def damped(self) -> tuple[Tensor, Tensor]:
        """C and C⁻¹, (in, in)."""
        C = self.total / self.samples
        eye, mean, damping = torch.eye(len(C), device=C.device), C.diagonal().mean(), _DAMPING
        while True:
            fixed = C + eye * (mean * damping)
            inverse = torch.linalg.inv(fixed)
            if float(torch.dist(fixed @ inverse, eye)) < _ERROR:
                return fixed, inverse
            damping *= 2


def _corda(layer: Layer, settings: Settings) -> tuple[Tensor, Tensor]:
    layer.require_rank("corda")
    C, inverse = layer.seen.damped
    U, values, Vt = torch.linalg.svd(layer.weight().to(C) @ C, full_matrices=False)
    chosen = slice(0, layer.rank) if settings["corda_method"] == "ipm" else slice(len(values) - layer.rank, None)
    root = (values[chosen] / layer.scaling).sqrt()
    return (root[:, None] * (Vt[chosen] @ inverse)).to(layer.dtype), (U[:, chosen] * root).to(layer.dtype)


def _look(
    model: nn.Module, targets: tuple[Target, ...], data: Iterable[Any], settings: Settings
) -> tuple[tuple[Target, ...], dict[str, Any]]:
    """The covariance of what goes into every target, (in, in), one for those that share an input."""
    one_of("corda_method", settings["corda_method"], ("ipm", "kpm"))
    modules = {target.path: model.get_submodule(target.path) for target in targets}
    for target in targets:  # refuses what has no dense weight before anything runs
        dense(modules[target.path], target.path, target.info.kind, torch.float32)
    firsts: dict[str, str] = {}
    found: dict[str, _Covariance] = {}
    with outside(model), torch.no_grad():
        model.eval()
        for batch in bar(data, "CorDA"):
            given = moved(batch, model)
            if not firsts:
                firsts = same_input(model, modules, given)
                found = {path: _Covariance() for path in modules if firsts[path] == path}
            kept = positions(given)

            def see(path: str, x: Tensor, kept: Tensor | None = kept, found: dict[str, _Covariance] = found) -> None:
                whole = kept is None or x.shape[:-1] != kept.shape
                for i, sample in enumerate(x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])):
                    found[path].add(sample if whole or kept is None else sample[kept[i]])

            with watching({path: modules[path] for path in found}, see):
                model(**given)
    if not firsts:
        raise empty()
    return targets, {path: found[firsts[path]] for path in modules}


CORDA = Init(_corda, anchored=True, embeddings=False, look=_look)
