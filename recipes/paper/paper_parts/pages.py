"""The page of an experiment: what it is, its table, what the paper found, what was found here, on what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from . import figures
from .metrics import METRICS
from .statistics import Difference

__all__ = ["figure", "page", "table"]


def page(experiment: Mapping[str, Any], results: Mapping[str, Any], figure_file: str | None) -> str:
    """Markdown."""
    parts = [f"# {experiment['title']}", experiment.get("question", ""), f"```bash\n{results['command']}\n```"]
    if figure_file:
        parts.append(f"![{experiment['title']}]({figure_file})")
    # The marks let another page take the table alone.
    parts.append(f"<!-- --8<-- [start:table] -->\n{_TABLES[results['kind']](results)}\n<!-- --8<-- [end:table] -->")
    parts.append(f"## What the paper found\n\n{experiment['paper'].strip()}")
    if found := experiment.get("found", {}).get(results["profile"]):
        parts.append(f"## What was found here\n\n{found.strip()}")
    if headline := (_headline(results) if experiment.get("headline") else ""):
        parts.append(headline)
    parts.append(f"## On what\n\n{_setting(results)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def figure(experiment: Mapping[str, Any], results: Mapping[str, Any], path: Path) -> bool:
    """Draw it, if the experiment has a figure."""
    return "figure" in experiment and figures.draw(experiment["figure"], results, path)


# ---- grids -----------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    """Systems in rows; a column for each column's headline metric, or for all metrics where there is one column."""
    columns = results["columns"]
    several = len(columns) == 1 and len(columns[0]["metrics"]) > 2
    shown = (
        [(0, name) for name in columns[0]["metrics"]]
        if several
        else [(c, columns[c]["metrics"][0]) for c in _measured(results)]
    )
    titles = [METRICS[name][0] if several else f"{columns[c]['name']} ({METRICS[name][0]})" for c, name in shown]
    lines = [
        "| system | trainable | share | " + " | ".join(titles) + " | seeds |",
        "|---|--:|--:|" + "--:|" * (len(shown) + 1),
    ]
    for row in results["rows"]:
        if all(entry is None for entry in row["columns"]):
            continue
        cells = [_number(row["columns"][c], name) for c, name in shown]
        seeds = sorted({entry["seeds"] for entry in row["columns"] if entry})
        share = "" if row["method"] == "few-shot" else f"{100 * row['share']:.2f} %"
        counted = f"{row['trainable']:,}" + (f" + {row['head']:,}" if row["head"] else "")
        lines.append(f"| {row['system']} | {counted} | {share} | {' | '.join(cells)} | {'–'.join(map(str, seeds))} |")
    best = [f"{results['trivial'][c]['metrics'][name]:.2f} ({results['trivial'][c]['name']})" for c, name in shown]
    lines.append(f"| *no model* | 0 | | {' | '.join(best)} | |")
    return "\n".join(lines)


def _measured(results: Mapping[str, Any]) -> list[int]:
    """The columns that something was run for."""
    return [c for c in range(len(results["columns"])) if any(row["columns"][c] for row in results["rows"])]


def _number(entry: Mapping[str, Any] | None, name: str) -> str:
    if entry is None:
        return ""
    of = entry["metrics"][name]
    digits = 2 if name in ("nist", "cider") else 1
    return f"{of['mean']:.{digits}f}" + ("" if of["deviation"] is None else f" ± {of['deviation']:.{digits}f}")


def _headline(results: Mapping[str, Any]) -> str:
    """LoRA against full fine-tuning and against what needs no model, with paired errors."""
    row = next((row for row in results["rows"] if row["method"] == "lora"), None)
    if row is None:
        return ""
    lines = [
        "## LoRA against full fine-tuning, and against no model",
        "",
        "Differences with the interval that holds 95 % of a paired bootstrap over examples and seeds.",
        "",
        "| task | metric | LoRA − FT | within noise | LoRA − no model |",
        "|---|---|--:|---|--:|",
    ]
    for column, entry in zip(results["columns"], row["columns"], strict=True):
        if entry is None or "against FT" not in entry:
            continue
        ft, none = entry["against FT"], entry["above trivial"]
        lines.append(
            f"| {column['name']} | {METRICS[ft['metric']][0]} | {_interval(ft)} | {_noise(ft)} | {_interval(none)} |"
        )
    return "\n".join(lines)


def _interval(found: Mapping[str, Any]) -> str:
    return str(Difference(found["mean"], found["low"], found["high"]))


def _setting(results: Mapping[str, Any]) -> str:
    if "columns" not in results:
        return str(results.get("setting", ""))
    lines = [
        f"- {col['name']}: {col['base']}, {col['train']:,} training examples, measured on {col['eval']:,}."
        for col in (results["columns"][c] for c in _measured(results))
    ]
    missing = [col["name"] for c, col in enumerate(results["columns"]) if c not in _measured(results)]
    if missing:
        lines.append(f"- Not run yet: {', '.join(missing)}. The same command goes on from the records.")
    if any(row["head"] for row in results["rows"]):
        lines.append("- The second number of “trainable” is the new head of the classification.")
    return "\n".join(lines)


def _compared(results: Mapping[str, Any]) -> str:
    """Systems in rows, each with its difference to the first one, and what it costs."""
    first, column = results["rows"][0], results["columns"][0]
    name = column["metrics"][0]
    head = f"| system | trainable | {column['name']} ({METRICS[name][0]}) | − {first['system']} [95 %] | within noise "
    lines = [
        f"{head}| CPU s/step | kept for the backward | CPU s to begin |",
        "|---|--:|--:|--:|---|--:|--:|--:|",
    ]
    for row in results["rows"]:
        entry = row["columns"][0]
        if entry is None:
            continue
        found = entry.get(f"against {first['system']}")
        cells = [f"{row['trainable']:,}", _number(entry, name), "" if found is None else _interval(found)]
        cells += ["" if found is None else _noise(found), *_spent(entry)]
        lines.append(f"| {row['system']} | {' | '.join(cells)} |")
    best = f"{results['trivial'][0]['metrics'][name]:.2f} ({results['trivial'][0]['name']})"
    return "\n".join([*lines, f"| *no model* | 0 | {best} | | | | | |"])


def _noise(found: Mapping[str, Any]) -> str:
    return "yes" if found["noise"] else ("no, better" if found["mean"] > 0 else "no, worse")


def _spent(entry: Mapping[str, Any]) -> list[str]:
    if "saved_bytes" not in entry:
        return ["", "", ""]
    step = median(entry["cpu_seconds_per_step"])
    return [f"{step:.2f}", f"{entry['saved_bytes'] / 1e6:.1f} MB", f"{entry['cpu_seconds_beginning']:.1f}"]


# ---- other studies ---------------------------------------------------------------------------------------------------


def _latency(results: Mapping[str, Any]) -> str:
    sizes = [f"{rows} × {length}" for rows, length in results["sizes"]]
    lines = ["| forward | " + " | ".join(sizes) + " |", "|---|" + "--:|" * len(sizes)]
    for k, variant in enumerate(results["variants"]):
        cells = [
            f"{at['ms']:.1f} ms" if not k else f"{_percent(at['ratio'])} [{', '.join(map(_percent, at['quartiles']))}]"
            for at in variant["at"]
        ]
        lines.append(f"| {variant['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nIn brackets the quartiles over rounds."


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _costs(results: Mapping[str, Any]) -> str:
    lines = [
        "| system | trainable | weights | gradients | optimizer | activations | all | checkpoint | tokens/s | ÷ FT |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    parts = ("weights", "gradients", "optimizer", "activations")
    for row in results["rows"]:
        cells = [_megabytes(row[part]) for part in parts]
        cells += [_megabytes(sum(row[part] for part in parts)), _megabytes(row["checkpoint"])]
        lines.append(
            f"| {row['system']} | {row['trainable']:,} | {' | '.join(cells)} | {row['tokens_per_second']:.0f} "
            f"| {row['ratio']:.2f} |"
        )
    gpt3 = results["gpt3"]
    said = (
        f"GPT-3 by its shapes (no weights): {gpt3['total'] / 1e9:.1f}B parameters. LoRA with r = 4 on W_q and W_v "
        f"trains {gpt3['trainable']:,}; in 16 bits its checkpoint is {gpt3['checkpoint_lora'] / 1e6:.1f} MB instead of "
        f"{gpt3['checkpoint_ft'] / 1e9:.0f} GB."
    )
    return "\n".join(lines) + f"\n\n{said}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count < 10e6 else f"{count / 1e6:,.0f} MB"


def _similarity(results: Mapping[str, Any]) -> str:
    shown_at = " | ".join(f"φ({k}, {k})" for k in (1, 2, 4, 8))
    lines = [
        f"| pair | directions of | side | role | {shown_at} | random φ(1, 1) | random φ(8, 8) |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for found in results["pairs"]:
        shown = [_at(found["phi"], k) for k in (1, 2, 4, 8)] + [_at(found["baseline"], k) for k in (1, 8)]
        of = "ΔW" if found["of"] == "delta" else found["side"]
        side = "input" if found["side"] == "A" else "output"
        lines.append(f"| {found['pair']} | {of} | {side} | {found['role']} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n\nMeans over the layers."


def _at(phi: list[list[float]], k: int) -> str:
    return f"{phi[k - 1][k - 1]:.2f}" if len(phi) >= k and len(phi[0]) >= k else ""


def _amplification(results: Mapping[str, Any]) -> str:
    lines = [
        "| adapter | role | ‖ΔW‖ | ‖UᵀWV‖ | factor | W's own directions | random directions | ‖W‖ |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        names = ("delta_norm", "projected", "factor", "own", "random", "base_norm")
        lines.append(f"| {row['adapter']} | {row['role']} | " + " | ".join(f"{row[name]:.3g}" for name in names) + " |")
    return "\n".join(lines) + "\n\nMeans over the layers."


_TABLES = {
    "grid": table,
    "compared": _compared,
    "latency": _latency,
    "costs": _costs,
    "similarity": _similarity,
    "amplification": _amplification,
}
