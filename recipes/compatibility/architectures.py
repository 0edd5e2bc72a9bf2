"""Every architecture of transformers that a small config can build × what one does with an adapter.

    python recipes/compatibility/architectures.py [--write docs/pages] [--only REGEX] [--check REGEX] [--keep FILE]

Each model_type of transformers is built small, with random weights, and given inputs that its forward's arguments ask
for. An adapter is put on it by "all-linear", and another by the roles that the model has; each is trained, held against
PEFT's forward of the same file, loaded again, merged, unmerged and removed. A row costs one process at most: a crash or
a row that takes too long or too much memory is a row that says so. Rows are kept in FILE as they come, so that a run
that was cut short goes on. Writes architectures-matrix.md and .json. Needs hf_lora[test] (peft).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from architectures_parts.chain import COLUMNS
from architectures_parts.classes import model_types
from architectures_parts.pool import Pool, row, work

NAME = "architectures-matrix"
Row = dict[str, Any]


def main() -> None:
    """Run all rows; print them, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the folder of the page and its JSON; of some rows, the others stay")
    parser.add_argument("--keep", type=Path, help="a file of rows: those that it has are not run again")
    parser.add_argument("--only", default="", metavar="REGEX", help="model_types that it fits")
    parser.add_argument("--check", default="", metavar="REGEX", help="columns in which it is found")
    parser.add_argument("--here", action="store_true", help="in this process, with tracebacks")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # what the pool's process does
    given = parser.parse_args()
    if given.work:
        work()
        return
    columns = [name for name in COLUMNS if re.search(given.check, name)]
    wanted = [name for name in model_types() if not given.only or re.fullmatch(given.only, name)]
    kept: dict[str, Row] = {}
    if given.keep is not None and given.keep.exists():
        kept = {one["model_type"]: one for one in map(json.loads, given.keep.read_text("utf-8").splitlines())}
    run = (row(name, columns, tell=True) for name in wanted) if given.here else Pool(columns).rows(
        [name for name in wanted if name not in kept]
    )
    for one in run:
        print(json.dumps(one, ensure_ascii=False), flush=True)
        kept[one["model_type"]] = one
        if given.keep is not None:
            with given.keep.open("a", encoding="utf-8") as file:
                file.write(json.dumps(one, ensure_ascii=False) + "\n")
    print(Counter(one[c]["outcome"] if c in one else "not built" for one in kept.values() for c in columns))


if __name__ == "__main__":
    main()
