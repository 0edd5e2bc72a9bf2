"""What `import hf_lora` costs beyond `from transformers import PreTrainedModel`, in fresh interpreters.

    python recipes/benchmarks/import_time.py [--runs 11]

Each run starts Python once and times both imports in it, one after the other. Prints a table of medians, and fails if
the package pulled in what it must leave alone (Trainer, datasets, evaluate, gradio, peft).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

PROBE = """
import json, sys, time
start = time.perf_counter()
from transformers import PreTrainedModel
middle = time.perf_counter()
before = set(sys.modules)
import hf_lora
end = time.perf_counter()
untouched = ("transformers.trainer", "datasets", "evaluate", "gradio", "peft", "typer", "rich")
print(json.dumps([middle - start, end - middle, [m for m in untouched if m in sys.modules and m not in before]]))
"""
BASE, OURS = "from transformers import PreTrainedModel", "import hf_lora, after it"


def measure(runs: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of both imports in each run. Exits if hf_lora imported what it must leave alone.

    Args:
        warmup: runs that are not counted: the first one warms the disk cache.
    """
    times: dict[str, list[float]] = {BASE: [], OURS: []}
    for run in range(-warmup, runs):
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
        first, second, pulled = json.loads(done.stdout)
        if pulled:
            sys.exit(f"import hf_lora imported {', '.join(pulled)}")
        if run >= 0:
            times[BASE].append(first)
            times[OURS].append(second)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    print("| import | median s | min s | max s |\n|---|---|---|---|")
    for name, times in measure(parser.parse_args().runs).items():
        print(f"| `{name}` | {statistics.median(times):.3f} | {min(times):.3f} | {max(times):.3f} |")


if __name__ == "__main__":
    main()
