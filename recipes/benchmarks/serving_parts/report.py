"""The results as JSON, as Markdown, and on the terminal."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .measure import Case, Outcome

__all__ = ["SECTIONS", "as_json", "as_markdown", "machine", "show"]

# key -> (title, what the reference of a ratio is called at the head of its column)
SECTIONS = {
    "rows": "A different adapter for each row",
    "generate": "Generate: tokens per second",
    "load": "Load one adapter",
    "growth": "Switch, load and decode against the number of residents",
    "merge": "Merge, unmerge, swap",
    "bytes": "Bytes in memory",
    "import": "Import",
    "profile": "Where a decode step spends its time",
}
_PACKAGES = ("torch", "transformers", "peft", "safetensors", "hf_lora")
_HEAD = ("case", "who", "median", "quartiles", "min – max", "÷ reference (quartiles)", "goal", "reached", "checked")


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    root = Path(__file__).resolve().parents[3]
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": head.stdout.strip() or None,
    }


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    numbers = {"median": statistics.median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}
    return {key: float(f"{value:.6g}") for key, value in numbers.items()}


def _outcome(case: Case, outcome: Outcome) -> dict[str, Any]:
    values = list(outcome.samples.values())
    ratios = case.ratios(outcome.name)
    goal, check = outcome.goal, outcome.check
    assert check is not None, f"{case.name}: {outcome.name} was not checked"
    goal_text = "" if goal is None else str(goal) + (f" {case.unit}" if goal.of == "value" else "")
    return {
        "who": outcome.name,
        **_spread(values),
        "samples": [float(f"{value:.6g}") for value in values],
        "ratio": _spread(ratios) if ratios else None,
        "goal": None
        if goal is None
        else {"limit": goal.limit, "of": goal.of, "origin": goal.origin, "text": goal_text},
        "reached": None if goal is None else goal.reached(case.number(outcome)),
        "rival": outcome.rival,
        "checked": {
            "against": check.against,
            "difference": check.difference,
            "tolerance": check.tolerance,
            "equal": check.equal,
        },
    }


def as_json(sections: dict[str, list[Case]], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything: each sample, each ratio's spread, each goal, each check."""
    return {
        **facts,
        "sections": {
            key: [
                {
                    "case": case.name,
                    "unit": case.unit,
                    "reference": case.reference,
                    "notes": case.notes,
                    "competitors": [_outcome(case, outcome) for outcome in case.outcomes],
                }
                for case in cases
            ]
            for key, cases in sections.items()
        },
    }


# ---- Markdown --------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1e}"


def _cells(case: dict[str, Any], outcome: dict[str, Any]) -> list[str]:
    one = len(outcome["samples"]) == 1
    ratio, check = outcome["ratio"], outcome["checked"]
    divided = ""
    if ratio and outcome["who"] != case["reference"]:
        spread = "" if one else f" ({_number(ratio['q1'])}–{_number(ratio['q3'])})"
        divided = f"{_number(ratio['median'])}{spread}"
    elif ratio:
        divided = "1, the reference"
    return [
        outcome["who"],
        f"{_number(outcome['median'])} {case['unit']}",
        "" if one else f"{_number(outcome['q1'])}–{_number(outcome['q3'])}",
        "" if one else f"{_number(outcome['min'])}–{_number(outcome['max'])}",
        divided,
        outcome["goal"]["text"] if outcome["goal"] else "",
        {True: "yes", False: "**no**", None: ""}[outcome["reached"]],
        f"{'equal' if check['equal'] else 'DIFFERS'}: {check['against']} ({_number(check['difference'])})",
    ]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(head: Sequence[str]) -> str:
    return "|" + "---|" * len(head)


def _goals(data: dict[str, Any]) -> list[str]:
    head = ("what", "hf_lora", "PEFT", "goal", "asked for by", "reached")
    rows = []
    for cases in data["sections"].values():
        for case in cases:
            for outcome in case["competitors"]:
                if outcome["goal"]:
                    rival = next((o for o in case["competitors"] if o["who"] == outcome["rival"]), None)
                    which = outcome["who"].removeprefix("hf_lora").removeprefix(", ")
                    rows.append(
                        [
                            case["case"] + (f"; {which}" if which else ""),
                            _judged(case, outcome, outcome["goal"]["of"]),
                            _judged(case, rival, outcome["goal"]["of"]) if rival else "",
                            outcome["goal"]["text"],
                            outcome["goal"]["origin"],
                            "yes" if outcome["reached"] else "**no**",
                        ]
                    )
    return [_row(head), _rule(head), *map(_row, rows)]


def _short(data: dict[str, Any], titles: Mapping[str, str]) -> list[str]:
    """The ratios of what has a rival."""
    lines = [_row(("÷ the reference", "hf_lora", "PEFT")), _rule(("", "", ""))]
    for key, cases in data["sections"].items():
        for case in cases:
            rows = [o for o in case["competitors"] if o["rival"] and o["ratio"]]
            if rows:
                lines.append(_row([f"*{titles[key]}; {case['case']}; ÷ {case['reference']}*", "", ""]))
            for outcome in rows:
                rival = next(o for o in case["competitors"] if o["who"] == outcome["rival"])
                numbers = [f"{o['ratio']['median']:.2f}" for o in (outcome, rival)]
                lines.append(_row([outcome["who"].removeprefix("hf_lora, "), *numbers]))
    return lines


def _marked(name: str, lines: Sequence[str]) -> list[str]:
    """Between marks by which another page takes these lines alone."""
    return [f"<!-- --8<-- [start:{name}] -->", *lines, f"<!-- --8<-- [end:{name}] -->"]


def _judged(case: dict[str, Any], outcome: dict[str, Any], of: str) -> str:
    if of == "value":
        return f"{_number(outcome['median'])} {case['unit']}"
    return f"{_number(outcome['ratio']['median'])} × {case['reference']}"


def _wide(cases: list[dict[str, Any]]) -> list[str]:
    """One column for each competitor, where each has one number."""
    names = [outcome["who"] for outcome in cases[0]["competitors"]]
    head = ["", *names]
    rows = [[f"{c['case']}, {c['unit']}", *(_number(o["median"]) for o in c["competitors"])] for c in cases]
    checked = [_cells(cases[0], outcome)[-1] for outcome in cases[0]["competitors"]]
    return [_row(head), _rule(head), *map(_row, rows), _row(["checked", *checked])]


def _long(cases: list[dict[str, Any]]) -> list[str]:
    lines = [_row(_HEAD), _rule(_HEAD)]
    for case in cases:
        for i, outcome in enumerate(case["competitors"]):
            lines.append(_row([case["case"] if i == 0 else "", *_cells(case, outcome)]))
    return lines


def as_markdown(data: dict[str, Any], titles: Mapping[str, str] = SECTIONS) -> str:
    """The goals, then a table for each section. Without goals: the ratios in short, and marks for other pages."""
    facts, versions = data["machine"], data["machine"]["versions"]
    busy = facts["load_before"] > 0.25 * facts["cores"]
    lines = [
        f"`{data['command']}`, {data['date']}, {data['seconds']:,} s. {facts['cpu']}, {facts['cores']} "
        f"cores, {facts['threads']} threads, no GPU; Python {facts['python']}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + (f", commit {facts['commit']}" if facts["commit"] else "")
        + ".",
        "",
    ]
    if data["smoke"]:
        lines += ["**A smoke run: tiny sizes, no number means anything.**", ""]
    elif busy:
        load = f"load {facts['load_before']} on {facts['cores']} cores"
        lines += [f"**The machine was busy when this began ({load}): do not rely on the times.**", ""]
    goals = any(o["goal"] for cases in data["sections"].values() for case in cases for o in case["competitors"])
    lines += (
        ["### Goals", "", *_goals(data), ""]
        if goals
        else ["### In short", "", *_marked("short", _short(data, titles)), ""]
    )
    for key, cases in data["sections"].items():
        lines += [f"### {titles[key]}", ""]
        for note in [note for case in cases for note in case["notes"]]:
            lines += [note, ""]
        table = _wide(cases) if key == "profile" else _long(cases)
        lines += [*(table if goals else _marked(key, table)), ""]
    return "\n".join(lines).rstrip() + "\n"


# ---- the terminal ----------------------------------------------------------------------------------------------------


def show(key: str, cases: list[Case], seconds: float, titles: Mapping[str, str] = SECTIONS) -> None:
    """A section, as soon as it is there."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    data = as_json({key: cases}, {})["sections"][key]
    table = Table(title=f"{titles[key]} ({seconds:.0f} s)", title_justify="left")
    for name in _HEAD:
        table.add_column(name, overflow="fold", justify="left" if name in ("case", "who", "checked") else "right")
    for case in data:
        for i, outcome in enumerate(case["competitors"]):
            table.add_row(*(escape(cell) for cell in [case["case"] if i == 0 else "", *_cells(case, outcome)]))
        table.add_section()
    console = Console()
    console.print(table)
    for note in [note for case in data for note in case["notes"]]:
        console.print(escape(note), style="dim")
