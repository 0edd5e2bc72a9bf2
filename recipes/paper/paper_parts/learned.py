"""Figures 3 and 4 and Table 7: what adapters learned. They are trained as the cells of a grid and kept as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_lora import LoRAAdapter

from .grid import Cell, Grid, base_name, column_name, label
from .sweep import Records
from .tasks import Profile

__all__ = ["amplification", "similarity"]

_Kept = list[tuple[Cell, LoRAAdapter]]


def _adapters(
    experiment: Mapping[str, Any], profile: Profile, records: Records, run: bool, show: Any
) -> tuple[Grid, _Kept]:
    grid = Grid(experiment, profile, records)
    folder = profile.work / "adapters"
    cells = list(grid.cells())
    if run:
        with show(len(cells)) as (begin, step):
            for cell in cells:
                begin(cell.title)
                grid.run(cell, step, keep=folder)
    found = [(cell, folder / grid.key(cell)) for cell in cells]
    return grid, [(cell, LoRAAdapter.load(path)) for cell, path in found if path.is_dir()]


def _setting(grid: Grid) -> str:
    lines = []
    for column in grid.columns:
        data = grid.data(grid.cell(grid.systems[0], column, 0))
        lines.append(f"- {column_name(column)}: {base_name(data)}, {len(data.train):,} training examples.")
    return "\n".join(lines)


def similarity(
    experiment: Mapping[str, Any],
    profile: Profile,
    records: Records,
    out: Path,
    *,
    run: bool = True,
    show: Callable[[int], Any],
    **chosen: Any,
) -> dict[str, Any]:
    """φ of every pair of the experiment's adapters that `pairs` names, by role, averaged over layers."""
    from hf_lora.analysis import subspace_similarity

    grid, adapters = _adapters(experiment, profile, records, run, show)
    pairs = []
    for title, one, two in experiment["pairs"]:
        if max(one, two) >= len(adapters):
            continue
        for of in ("factors", "delta"):
            for side in ("A", "B"):
                found = subspace_similarity(adapters[one][1], adapters[two][1], side=side, of=of)
                for role in found.by_role:
                    phi, baseline = found.mean(role), found.mean(role, baseline=True)
                    pairs.append(
                        {
                            "pair": title,
                            "of": of,
                            "side": side,
                            "role": role,
                            "phi": [[round(float(v), 4) for v in line] for line in phi],
                            "baseline": [[round(float(v), 4) for v in line] for line in baseline],
                        }
                    )
    return {"pairs": pairs, "setting": _setting(grid)}


def amplification(
    experiment: Mapping[str, Any],
    profile: Profile,
    records: Records,
    out: Path,
    *,
    run: bool = True,
    show: Callable[[int], Any],
    **chosen: Any,
) -> dict[str, Any]:
    """Table 7's numbers for every adapter and role, averaged over layers."""
    from hf_lora.analysis import amplification_factor

    grid, adapters = _adapters(experiment, profile, records, run, show)
    rows = []
    for cell, adapter in adapters:
        found = amplification_factor(adapter, grid.data(cell).model())
        for role, layers in found.by_role.items():
            names = ("delta_norm", "base_norm", "projected", "own", "random", "factor")
            means = {name: round(fmean(getattr(layer, name) for layer in layers), 4) for name in names}
            rows.append({"adapter": label(cell.system), "seed": cell.seed, "role": role, **means})
    return {"rows": rows, "setting": _setting(grid)}
