"""The command line of the training benchmarks, and what they write."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["arguments", "carry_out"]

OUT = Path("docs") / "benchmarks"


def arguments(description: str | None) -> argparse.Namespace:
    """What all of them take. Ends the program if peft or matplotlib is missing."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="of the timings")
    parser.add_argument("--shapes", help="rows and tokens of what is timed, such as 4x128,1x512")
    parser.add_argument("--dtypes", help="of what is timed: float32,bfloat16 is the default")
    parser.add_argument("--threads", type=int, default=1, help="torch's; default 1: CPU time is what is measured")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder; default {OUT}")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="what to say when it was")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs")
    options = parser.parse_args()
    missing = [name for name in ("peft", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} not installed: pip install 'hf_lora[bench]'")
    return options


def carry_out(
    name: str,
    options: argparse.Namespace,
    measures: Mapping[str, tuple[Callable[[Any], Any], bool]],
    titles: Mapping[str, str],
    full: Any = None,
) -> dict[str, Any]:
    """Measure each section, show it, and write NAME.json and NAME.md. Returns what the JSON holds.

    Args:
        measures: section -> what measures it, and whether it is a timing, which --shapes and --dtypes are about.
        full: the sizes of a run that is no smoke run; `steps.FULL` if none are given.
    """
    import torch
    from serving_parts import report

    from . import steps

    sizes = steps.SMOKE if options.smoke else full or steps.FULL
    if options.rounds:
        sizes = dataclasses.replace(sizes, rounds=options.rounds)
    timed = sizes
    if options.shapes:
        rows_and_tokens = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
        timed = dataclasses.replace(timed, shapes=tuple(rows_and_tokens))
    if options.dtypes:
        timed = dataclasses.replace(timed, dtypes=tuple(getattr(torch, name) for name in options.dtypes.split(",")))
    torch.set_num_threads(options.threads)
    machine, start, found = report.machine(), time.perf_counter(), {}
    for key, (measure, is_timing) in measures.items():
        began = time.perf_counter()
        found[key] = measure(timed if is_timing else sizes)
        report.show(key, found[key], time.perf_counter() - began, titles)
    facts = {
        "command": f"python recipes/benchmarks/{name}.py" + "".join(f" {a}" for a in sys.argv[1:]),
        "date": options.date,
        "seconds": round(time.perf_counter() - start),
        "smoke": options.smoke,
        "machine": machine,
    }
    data = report.as_json(found, facts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (options.out / f"{name}.md").write_text(report.as_markdown(data, titles), encoding="utf-8")
    print(f"Written to {options.out}.")
    return data
