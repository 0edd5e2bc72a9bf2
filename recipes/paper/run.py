"""The paper's experiments (Hu et al. 2021), one command each.

    python recipes/paper/run.py table2                                      # RoBERTa-base and GLUE, from the Hub
    python recipes/paper/run.py table2 --profile local --data FOLDER        # MiniLM and the published files, no network
    python recipes/paper/run.py short --profile local --data FOLDER         # all experiments, one after the other
    python recipes/paper/run.py table2 --profile local --data FOLDER --method lora --task sst2 --seeds 1
    python recipes/paper/run.py --list

Runs are kept in OUT/runs.jsonl: one that is there is not run again, and a stopped sweep goes on. Each experiment writes
OUT/NAME.md, .json and, where there is a figure, .svg. Needs hf_lora[paper].
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FOLDER = Path(__file__).resolve().parent
OUT = Path("docs") / "results"
_NEEDED = ("accelerate", "evaluate", "sklearn", "scipy", "sacrebleu", "rouge_score", "peft", "matplotlib")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", help="a file of experiments/, or `short` for all of the profile's")
    parser.add_argument("--list", action="store_true", help="name experiments, methods and profiles")
    parser.add_argument("--profile", default="hub", help="hub, local, or a YAML file; default hub")
    parser.add_argument("--data", type=Path, help="the folder of the published files, for a local profile")
    parser.add_argument("--work", type=Path, help="where they are rewritten; default recipes/data/paper")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT}")
    parser.add_argument("--runs", type=Path, help="the file of the runs; default OUT/runs.jsonl")
    parser.add_argument("--method", action="append", help="only this system; may be repeated")
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument("--seeds", type=int, help="at most so many seeds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="training.max_steps=3, …")
    parser.add_argument("--report", action="store_true", help="run nothing: write what the records hold")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} not installed: pip install 'hf_lora[paper]'")
    from paper_parts import studies
    from paper_parts.methods import METHODS
    from paper_parts.sweep import Records
    from paper_parts.tasks import Profile

    from hf_lora.recipe.document import parse_value
    from hf_lora.recipe.document import read as read_yaml

    experiments = sorted(path.stem for path in (FOLDER / "experiments").glob("*.yaml"))
    if options.list or options.experiment is None:
        print("experiments:", ", ".join(experiments))
        print("methods:    ", ", ".join(METHODS))
        print("profiles:   ", ", ".join(sorted(path.stem for path in (FOLDER / "profiles").glob("*.yaml"))))
        return
    changes: dict[str, Any] = {}
    for said in options.set:
        keys, _, value = said.partition("=")
        section = changes
        *outer, last = keys.split(".")
        for key in outer:
            section = section.setdefault(key, {})
        section[last] = parse_value(value, said)
    given = {} if options.work is None else {"work": options.work.resolve()}
    profile = Profile.read(options.profile, data=options.data, changes=changes, **given)
    wanted = list(profile.get("short", experiments)) if options.experiment == "short" else [options.experiment]
    for name in wanted:
        if name not in experiments:
            sys.exit(f"No experiment {name!r}. There are: {', '.join(experiments)}.")
    records = Records(options.runs or options.out / "runs.jsonl")
    chosen = {
        "methods": set(options.method) if options.method else None,
        "tasks": set(options.task) if options.task else None,
        "seeds": options.seeds,
    }
    command = shlex.join(["python", "recipes/paper/run.py", *_public(argv if argv is not None else sys.argv[1:])])
    for name in wanted:
        began = time.perf_counter()
        content = read_yaml(FOLDER / "experiments" / f"{name}.yaml").content
        studies.carry_out(
            name, content, profile, records, options.out, command=command, run=not options.report, **chosen
        )
        print(f"{name}: {time.perf_counter() - began:.0f} s, written to {options.out / name}.md")


def _public(argv: list[str]) -> list[str]:
    """The command as somebody else would type it: without the folders of this machine."""
    hidden = {"--data": "FOLDER", "--work": None, "--runs": None, "--out": None}
    words: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
            continue
        if words and words[-1] == "--profile":
            word = Path(word).name
        if word == "--report":
            continue
        name, equals, _ = word.partition("=")
        if name in hidden:
            skip = not equals
            if hidden[name]:
                words += [name, hidden[name]]
            continue
        words.append(word)
    return words


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
