"""Figures of the experiments, from their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .methods import METHODS
from .metrics import METRICS

__all__ = ["draw"]

_Results = Mapping[str, Any]


def draw(kind: str, results: _Results, path: Path) -> bool:
    """Write an SVG and a PNG; False if there is nothing to draw yet."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same numbers give the same file
    import matplotlib.pyplot as plt

    figure = _FIGURES[kind](plt, results)
    if figure is None:
        return False
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True


def _found(results: _Results) -> list[tuple[Mapping[str, Any], int, Mapping[str, Any]]]:
    return [(row, c, entry) for row in results["rows"] for c, entry in enumerate(row["columns"]) if entry is not None]


def _value(results: _Results, c: int, entry: Mapping[str, Any]) -> tuple[float, float]:
    of = entry["metrics"][results["columns"][c]["metrics"][0]]
    return of["mean"], of["deviation"] or 0.0


def _panels(plt: Any, results: _Results) -> tuple[Any, list[Any]]:
    count = len(results["columns"])
    figure, axes = plt.subplots(1, count, figsize=(max(5.5, 4.2 * count), 4.2), squeeze=False)
    for axis, column in zip(axes[0], results["columns"], strict=True):
        axis.set_title(f"{column['name']} ({METRICS[column['metrics'][0]][0]})", fontsize=9)
    return figure, list(axes[0])


def _parameters(plt: Any, results: _Results) -> Any:
    """Quality against trainable parameters; a line joins the sizes of one system."""
    found = _found(results)
    if not found:
        return None
    figure, axes = _panels(plt, results)
    groups: dict[str, list[Any]] = {}
    for row, c, entry in found:
        if row["method"] != "few-shot":
            groups.setdefault(row["method"], []).append((row, c, entry))
    for k, (method, points) in enumerate(groups.items()):
        for c, axis in enumerate(axes):
            line = sorted(
                (row["trainable"] + row["head"], *_value(results, c, entry)) for row, at, entry in points if at == c
            )
            if line:
                axis.errorbar(
                    [x for x, _, _ in line],
                    [y for _, y, _ in line],
                    yerr=[e for _, _, e in line],
                    marker="o^sDvPX*"[k % 8],
                    color=plt.cm.tab20(k % 20),
                    label=METHODS[method].title,
                    linewidth=1,
                    markersize=5,
                )
    for c, axis in enumerate(axes):
        best = results["trivial"][c]
        axis.axhline(best["metrics"][results["columns"][c]["metrics"][0]], color="#7f7f7f", linestyle=":", linewidth=1)
        axis.set_xscale("log")
        axis.set_xlabel("trainable parameters", fontsize=8)
    axes[-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _bars(plt: Any, results: _Results) -> Any:
    """A bar for each system."""
    found = _found(results)
    if not found:
        return None
    figure, axes = _panels(plt, results)
    for c, axis in enumerate(axes):
        rows = [(row["system"], *_value(results, c, entry)) for row, at, entry in found if at == c]
        axis.barh([n for n, _, _ in rows], [v for _, v, _ in rows], xerr=[e for _, _, e in rows], color="#1f77b4")
        low = min(v - e for _, v, e in rows)
        axis.set_xlim(left=max(0, low - 5))
        axis.invert_yaxis()
    return figure


def _columns(plt: Any, results: _Results) -> Any:
    """A line for each system over the columns, such as sizes of the training data."""
    found = _found(results)
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(5.5, 4.2))
    names = [column["name"] for column in results["columns"]]
    for k, row in enumerate(results["rows"]):
        points = [(c, *_value(results, c, entry)) for r, c, entry in found if r is row]
        if points:
            axis.errorbar(
                [c for c, _, _ in points],
                [v for _, v, _ in points],
                yerr=[e for _, _, e in points],
                marker="o^sDvPX*"[k % 8],
                label=row["system"],
            )
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel(METRICS[results["columns"][0]["metrics"][0]][0], fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    return figure


def _latency(plt: Any, results: _Results) -> Any:
    """Time ÷ base's, for each variant and batch."""
    if not results["variants"]:
        return None
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    variants, width = results["variants"][1:], 0.8 / max(1, len(results["variants"]) - 1)
    for k, variant in enumerate(variants):
        axis.bar(
            [i + k * width for i in range(len(variant["at"]))],
            [100 * (at["ratio"] - 1) for at in variant["at"]],
            width,
            label=variant["name"],
        )
    axis.axhline(0, color="#7f7f7f", linewidth=0.8)
    axis.set_xticks(
        [i + 0.4 - width / 2 for i in range(len(results["sizes"]))], [f"{rows} × {t}" for rows, t in results["sizes"]]
    )
    axis.set_ylabel("slower than the base, %", fontsize=8)
    axis.set_xlabel("batch × length", fontsize=8)
    axis.legend(fontsize=7, frameon=False)
    return figure


def _similarity(plt: Any, results: _Results) -> Any:
    """φ on the input side of ΔW, a panel for each pair and role, and the random baseline of each pair."""
    panels = []
    for found in results["pairs"]:
        if (found["of"], found["side"]) == ("delta", "A"):
            panels.append((f"{found['pair']}: {found['role']}", found["phi"]))
            last = (found["pair"], found["baseline"])
            panels = [panel for panel in panels if panel[0] != f"{last[0]}: random"] + [(f"{last[0]}: random", last[1])]
    if not panels:
        return None
    lines = -(-len(panels) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(10.5, 3.4 * lines), squeeze=False)
    for axis, (title, phi) in zip(axes.flat, panels, strict=False):
        ends = (0.5, len(phi) + 0.5)  # the first direction is 1
        image = axis.imshow(
            [line[: len(phi)] for line in phi], vmin=0, vmax=1, origin="lower", aspect="auto", extent=(*ends, *ends)
        )
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("j", fontsize=8)
        axis.set_ylabel("i", fontsize=8)
        figure.colorbar(image, ax=axis, fraction=0.05)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    return figure


_FIGURES: dict[str, Callable[[Any, _Results], Any]] = {
    "parameters": _parameters,
    "bars": _bars,
    "columns": _columns,
    "latency": _latency,
    "similarity": _similarity,
}
