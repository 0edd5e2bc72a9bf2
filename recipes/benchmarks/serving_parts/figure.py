"""One figure of the serving benchmarks, from their JSON."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["draw"]

_COLOURS = {"hf_lora": "#1f77b4", "PEFT": "#d62728", "base": "#7f7f7f", "by hand": "#2ca02c"}
_PALE = ("first call", "low_cpu", "one for all")
_HATCHED = ("after another",)
_Cases = list[dict[str, Any]]


def draw(data: dict[str, Any], folder: Path) -> None:
    """Write serving.svg and serving.png; a panel for each of the sections that are there."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "serving"  # the same numbers give the same file
    import matplotlib.pyplot as plt

    panels = [(panel, data["sections"][key]) for key, panel in _PANELS if key in data["sections"]]
    if not panels:
        return
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 4.2 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (panel, cases) in zip(axes.flat, panels, strict=False):
        panel(axis, cases)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.tight_layout()
    figure.savefig(folder / "serving.svg", metadata={"Date": None})
    figure.savefig(folder / "serving.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def _colour(name: str) -> str:
    return next((colour for key, colour in _COLOURS.items() if key in name), "#9467bd")


def _bars(axis: Any, labels: list[str], series: dict[str, list[float]], *, log: bool = False) -> None:
    width = 0.84 / len(series)
    for k, (name, values) in enumerate(series.items()):
        places = [i + (k - (len(series) - 1) / 2) * width for i in range(len(labels))]
        pale, hatch = any(word in name for word in _PALE), "///" if any(word in name for word in _HATCHED) else None
        bars = axis.bar(places, values, width, label=name, color=_colour(name), alpha=0.45 if pale else 1, hatch=hatch)
        axis.bar_label(bars, fmt=_short, fontsize=6)
    axis.set_xticks(range(len(labels)), labels)
    if log:
        axis.set_yscale("log")


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _of(case: dict[str, Any], who: str) -> dict[str, Any]:
    found: dict[str, Any] = next(outcome for outcome in case["competitors"] if outcome["who"] == who)
    return found


def _ratio(case: dict[str, Any], who: str) -> float:
    return float(_of(case, who)["ratio"]["median"])


def _rows(axis: Any, cases: _Cases) -> None:
    case = cases[0]
    names = [outcome["who"] for outcome in case["competitors"]]
    counts = [found.group(1) for name in names if (found := re.fullmatch(r"hf_lora, route of (\d+)", name))]
    series = {
        "the same maths by hand": "the same maths by hand",
        "hf_lora": "hf_lora, route of {}",
        "hf_lora, first call of a route": "hf_lora, route of {}, first call",
        "PEFT": "PEFT, adapter_names of {}",
    }
    _bars(
        axis,
        [f"{count} distinct" for count in counts],
        {label: [_ratio(case, who.format(count)) for count in counts] for label, who in series.items()},
        log=True,
    )
    axis.axhline(1, color=_COLOURS["base"], linewidth=0.8)
    axis.set_title(f"An adapter for each row, time ÷ base: {case['case']}")


def _generate(axis: Any, cases: _Cases) -> None:
    names = [outcome["who"] for outcome in cases[0]["competitors"]]
    labels = [case["case"].split(", ", 1)[1] for case in cases]
    _bars(axis, labels, {name: [_of(case, name)["median"] for case in cases] for name in names})
    axis.set_title(f"Generate, tokens/s: {cases[0]['case'].split(',')[0]}")


def _load(axis: Any, cases: _Cases) -> None:
    cases = [case for case in cases if case["reference"]]
    names = [outcome["who"] for outcome in cases[0]["competitors"] if outcome["who"] != cases[0]["reference"]]
    labels = [case["case"] for case in cases]
    _bars(axis, labels, {name: [_ratio(case, name) for case in cases] for name in names}, log=True)
    axis.set_title("Load, time ÷ reading the file")


def _against_residents(title: str, index: int) -> Callable[[Any, _Cases], None]:
    def panel(axis: Any, cases: _Cases) -> None:
        lines: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for outcome in cases[index]["competitors"]:
            found = re.fullmatch(r"(hf_lora|PEFT), ([\d,]+) resident(, first call)?", outcome["who"])
            if found:
                count = int(found.group(2).replace(",", ""))
                lines.setdefault(found.group(1) + (found.group(3) or ""), []).append((count, outcome))
        for name, points in lines.items():
            axis.errorbar(
                [count for count, _ in points],
                [outcome["median"] for _, outcome in points],
                yerr=[
                    [outcome["median"] - outcome["q1"] for _, outcome in points],
                    [outcome["q3"] - outcome["median"] for _, outcome in points],
                ],
                marker="o",
                linestyle="--" if "first" in name else "-",
                color=_colour(name),
                label=name,
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"{title}, {cases[index]['unit']}, against the number of resident adapters")

    return panel


_PANELS: tuple[tuple[str, Callable[[Any, _Cases], None]], ...] = (
    ("rows", _rows),
    ("generate", _generate),
    ("load", _load),
    ("growth", _against_residents("Switch", 0)),
    ("growth", _against_residents("Load one more", 1)),
    ("growth", _against_residents("Routed decode step", 2)),
)
