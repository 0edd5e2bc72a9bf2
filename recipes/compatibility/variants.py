"""Variants and initialisations × kinds of layer × what one does with an adapter, each cell from a run.

    python recipes/compatibility/variants.py [--write docs/pages] [--only REGEX] [--kind REGEX] [--check REGEX]

Each row on each kind of layer trains an adapter on the bytes of a text, on a model of two layers that has read some
text before, and holds every cell against PEFT or against W' written out in float64 from the file. A cell is "pass";
"formula": passed, against the formula alone, because PEFT cannot do it; "refused": hf_lora raised a typed error that
says why; "fail" or "error". Writes variants-matrix.md and variants-matrix.json. Needs hf_lora[test] (peft, accelerate).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import logging
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from variants_parts.checks import CHECKS, PeftCannot, said
from variants_parts.scenes import Scene
from variants_parts.table import KINDS, VARIANTS

Cell = dict[str, str]
NAME = "variants-matrix"
OUTCOMES = ("pass", "formula", "refused", "fail", "error")


def cell(scene: Scene, name: str) -> tuple[str, str]:
    """Run one cell: its outcome, and why where it is no pass."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            CHECKS[name].play(scene)
    except PeftCannot as error:
        return "formula", str(error)
    except CHECKS[name].refusals as error:
        return "refused", said(error)
    except AssertionError as error:
        return "fail", str(error).splitlines()[0]
    except Exception as error:  # noqa: BLE001  # what a user would see is the cell
        return "error", said(error)
    finally:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
    return "pass", ""


def cells(variant: str = "", kind: str = "", check: str = "") -> Iterator[Cell]:
    """Every cell whose row, column and check these regular expressions are found in."""
    for row in VARIANTS.values():
        for column in KINDS.values():
            if not (re.search(variant, row.name) and re.search(kind, column.name)):
                continue
            scene = Scene(row, column)
            for name in CHECKS:
                if re.search(check, name):
                    outcome, why = cell(scene, name)
                    yield {"variant": row.name, "kind": column.name, "check": name, "outcome": outcome, "why": why}
            scene.close()


# ---- the page --------------------------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    """The page, from what its JSON holds."""
    cells: list[Cell] = found["cells"]
    counts = Counter(cell["outcome"] for cell in cells)
    notes = list(dict.fromkeys(cell["why"] for cell in cells if cell["why"]))
    wrong = counts["fail"] + counts["error"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    passed, formula, refused = counts["pass"] + counts["formula"], counts["formula"], counts["refused"]
    head = (
        f"**{passed:,} of {len(cells):,} cells passed; {refused} are refused with a typed error that says why; "
        f"{wrong} failed.** {formula} of those that passed are of what PEFT cannot do: they were held against the "
        "float64 formula alone."
    )
    lines = [
        "# Variants: the matrix",
        "",
        head,
        "",
        *_ABOUT,
        "",
        f"Run on {found['date']}, CPU, {versions}:",
        "",
        "```text",
        "python recipes/compatibility/variants.py --write docs/pages",
        "```",
        "",
        "| check | compared with |",
        "|---|---|",
        *(f"| {name} | {found['checks'][name]} |" for name in found["checks"]),
    ]
    of = {(c["variant"], c["kind"], c["check"]): c for c in cells}
    for kind in dict.fromkeys(c["kind"] for c in cells):
        checks = [name for name in found["checks"] if any(k[1:] == (kind, name) for k in of)]
        lines += ["", f"## {kind}", "", f"{_about(kind)}", "", "| | " + " | ".join(checks) + " |"]
        lines.append("|---|" + "---|" * len(checks))
        for variant in dict.fromkeys(c["variant"] for c in cells):
            shown = [_shown(of.get((variant, kind, name)), notes) for name in checks]
            lines.append(f"| {variant} | " + " | ".join(shown) + " |")
    lines += ["", "## What was said", ""]
    lines += [f"{i}. `{note.replace('`', chr(39))}`" for i, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


_ABOUT = """\
Each row on each kind of layer is an adapter that was trained on text, on a model of two layers that has read a text
before.

- *pass*: equal to what stands beside the check, to 1e-5 of the largest logit, or bit by bit.
- *formula*: PEFT raises (the note quotes it), so that the formula in float64 alone is compared. Where PEFT should have
  trained, our own file is loaded.
- *refused*: a typed error of hf_lora, which the note quotes.""".splitlines()


def _about(kind: str) -> str:
    column = KINDS[kind]
    fields = "".join(f", {name}={value!r}" for name, value in column.fields.items())
    return f"A {column.family} model, target_modules={list(column.targets)!r}{fields}."


def _shown(found: Cell | None, notes: list[str]) -> str:
    if found is None:
        return ""
    return found["outcome"] + (f" [{notes.index(found['why']) + 1}](#what-was-said)" if found["why"] else "")


def gathered(run: Iterable[Cell]) -> dict[str, Any]:
    """The cells, with what they were made with."""
    import accelerate
    import peft
    import transformers

    return {
        "date": datetime.date.today().isoformat(),
        "versions": {m.__name__: re.sub(r"\+.*", "", m.__version__) for m in (transformers, torch, accelerate, peft)},
        "checks": {name: check.against for name, check in CHECKS.items()},
        "cells": list(run),
    }


def joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The cells of now in place of those before; ends the program if they were made with other versions."""
    if before["versions"] != now["versions"]:
        sys.exit(f"The other cells were run with {before['versions']}: run all of them again.")
    of = {(c["variant"], c["kind"], c["check"]): c for c in [*before["cells"], *now["cells"]]}
    order = [(variant, kind, check) for variant in VARIANTS for kind in KINDS for check in CHECKS]
    return {**now, "cells": [of[key] for key in order if key in of]}


def main() -> None:
    """Run all cells; print them, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", type=Path, help="the folder of the page and its JSON; of some cells, the others stay"
    )
    for name, of in (("only", "rows"), ("kind", "kinds of layer"), ("check", "checks")):
        parser.add_argument(f"--{name}", default="", metavar="REGEX", help=f"{of} whose name it is found in")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)

    def told() -> Iterator[Cell]:
        began = time.process_time()
        for one in cells(given.only, given.kind, given.check):
            print(f"{time.process_time() - began:6.2f} s", json.dumps(one, ensure_ascii=False), flush=True)
            yield one
            began = time.process_time()

    found = gathered(told())
    if given.write is not None:
        kept = given.write / f"{NAME}.json"
        if given.only or given.kind or given.check:
            found = joined(json.loads(kept.read_text(encoding="utf-8")), found)
        kept.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        kept.with_suffix(".md").write_text(page(found), encoding="utf-8")
    print(Counter(one["outcome"] for one in found["cells"]))
    if any(one["outcome"] in ("fail", "error") for one in found["cells"]):
        sys.exit("a cell did not pass")


if __name__ == "__main__":
    main()
