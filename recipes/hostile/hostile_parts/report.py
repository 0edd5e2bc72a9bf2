"""The page of a run, and the same as data."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .core import MOST_BYTES, MOST_SECONDS, OUTCOMES, Tally

__all__ = ["COMMAND", "NAME", "write"]

NAME = "hostile"
COMMAND = "python recipes/hostile/fuzz.py"
ENGINES = {
    "mutation": "good inputs, changed in a few places",
    "hypothesis": "good inputs with values that hypothesis drew",
    "atheris": "guided by the coverage of hf_lora",
}


def write(
    folder: Path,
    tallies: Mapping[str, Mapping[str, Tally]],
    about: Mapping[str, Mapping[str, str]],
    seed: int,
    order: Sequence[str],
) -> dict[str, Any]:
    """hostile.md and hostile.json: target × inputs × outcome. `tallies`: target -> engine -> tally.

    Targets that were not played now keep the rows that they have, as far as they are in `order`.
    """
    import torch
    import transformers

    old = folder / f"{NAME}.json"
    rows = json.loads(old.read_text(encoding="utf-8"))["targets"] if old.is_file() else {}
    for name, engines in tallies.items():
        whole = Tally()
        for tally in engines.values():
            whole.add(tally)
        rows[name] = {
            **about[name],
            "inputs": sum(whole.outcomes.values()),
            **{outcome: whole.outcomes[outcome] for outcome in OUTCOMES},
            "engines": {engine: sum(tally.outcomes.values()) for engine, tally in engines.items()},
            "per_second": round(sum(whole.outcomes.values()) / max(whole.seconds, 1e-9)),
            "slowest_seconds": round(whole.slowest, 3),
            "most_memory_bytes": whole.largest,
            "longest_input_bytes": whole.longest,
            "findings": whole.findings,
        }
    rows = {name: rows[name] for name in order if name in rows}
    total = {key: sum(row[key] for row in rows.values()) for key in ("inputs", *OUTCOMES)}
    found = {
        "format": 1,
        "command": COMMAND,
        "seed": seed,
        "bounds": {"seconds": MOST_SECONDS, "bytes": MOST_BYTES},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "total": total,
        "targets": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / f"{NAME}.md").write_text(_page(found), encoding="utf-8")
    return found


def _page(found: Mapping[str, Any]) -> str:
    total = found["total"]
    engines: dict[str, int] = {}
    for row in found["targets"].values():
        for engine, count in row["engines"].items():
            engines[engine] = engines.get(engine, 0) + count
    lines = ["# Hostile input", "", *_intro(found), ""]
    lines += [
        "| target | from outside | inputs | loaded | refused | crash | silent | bound | slowest | memory |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in found["targets"].items():
        lines.append(
            f"| {name} | {row['title']} | {row['inputs']:,} | {row['loaded']:,} | {row['refused']:,} | "
            f"{row['crash']} | {row['silent']} | {row['slow'] + row['large']} | {row['slowest_seconds']:.2f} s | "
            f"{row['most_memory_bytes'] / 2**20:.0f} MiB |"
        )
    lines.append(
        f"| **all** | | **{total['inputs']:,}** | {total['loaded']:,} | {total['refused']:,} | **{total['crash']}** | "
        f"**{total['silent']}** | **{total['slow'] + total['large']}** | | |"
    )
    lines += ["", "What each target calls:", ""]
    lines += [f"- {name}: `{row['entry']}`" for name, row in found["targets"].items()]
    lines += ["", "Where the inputs come from:", ""]
    lines += [f"- {engines[engine]:,}: {what}" for engine, what in ENGINES.items() if engine in engines]
    lines += [
        "",
        *_NOTES,
        "",
        "Inputs that were once taken wrongly, or crashed, are kept in `tests/test_fuzz_cases.py`.",
        "",
    ]
    return "\n".join(lines)


_NOTES = (
    "*Memory* is what the process had at most beyond what it had before, over windows of 200 inputs, so that no input",
    "had more. Of the regular expressions that need a process of their own one in 50 is given it. The page's target",
    "reads and checks what a visitor sends and stops before the model; a deployment's stops before Ray.",
)


def _intro(found: Mapping[str, Any]) -> list[str]:
    total, bounds = found["total"], found["bounds"]
    return [
        f"{total['inputs']:,} inputs over {len(found['targets'])} targets, from `{found['command']}`",
        f"(seed {found['seed']}; Python {found['python']}, torch {found['torch']},",
        f"transformers {found['transformers']}).",
        "",
        "*Loaded*: it was taken, and what it became was compared with another reading of the same bytes (json, numpy,",
        "libyaml, Python's re): every field, every tensor bit for bit, every scaling; what is written is read again to",
        "the same. *Refused*: a typed `LoRAError` with a message; a model is then as before, bit for bit. *Crash*: any",
        "other exception; of a command, a traceback or the exit code 1. *Silent*: taken as something that it does not",
        f"say. *Bound*: an input that took over {bounds['seconds']:g} s, or over {bounds['bytes'] >> 20} MiB.",
    ]
