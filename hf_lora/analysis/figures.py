"""The figures of results, with matplotlib's own objects: no pyplot, no window, no global state."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..cardtext import clean
from ..errors import LoRAUnsupportedError
from .places import LayerResult, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .amplification import Amplification
    from .intruders import Intruders
    from .ranks import Spectra
    from .subspaces import AdapterOverlap, SubspaceSimilarity

__all__ = [
    "amplification_figure",
    "intruders_figure",
    "overlap_figure",
    "require_matplotlib",
    "similarity_figure",
    "spectra_figure",
]

L = TypeVar("L", bound=LayerResult)
_COLUMNS = 4  # panels side by side
_LONGEST = 40  # characters of a name


def require_matplotlib() -> None:
    """Raise `LoRAUnsupportedError` where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LoRAUnsupportedError(
            f"Figures need matplotlib, which cannot be imported: {error}.",
            name="matplotlib",
            remedy='Type: pip install "hf_lora[analysis]"',
        ) from error


def spectra_figure(result: Spectra) -> Figure:
    """σᵢ/σ₁ over i, a line for each layer, a panel for each role."""
    figure, panels = _panels(list(result.by_role))
    for axes, (role, layers) in zip(panels, result.by_role.items(), strict=False):
        for number, layer in enumerate(layers):
            if layer.values.size and layer.values[0] > 0:
                shade = 0.15 + 0.75 * number / max(len(layers) - 1, 1)
                shares = layer.values / layer.values[0]
                axes.plot(np.arange(1, len(shares) + 1), shares, color=_colours()(shade), linewidth=1)
        axes.set(title=label(role), xlabel="i", ylabel="σᵢ / σ₁", ylim=(0, 1.05))
    figure.suptitle("Singular values of ΔW; light lines are later layers")
    return figure


def similarity_figure(result: SubspaceSimilarity) -> Figure:
    """The mean φ of each role, and beside it that of random subspaces."""
    require_matplotlib()
    from matplotlib.figure import Figure

    roles = list(result.by_role)
    both = all(layer.baseline is not None for layer in result.layers)
    figure = Figure(figsize=(4.2 * (1 + both), 2.8 * len(roles) + 0.6), layout="constrained")
    grid = figure.subplots(len(roles), 1 + both, squeeze=False)
    image = None
    for row, role in zip(grid, roles, strict=True):
        for axes, baseline in zip(row, (False, True), strict=False):
            phi = result.mean(role, baseline=baseline)
            extent = (0.5, phi.shape[1] + 0.5, phi.shape[0] + 0.5, 0.5)
            image = axes.imshow(phi, vmin=0, vmax=1, aspect="auto", extent=extent, interpolation="nearest")
            axes.set(title=f"{label(role)}{', random' if baseline else ''}", xlabel="j, of b", ylabel="i, of a")
            axes.locator_params(integer=True)
    if image is not None:
        figure.colorbar(image, ax=grid.ravel().tolist(), label="φ(i, j)")
    figure.suptitle(f"Subspace similarity, side {result.side}, mean over the layers")
    return figure


def overlap_figure(result: AdapterOverlap) -> Figure:
    """The cosine of each layer."""
    figure = _by_depth(result, lambda layer: layer.cosine, "cosine of ΔW of a and of b", "Overlap of the two adapters")
    figure.axes[0].axhline(0, color="grey", linewidth=0.5)
    return figure


def amplification_figure(result: Amplification) -> Figure:
    """The amplification factor of each layer."""
    return _by_depth(
        result, lambda layer: layer.factor, "‖ΔW‖ / ‖UᵀWV‖", "Amplification factor of ΔW's directions", log=True
    )


def intruders_figure(result: Intruders) -> Figure:
    """How many intruder dimensions each layer has."""
    title = f"Intruder dimensions among the top {result.k} (cosine below {result.threshold:g})"
    figure = _by_depth(result, lambda layer: len(layer.intruders), "number", title)
    figure.axes[0].set_ylim(-0.3, result.k + 0.3)
    return figure


# ---- parts -----------------------------------------------------------------------------------------------------------


def label(name: str) -> str:
    """A name as it reads: no mathematics begins in it, and it does not hide from a legend."""
    text = clean(name)
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _panels(names: Sequence[str]) -> tuple[Figure, list[Any]]:
    require_matplotlib()
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, max(len(names), 1))
    rows = math.ceil(max(len(names), 1) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    return figure, grid


def _colours() -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"]


def _by_depth(result: Result[L], value: Callable[[L], float], ylabel: str, title: str, *, log: bool = False) -> Figure:
    """A line for each role over the layers' numbers."""
    figure, (axes, *_) = _panels([""])
    figure.set_size_inches(8, 3.6)
    for role, layers in result.by_role.items():
        values = [value(layer) for layer in layers]
        axes.plot(_depths(layers), values, marker="o", markersize=3, linewidth=1, label=label(role))
    axes.set(xlabel="layer", ylabel=ylabel, title=title)
    axes.locator_params(axis="x", integer=True)
    if log and any(0 < value(layer) < math.inf for layer in result.layers):
        axes.set_yscale("log")
    axes.legend(fontsize="small")
    return figure


def _depths(layers: Sequence[LayerResult]) -> list[int]:
    """The first number in each path ("model.layers.11.…"); where they repeat, the order."""
    numbers = [re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", layer.path) for layer in layers]
    found = [int(number[1]) for number in numbers if number is not None]
    return found if len(set(found)) == len(layers) else list(range(len(layers)))
