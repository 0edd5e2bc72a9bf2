"""Fuzz everything that comes from outside: files, the Hub's answers, names, requests, a page's fields, arguments.

    python recipes/hostile/fuzz.py [--out docs/results] [--share 1.0] [--only NAME ...] [--seed 0] [--state FILE]

Plays more than 10⁶ inputs over the targets with fixed seeds, in one process, and writes hostile.md and hostile.json:
target × inputs × outcome. It ends with 1 if an input crashed, was taken for what it is not, or passed a bound. What is
done is noted in --state (default: hostile.state.jsonl beside the results); a run that was stopped goes on from there,
and --fresh begins anew. `--only config base` plays these targets, and keeps the rows of the others. `--share 0.01`
plays a hundredth of the inputs. `--replay TARGET HEX` plays one finding again.

Inputs are good files and calls that are changed (by structure, text and bytes), some by hypothesis, and some guided by
coverage where atheris is installed: `pip install atheris`, which has wheels for some Pythons alone, so that it is in
no extra. Needs hf_lora[test] and Linux for the bounds on memory; no network.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import faulthandler
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hostile_parts import engines, report, targets
from hostile_parts.core import OUTCOMES, Tally, Target, bound, seed_of

_CHUNK = 5_000
_HYPOTHESIS = 0.02  # of a target's inputs
_GUIDED = 40_000  # of all targets together


def plan(target: type[Target], share: float) -> Iterator[tuple[str, int, int]]:
    """(engine, number of the chunk, inputs) of one target."""
    inputs = max(int(target.inputs * share), 10)
    drawn = max(int(inputs * _HYPOTHESIS), 5)
    yield "hypothesis", 0, drawn
    left, number = inputs - drawn, 0
    while left > 0:
        yield "mutation", number, min(_CHUNK, left)
        left, number = left - _CHUNK, number + 1


class State:
    """What was played so far, a line for each chunk."""

    def __init__(self, path: Path, settings: dict[str, object], fresh: bool) -> None:
        self.path, self.done = path, {}
        first = {"settings": settings}
        lines = [] if fresh or not path.is_file() else path.read_text(encoding="utf-8").splitlines()
        if lines and json.loads(lines[0]) != first:
            sys.exit(f"{path} is of a run with other settings: {lines[0]}. Begin anew with --fresh.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not lines:
            path.write_text(json.dumps(first) + "\n", encoding="utf-8")
        for line in lines[1:]:
            found = json.loads(line)
            self.done[tuple(found["key"])] = Tally.from_dict(found["tally"])

    def add(self, key: tuple[str, str, int], tally: Tally) -> None:
        self.done[key] = tally
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "tally": tally.to_dict()}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=None)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "HEX"), default=None)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    every = targets()
    if options.replay:
        every[options.replay[0]]().check(bytes.fromhex(options.replay[1]))
        return
    bound()
    names = options.only or list(every)
    guided = engines.has_atheris()
    if not guided:
        print("atheris is not installed: no input is guided by coverage.")
    settings = {"seed": options.seed, "share": options.share, "names": names, "atheris": guided}
    state = State(options.state or options.out / "hostile.state.jsonl", settings, options.fresh)
    about: dict[str, dict[str, str]] = {}
    for name in names:
        make = every[name]
        target = make()
        about[name] = {"title": target.title, "entry": target.entry}
        for engine, number, count in plan(target, options.share):
            key = (name, engine, number)
            if key not in state.done:
                started = time.perf_counter()
                faulthandler.dump_traceback_later(1800, exit=True)  # what no signal can interrupt
                tally = getattr(engines, engine)(target, count, seed_of(options.seed, *key))
                faulthandler.cancel_dump_traceback_later()
                state.add(key, tally)
                _say(key, tally, time.perf_counter() - started)
        target.close()
    if guided:
        chosen = [name for name in names if getattr(every[name], "func", every[name]).guided]
        key = ("*", "atheris", 0)
        if not any(done[1] == "atheris" for done in state.done):
            count = max(int(_GUIDED * options.share * len(chosen) / max(len(every), 1)), 500)
            found = engines.guided(chosen, count, seed_of(options.seed, *key), Path(__file__).resolve())
            for name, tally in found.items():
                state.add((name, "atheris", 0), tally)
                _say((name, "atheris", 0), tally, tally.seconds)
    tallies: dict[str, dict[str, Tally]] = {name: {} for name in names}
    for (name, engine, _), tally in sorted(state.done.items()):
        tallies[name].setdefault(engine, Tally()).add(tally)
    total = report.write(options.out, tallies, about, options.seed, list(every))["total"]
    print(", ".join(f"{key} {value:,}" for key, value in total.items()))
    sys.exit(1 if any(total[outcome] for outcome in OUTCOMES[2:]) else 0)


def _say(key: tuple[str, str, int], tally: Tally, seconds: float) -> None:
    outcomes = ", ".join(f"{name} {tally.outcomes[name]:,}" for name in OUTCOMES if tally.outcomes[name])
    print(f"{key[0]} {key[1]} {key[2]}: {outcomes}; {seconds:.0f} s", flush=True)
    for finding in tally.findings:
        print(f"    {finding['outcome']} {finding['at']}: {finding['said'][:300]}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == f"--{engines.GUIDED}":
        engines.run_guided(sys.argv[2:])
    else:
        main()
