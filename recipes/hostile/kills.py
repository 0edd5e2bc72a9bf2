"""kill -9 at random places of save, checkpoint, merge to disk and push; then read what is there.

    python recipes/hostile/kills.py [--kills 1000] [--only WORD] [--seed 0] [--write docs/results/faults]

Each operation runs in a process that was forked where everything is imported, so that a kill costs a fraction of a
second. Every second kill comes before a step (a rename, a removal, an fsync, half of a write, a request on a
connection), which hits each step in turn; the others come after a random time, so that native code is hit, too. After
each kill the operation's files are read as a user reads them, and it is done again: nothing may be left over.
The page cache survives a kill, so this says nothing of a power cut; that each file is synced before its name changes
is tested by tests/test_store.py. Needs hf_lora[test], and a system with fork.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

from kill_parts.killing import counted, forked, killed_after, killed_at  # noqa: E402
from kill_parts.table import summary, table  # noqa: E402

OUTCOMES = ("old", "new", "refused")


def operations() -> dict[str, Any]:
    from kill_parts.hubs import Push
    from kill_parts.operations import Merge, Save
    from kill_parts.runs import Checkpoint, Rotated

    return {each.name: each for each in (Save, Checkpoint, Rotated, Merge, Push)}


def stage(make: Any, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill one operation so many times; what was found."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # else every collection in a forked process copies all of it
    operation, found = make(folder), {}
    if hasattr(operation, "at_the_save"):
        operation.at_the_save(lambda: found.update(many(operation, kills, seed)))
    else:
        found.update(many(operation, kills, seed))
    return found


def many(operation: Any, kills: int, seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    in_own = (lambda work: forked(work)[1]) if operation.reads_forked else (lambda work: work())

    def settle() -> None:
        if not operation.settles:
            return
        try:
            in_own(operation.settle)
        finally:
            operation.settled()

    steps, seconds = 0, 0.0
    for _ in range(4):  # scenes differ by a few steps
        operation.before(chance)
        counts, took = counted(operation.act)
        steps, seconds = max(steps, counts), max(seconds, took)
        settle()
    found: dict[str, Any] = dict.fromkeys((*OUTCOMES, "half-written", "lost", "half-read", "kills"), 0)
    found |= {"steps": steps, "seconds": round(seconds, 3), "problems": []}
    places = itertools.cycle(chance.sample(range(1, steps + 1), steps))
    hit = set()
    for attempt in range(20 * kills):
        if found["kills"] == kills:
            break
        scene, by_step = operation.before(chance), attempt % 2 == 0
        at, delay = next(places), chance.uniform(0, seconds)
        killed = killed_at(operation.act, at) if by_step else killed_after(operation.act, delay)
        if not killed:  # it had ended
            settle()
            continue
        hit |= {at} if by_step else set()
        found["kills"] += 1
        try:
            outcome, half = in_own(lambda: (operation.judge(), operation.half_written()))
            found[outcome] += 1
            found["half-written"] += half
            if not operation.chained or chance.random() < 0.5:
                settle()
        except AssertionError as error:
            place = f"before step {at} of {steps}" if by_step else f"after {delay:.4f} s"
            found["lost" if "lost" in str(error) else "half-read"] += 1
            found["problems"].append(f"killed {place}, over {scene}: {error}")
    return found | {"steps hit": len(hit)}


def run(kills: int, seed: int, only: Sequence[str] = ("",)) -> dict[str, Any]:
    """Every operation, its kills in turn; the table's numbers."""
    import huggingface_hub
    import torch
    import transformers
    import transformers.quantizers.auto

    import hf_lora
    from hf_lora.cli import app  # noqa: F401

    transformers.Trainer, transformers.LlamaForCausalLM  # noqa: B018  # imported once, before the forks
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = {name: make for name, make in operations().items() if any(word in name for word in only)}
    facts: dict[str, Any] = {
        "command": f"python recipes/hostile/kills.py --kills {kills} --seed {seed}",
        "date": datetime.date.today().isoformat(),
        "versions": {
            "hf_lora": hf_lora.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "huggingface_hub": huggingface_hub.__version__,
        },
        "operations": {},
    }
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        left = sum(make.share for make in chosen.values())
        for i, (name, make) in enumerate(chosen.items()):
            share = round(kills * make.share / left)
            kills, left = kills - share, left - make.share
            where = Path(folder) / str(i)
            _, facts["operations"][name] = forked(lambda: stage(make, where, share, seed), timeout=7200)  # noqa: B023
            print(f"{name}: {facts['operations'][name]}", file=sys.stderr, flush=True)
    facts["minutes"] = round((time.monotonic() - begun) / 60, 1)
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="operations with one in their name")
    parser.add_argument("--write", type=Path, metavar="PATH", help="PATH.json and PATH.md")
    given = parser.parse_args()
    facts = run(given.kills, given.seed, given.only)
    print(table(facts))
    if given.write:
        given.write.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        given.write.with_suffix(".md").write_text(table(facts), encoding="utf-8")
    return 1 if summary(facts)["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
