"""One figure of the training benchmarks, from their JSON: where time and memory go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw"]

_COLOURS = {"hf_lora": "#1f77b4", "PEFT": "#d62728", "generic": "#9ecae1"}


def draw(data: dict[str, Any], folder: Path) -> None:
    """Write training.svg and training.png."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "training"  # the same numbers give the same file
    import matplotlib.pyplot as plt

    sections = data["sections"]
    panels = [(draw, sections[key]) for key, draw in (("time", _time), ("parts", _parts), ("saved", _saved))]
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.6))
    for axis, (panel, cases) in zip(axes, panels, strict=True):
        panel(axis, cases, sections)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "training.svg", metadata={"Date": None})
    figure.savefig(folder / "training.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def _who(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {outcome["who"]: outcome for outcome in case["competitors"]}


def _settings(case: dict[str, Any]) -> list[str]:
    return [n.removeprefix("PEFT, ") for n in _who(case) if n.startswith("PEFT, ")]


def _grouped(axis: Any, case: dict[str, Any]) -> None:
    found, settings = _who(case), _settings(case)
    for k, (label, name) in enumerate(
        (("hf_lora", "hf_lora, {}"), ("generic", "hf_lora, {}, generic path"), ("PEFT", "PEFT, {}"))
    ):
        here = [(i, found[name.format(s)]) for i, s in enumerate(settings) if name.format(s) in found]
        bars = axis.bar(
            [i + (k - 1) * 0.27 for i, _ in here],
            [outcome["ratio"]["median"] for _, outcome in here],
            0.26,
            color=_COLOURS[label],
            label={"generic": "hf_lora, generic path"}.get(label, label),
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.set_xticks(range(len(settings)), [s.replace(", dropout", "\ndropout") for s in settings])
    axis.axhline(1, color="#7f7f7f", linewidth=0.8)


def _time(axis: Any, cases: list[dict[str, Any]], sections: dict[str, Any]) -> None:
    _grouped(axis, cases[0])
    axis.set_ylim(0.9)
    axis.set_title(f"Step ÷ the limit: {cases[0]['case']}")


def _saved(axis: Any, cases: list[dict[str, Any]], sections: dict[str, Any]) -> None:
    case = next((c for c in cases if "bfloat16" in c["case"]), cases[0])
    _grouped(axis, case)
    axis.set_title(f"Saved for backward ÷ the frozen base: {case['case']}")


def _parts(axis: Any, cases: list[dict[str, Any]], sections: dict[str, Any]) -> None:
    timed = _who(sections["time"][0])
    labels = [case["case"].rsplit(", ", 2)[0] for case in cases]
    products, dropped, flops = ([c["competitors"][k]["median"] for c in cases] for k in range(3))
    above = [timed[f"hf_lora, {label}"]["ratio"]["median"] - 1 for label in labels]
    rest = [max(a - p - d, 0) for a, p, d in zip(above, products, dropped, strict=True)]
    places = range(len(labels))
    axis.bar(places, products, 0.5, label="the adapter's products", color="#1f77b4")
    axis.bar(places, dropped, 0.5, bottom=products, label="dropout", color="#ff7f0e")
    below = [p + d for p, d in zip(products, dropped, strict=True)]
    axis.bar(places, rest, 0.5, bottom=below, label="the rest: dispatch, Python, casts", color="#bdbdbd")
    axis.plot(places, flops, "k_", markersize=40, label="the products' FLOPs at the base's speed")
    axis.set_xticks(places, [label.replace(", dropout", "\ndropout") for label in labels])
    axis.set_title("hf_lora: what is above the limit, ÷ the limit")
