"""What a step of LoRA costs: the limit, full fine-tuning, hf_lora and PEFT side by side, each in its turn.

    python recipes/benchmarks/training.py [--rounds 6] [--shapes 4x128] [--dtypes float32] [--threads 1]

The limit is the frozen base's forward and the gradient of each layer's input. Sections: time, parts (of hf_lora's step,
from torch's profiler), saved (bytes kept for the backward). Gradients are compared before anything is timed. Writes
training.json (every sample), training.md and training.svg and .png to --out. Needs hf_lora[bench], the base model of
`hf-lora quickstart`, 10 GB of memory and no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

OUT = Path("docs") / "benchmarks"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="of the timings")
    parser.add_argument("--shapes", help="rows and tokens of what is timed: 4x128,1x512 is the default")
    parser.add_argument("--dtypes", help="of what is timed: float32,bfloat16 is the default")
    parser.add_argument("--threads", type=int, default=1, help="torch's; default 1: CPU time is what is measured")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder; default {OUT}")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="what to say when it was")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    missing = [name for name in ("peft", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} not installed: pip install 'hf_lora[bench]'")
    import torch
    from serving_parts import report
    from training_parts import figure, sections, steps

    sizes = steps.SMOKE if options.smoke else steps.FULL
    if options.rounds:
        sizes = dataclasses.replace(sizes, rounds=options.rounds)
    timed = sizes
    if options.shapes:
        rows_and_tokens = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
        timed = dataclasses.replace(timed, shapes=tuple(rows_and_tokens))
    if options.dtypes:
        timed = dataclasses.replace(timed, dtypes=tuple(getattr(torch, name) for name in options.dtypes.split(",")))
    torch.set_num_threads(options.threads)
    measures = {
        "time": (sections.measure_time, timed),
        "parts": (sections.measure_parts, timed),
        "saved": (sections.measure_saved, sizes),
    }
    machine, start, found = report.machine(), time.perf_counter(), {}
    for key, (measure, sizes_of) in measures.items():
        began = time.perf_counter()
        found[key] = measure(sizes_of)
        report.show(key, found[key], time.perf_counter() - began, sections.TITLES)
    facts = {
        "command": "python recipes/benchmarks/training.py" + "".join(f" {a}" for a in sys.argv[1:]),
        "date": options.date,
        "seconds": round(time.perf_counter() - start),
        "smoke": options.smoke,
        "machine": machine,
    }
    data = report.as_json(found, facts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "training.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (options.out / "training.md").write_text(report.as_markdown(data, sections.TITLES), encoding="utf-8")
    figure.draw(data, options.out)
    print(f"Written to {options.out}.")


if __name__ == "__main__":
    main()
