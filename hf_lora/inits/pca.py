"""Principal components of more inputs than memory holds: a batch at a time, keeping only the first few."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["IncrementalPCA"]

_SEED = 42  # of the fast decomposition's random start
_ITERATIONS = 4


class IncrementalPCA:
    """The first components of all rows so far, up to what was cut off on the way.

    The rows so far are Σ Vᵀ and a mean. With a batch X of n rows and mean m they become the decomposition of

        [Σ Vᵀ; X − m; √(N n / (N + n)) (mean − m)]

    Args:
        components: how many to keep.
        tau: a component has settled when a batch turns it by less than this cosine.

    Source: Ross, Lim, Lin & Yang 2008, "Incremental learning for robust visual tracking", §2.
    """

    components: Tensor  # (k, in)
    values: Tensor  # (k,), singular values
    mean: Tensor  # (in,)

    def __init__(self, components: int, tau: float) -> None:
        self.components_wanted, self.tau = components, tau
        self.count, self.scatter = 0, 0.0
        self._settled = torch.zeros(components, dtype=torch.bool)

    @property
    def shares(self) -> Tensor:
        """The share of the variance that each component explains, (k,)."""
        return self.values.double() ** 2 / max(self.scatter, torch.finfo(torch.float64).tiny)

    def settled(self, rank: int) -> bool:
        """Whether the first `rank` components have stopped turning."""
        return bool(self._settled[:rank].all())

    def update(self, x: Tensor) -> None:
        """Take in rows, (n, in); fewer than the components that are wanted are left out."""
        n, k = len(x), self.components_wanted
        if n < k:
            return
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(0)
        x = x - mean
        self.scatter += float(x.square().sum(dtype=torch.float64))
        total = self.count + n
        if self.count:
            shift = self.mean - mean
            pull = self.count * n / total
            self.scatter += pull * float(shift.square().sum(dtype=torch.float64))
            x = torch.cat([self.values[:, None] * self.components, x, math.sqrt(pull) * shift[None]])
            mean = self.mean + (mean - self.mean) * (n / total)
        values, components = _decomposed(x, k)
        if self.count:
            cosines = torch.nn.functional.cosine_similarity(components, self.components)
            self._settled = (cosines.abs() >= self.tau).cpu()
        self.count, self.mean, self.values, self.components = total, mean, values, components


def _decomposed(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors (k, in), the largest entry of each positive."""
    if 4 * k < min(x.shape):
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_SEED)
            _, values, V = torch.svd_lowrank(x, q=2 * k, niter=_ITERATIONS)
        Vt = V.T
    else:
        _, values, Vt = torch.linalg.svd(x, full_matrices=False)
    values, Vt = values[:k], Vt[:k]
    signs = Vt.gather(1, Vt.abs().argmax(1, keepdim=True)).sign()
    return values, Vt * signs
