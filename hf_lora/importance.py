"""What the rank-one parts of a pair of factors matter, by criterion, and which of them stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .lowrank import cut, enough
from .spectrum import decompose
from .values import Factors

__all__ = ["CRITERIA", "Criterion", "Pairs", "largest", "shares"]

Pairs = Mapping[str, tuple[nn.Parameter, nn.Parameter, float]]  # path -> A (R, in), B (out, R), scaling


class Criterion(Protocol):
    """What the parts matter.

    Attributes:
        averages: what it has seen so far, by name: all of its state.
    """

    averages: dict[str, Tensor]

    def __init__(self, beta1: float, beta2: float) -> None: ...

    def observe(self, pairs: Pairs) -> None:
        """Look at the gradients."""
        ...

    def scores(self, pairs: Pairs, optimizer: Any) -> dict[str, Tensor]:
        """Of each part, (R,) float64 on the CPU, by path. It may change the pairs to others of the same product."""
        ...


class _Sensitivity:
    """AdaLoRA's: s = Ī · Ū of every number, I = |w ∇w|; of a part the mean over aᵢ and the mean over bᵢ.

    Ī and the uncertainty Ū = |I − Ī| are averages over steps, with β₁ and β₂. (Zhang et al. 2023, equations 8 to 12.)
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.betas = beta1, beta2
        self.averages: dict[str, Tensor] = {}

    def observe(self, pairs: Pairs) -> None:
        beta1, beta2 = self.betas
        for path, pair in pairs.items():
            for side, parameter in zip("AB", pair[:2], strict=True):
                if parameter.grad is None:
                    continue
                found = (parameter.detach() * parameter.grad).abs()
                mean = self.averages.setdefault(f"mean.{side}.{path}", torch.zeros_like(found))
                spread = self.averages.setdefault(f"spread.{side}.{path}", torch.zeros_like(found))
                mean.mul_(beta1).add_(found, alpha=1 - beta1)
                spread.mul_(beta2).add_((found - mean).abs_(), alpha=1 - beta2)

    def scores(self, pairs: Pairs, optimizer: Any) -> dict[str, Tensor]:
        found = {}
        for path, (A, _, _) in pairs.items():
            total = torch.zeros(A.shape[0], dtype=torch.float64)
            for side, dim in (("A", 1), ("B", 0)):
                if f"mean.{side}.{path}" in self.averages:
                    both = self.averages[f"mean.{side}.{path}"] * self.averages[f"spread.{side}.{path}"]
                    total += both.mean(dim, dtype=torch.float64).cpu()
            found[path] = total
        return found


class _Spectrum:
    """σ² of ΔW: the pair is turned so that its parts are the singular directions, the largest first.

    The optimizer's state of a pair that was turned begins anew.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.averages: dict[str, Tensor] = {}

    def observe(self, pairs: Pairs) -> None:
        """Needs no gradients."""

    def scores(self, pairs: Pairs, optimizer: Any) -> dict[str, Tensor]:
        found = {}
        for path, (A, B, scaling) in pairs.items():
            rank = A.shape[0]
            u, values, vt = decompose(Factors("linear", A.detach(), B.detach(), scaling * rank))
            ((a, b),) = cut([(u, values, vt)], rank, scaling)
            for parameter, turned, kept in ((A, a, A[: len(values)]), (B, b, B[:, : len(values)])):
                parameter.detach().zero_()
                kept.detach().copy_(turned)
                if optimizer is not None:
                    optimizer.state.pop(parameter, None)
            found[path] = nn.functional.pad(values.square(), (0, rank - len(values)))
        return found


CRITERIA: Mapping[str, type[Criterion]] = {"sensitivity": _Sensitivity, "spectrum": _Spectrum}


def largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The parts that matter most in the whole adapter; of equal ones the first."""
    together = torch.cat(list(scores.values()))
    kept = torch.zeros(len(together), dtype=torch.bool)
    kept[torch.argsort(together, descending=True, stable=True)[:count]] = True
    return dict(zip(scores, kept.split([len(own) for own in scores.values()]), strict=True))


def shares(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """In each layer the fewest parts that hold this share of what all matter there; none where nothing does."""
    found = {}
    for path, own in scores.items():
        order = torch.argsort(own, descending=True, stable=True)
        count = enough(own[order].sqrt(), share) if own.any() else 0
        found[path] = torch.zeros(len(own), dtype=torch.bool).index_fill_(0, order[:count], True)
    return found
