"""Every architecture of transformers that a small config can build × what one does with an adapter.

    python recipes/compatibility/architectures.py [--write docs/pages] [--only REGEX] [--check REGEX] [--keep FILE]

Each model_type of transformers is built small, with random weights, and given inputs that its forward's arguments ask
for. An adapter is put on it by "all-linear", and another by the roles that the model has; each is trained, held against
PEFT's forward of the same file, loaded again, merged, unmerged and removed. Rows are made in a process of their own: a
crash, a hang or a lack of memory is one row that says so. Rows are kept in FILE as they come, so that a run that
was cut short goes on. Writes architectures-matrix.md and .json. Needs hf_lora[test] (peft).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from architectures_parts.chain import COLUMNS
from architectures_parts.classes import model_types
from architectures_parts.page import page
from architectures_parts.pool import Pool, row, work

NAME = "architectures-matrix"
Row = dict[str, Any]


def versions() -> dict[str, str]:
    """What the rows are made with."""
    import peft
    import torch
    import transformers

    return {m.__name__: re.sub(r"\+.*", "", m.__version__) for m in (transformers, torch, peft)}


def written(found: dict[str, Any]) -> str:
    """The JSON, a line for each row."""
    rows = ",\n".join(f"  {json.dumps(one, ensure_ascii=False)}" for one in found["rows"])
    head = json.dumps({k: v for k, v in found.items() if k != "rows"}, ensure_ascii=False)
    return f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'


def _read(file: Path) -> Iterable[Row]:
    return map(json.loads, file.read_text(encoding="utf-8").splitlines())


def main() -> None:
    """Run all rows; print them, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the folder of the page and its JSON; of some rows, the others stay")
    parser.add_argument("--keep", type=Path, help="a file of rows: those that it has are not run again")
    parser.add_argument("--only", default="", metavar="REGEX", help="model_types that it fits")
    parser.add_argument("--check", default="", metavar="REGEX", help="columns in which it is found")
    parser.add_argument("--here", action="store_true", help="in this process, and say what each try to build said")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # what the pool's process does
    given = parser.parse_args()
    if given.work:
        work()
        return
    columns = [name for name in COLUMNS if re.search(given.check, name)]
    if given.write is not None and columns != list(COLUMNS):
        sys.exit("A page needs both columns: leave --check out.")
    order = model_types()
    wanted = [name for name in order if not given.only or re.fullmatch(given.only, name)]
    kept: dict[str, Row] = {}
    target = None if given.write is None else given.write / f"{NAME}.json"
    if given.only and target is not None and target.exists():
        before = json.loads(target.read_text(encoding="utf-8"))
        if before["versions"] != versions():
            sys.exit(f"The other rows were run with {before['versions']}: run all of them again.")
        kept = {one["model_type"]: one for one in before["rows"]}
    done: dict[str, Row] = {}
    if given.keep is not None and given.keep.exists():
        done = {one["model_type"]: one for one in _read(given.keep)}
    left = [name for name in wanted if name not in done]
    for one in (row(n, columns, tell=True) for n in left) if given.here else Pool(columns).rows(left):
        print(json.dumps(one, ensure_ascii=False), flush=True)
        done[one["model_type"]] = one
        if given.keep is not None:
            with given.keep.open("a", encoding="utf-8") as file:
                file.write(json.dumps(one, ensure_ascii=False) + "\n")
    kept |= {name: one for name, one in done.items() if name in wanted}
    rows = [kept[name] for name in order if name in kept]
    print(Counter(one[c]["outcome"] if c in one else "not built" for one in rows for c in columns))
    if target is not None:
        found = {"date": datetime.date.today().isoformat(), "versions": versions(), "rows": rows}
        target.write_text(written(found), encoding="utf-8")
        target.with_suffix(".md").write_text(page(found), encoding="utf-8")
    if any(one.get(c, {}).get("outcome") in ("fail", "error") for one in rows for c in columns):
        sys.exit("a cell did not pass")


if __name__ == "__main__":
    main()
