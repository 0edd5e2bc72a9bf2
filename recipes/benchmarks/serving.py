"""What serving many adapters costs: the base, hf_lora and PEFT side by side, in one process, each in its turn.

    python recipes/benchmarks/serving.py [--only rows,load] [--repeats 40] [--out docs/benchmarks]

Sections: rows (a batch with an adapter for each row), generate, load, growth (switch, load and decode with 1 to 1,000
adapters resident), merge, bytes, import, profile. Whatever is timed is first checked against another's output. Writes
serving.json (every sample), serving.md (the table) and serving.svg and .png to --out. Needs hf_lora[bench], the base
model of `hf-lora quickstart`, 10 GB of memory and no network.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

OUT = Path("docs") / "benchmarks"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="sections, with commas; `switch` is in growth")
    parser.add_argument("--repeats", type=int, help="rounds of the short timings; the longer ones in proportion")
    parser.add_argument("--out", type=Path, help=f"folder; default {OUT}, with --only nothing is written unless given")
    parser.add_argument("--threads", type=int, help="torch's threads; default: as many as torch takes")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="what to say when it was")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    missing = [name for name in ("peft", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} not installed: pip install 'hf_lora[bench]'")
    import torch
    from serving_parts import figure, generate, growth, importing, load, memory, merge, profile, report, rows
    from serving_parts.sizes import FULL, SMOKE

    measures = {
        "rows": rows.measure_rows,
        "generate": generate.measure_generate,
        "load": load.measure_load,
        "growth": growth.measure_growth,
        "merge": merge.measure_merge,
        "bytes": memory.measure_bytes,
        "import": importing.measure_import,
        "profile": profile.measure_profile,
    }
    wanted = [{"switch": "growth"}.get(key, key) for key in options.only.split(",")] if options.only else list(measures)
    if unknown := set(wanted) - measures.keys():
        sys.exit(f"No section {', '.join(sorted(unknown))}. Sections: {', '.join(measures)}, switch.")
    sizes = SMOKE if options.smoke else FULL
    if options.repeats:
        sizes = sizes.repeated(options.repeats)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    facts = {"command": "python recipes/benchmarks/serving.py" + "".join(f" {a}" for a in sys.argv[1:])}
    machine, start, sections = report.machine(), time.perf_counter(), {}
    for key in [key for key in measures if key in wanted]:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            sections[key] = measures[key](Path(folder), sizes)
        report.show(key, sections[key], time.perf_counter() - began)
    seconds = round(time.perf_counter() - start)
    data = report.as_json(
        sections, {**facts, "date": options.date, "seconds": seconds, "smoke": options.smoke, "machine": machine}
    )
    out = options.out or (None if options.only else OUT)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "serving.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (out / "serving.md").write_text(report.as_markdown(data), encoding="utf-8")
        figure.draw(data, out)
        print(f"Written to {out}.")


if __name__ == "__main__":
    main()
