"""The spectrum of ΔW, and what rank it asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import spectrum as spectra
from ..errors import LoRAConfigError
from ..lowrank import enough
from ..values import AdapterValue
from .places import Array, LayerResult, Result, array, places, refuse_zero

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerSpectrum", "Spectra", "SuggestedRank", "effective_rank", "spectrum", "suggested_rank"]


@dataclass(frozen=True, eq=False)
class LayerSpectrum(LayerResult):
    """The singular values of one ΔW.

    Args:
        rank: r, of the factors.
        values: σ, largest first: (min(r, in, rows),) float64.
    """

    rank: int
    values: Array

    @property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius)."""
        return float(np.sqrt(np.square(self.values).sum()))

    @property
    def effective_rank(self) -> float:
        """exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ; 0 if ΔW is zero. Source: Roy & Vetterli 2007."""
        return spectra.effective_rank(torch.tensor(self.values))

    def suggested_rank(self, energy: float = 0.9) -> int:
        """The smallest rank that keeps the share `energy` of Σσ²; 0 if ΔW is zero."""
        _check_energy(energy)
        return enough(torch.tensor(self.values), energy) if self.values.any() else 0


@dataclass(frozen=True, eq=False)
class Spectra(Result[LayerSpectrum]):
    """The singular values of every ΔW of an adapter."""

    def plot(self) -> Figure:
        """σᵢ/σ₁ over i, a line for each layer, a panel for each role. Needs matplotlib."""
        from .figures import spectra_figure

        return spectra_figure(self)


@dataclass(frozen=True, eq=False)
class SuggestedRank:
    """Ranks that keep a share of the energy.

    Args:
        energy: the share of Σσ².
        rank: the smallest one rank with which every layer keeps it.
        layers: (path, role) → the smallest rank with which that layer does; 0 where ΔW is zero.
    """

    energy: float
    rank: int
    layers: dict[tuple[str, str], int]


def spectrum(adapter: AdapterValue, *, only: Iterable[str] | None = None) -> Spectra:
    """The singular values of every ΔW = scaling·B·A, from the factors alone.

    Args:
        adapter: a `LoRAAdapter`; in a fused layer each role's rows are a ΔW of their own.
        only: roles, module paths or their endings; None is all.

    Raises:
        LoRAMismatchError: it is not finite. LoRATargetError: `only` names nothing.
    """
    return Spectra(
        tuple(
            LayerSpectrum(place.path, place.role, place.factors.rank, array(spectra.singular_values(place.factors)))
            for place in places(adapter, only)
        )
    )


def effective_rank(adapter: AdapterValue, *, only: Iterable[str] | None = None) -> dict[tuple[str, str], float]:
    """(path, role) → exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ: how many directions each ΔW uses; 0 if it is zero.

    Args and Raises: as `spectrum`.

    Source: Roy & Vetterli 2007, "The effective rank".
    """
    return {(layer.path, layer.role): layer.effective_rank for layer in spectrum(adapter, only=only)}


def suggested_rank(adapter: AdapterValue, energy: float = 0.9, *, only: Iterable[str] | None = None) -> SuggestedRank:
    """The smallest ranks that keep the share `energy` of Σσ², as `adapter.truncate(energy=…)` takes them.

    Args:
        adapter: a `LoRAAdapter`, trained with a rank to spare.
        energy: in (0, 1].
        only: roles, module paths or their endings; None is all.

    Raises:
        LoRAConfigError: `energy` is out of range. LoRAMismatchError: it is not finite, or ΔW is zero everywhere.
    """
    _check_energy(energy)
    found = spectrum(adapter, only=only)
    ranks = {(layer.path, layer.role): layer.suggested_rank(energy) for layer in found}
    if not any(ranks.values()):
        refuse_zero([layer.path for layer in found], len(found))
    return SuggestedRank(float(energy), max(ranks.values()), ranks)


def _check_energy(energy: Any) -> None:
    if isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1:
        raise LoRAConfigError(
            f"energy={energy!r} is no number in (0, 1].",
            name="energy",
            value=energy,
            expected="a number in (0, 1]",
            remedy="Give the share of Σσ² to keep: energy=0.9.",
        )
