"""Task vectors made sparse before they are added: trimming, TIES and DARE, on dense tensors of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["drop", "elect", "merge_elected", "trim"]


def trim(delta: Tensor, density: float) -> Tensor:
    """`delta` with all but its largest entries zero: those at least as large as the ⌊density·n⌋-th (at least one).

    Args:
        delta: any shape, n entries. Entries as large as the last one kept are kept, too.
        density: the share that stays, in (0, 1].

    Source: Yadav et al. 2023 (arXiv:2306.01708) §4, step 1.
    """
    size = delta.abs().flatten()
    keep = max(1, int(density * size.numel()))
    least = size.kthvalue(size.numel() - keep + 1).values
    return torch.where(delta.abs() >= least, delta, 0)


def drop(delta: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """`delta` with each entry zero with probability 1 − density, the others divided by density: the same on average.

    The mask is drawn where the generator lives (the CPU without one), so that it is the same on every device.

    Source: Yu et al. 2023 (arXiv:2311.03099) §3.2.
    """
    device = "cpu" if generator is None else generator.device
    kept = torch.rand(delta.shape, generator=generator, device=device) < density
    return torch.where(kept.to(delta.device), delta / density, 0)


def elect(deltas: Sequence[Tensor], method: Literal["total", "frequency"]) -> Tensor:
    """The sign of each entry: −1, 1, or 0 where the votes are even.

    "total": sgn Σ δ, the paper's, by mass; "frequency": sgn Σ sgn δ, one adapter one vote.

    Source: Yadav et al. 2023 §4, step 2.
    """
    votes = [delta.sign() for delta in deltas] if method == "frequency" else list(deltas)
    return torch.stack(votes).sum(dim=0).sign()


def merge_elected(deltas: Sequence[Tensor], sign: Tensor) -> Tensor:
    """The mean of those entries that have the elected sign; 0 where none has, or none was elected.

    Source: Yadav et al. 2023 §4, step 3 (disjoint merge).
    """
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta in deltas:
        agrees = (delta.sign() == sign) & (sign != 0)
        total += torch.where(agrees, delta, 0)
        count += agrees
    return total / count.clamp_min(1)
