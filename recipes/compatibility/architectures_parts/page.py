"""The page, from the rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .chain import COLUMNS

__all__ = ["page"]

Row = Mapping[str, Any]

_ABOUT = """\
Each model_type is built with random weights and a small config, and given inputs that its forward's arguments ask for.
On the frozen model this chain runs twice, with `target_modules="all-linear"` and with every role that it has:

1. *add*: at step 0 the model computes what its base does, bit for bit.
2. *train*: two steps of AdamW. A layer whose B is still zero (no image of it was given, no token reached it) is filled
   with noise: nothing below may hold only because a factor is zero.
3. *PEFT*: the saved file, read by PEFT, gives the same outputs to 1e-5 of the largest value. Where PEFT does not read
   the file, or leaves layers of it out, W + s·BA written into the weights in float64 stands in its place, and the notes
   quote PEFT.
4. *load*: the file on another copy of the model.
5. *merge*: merged, the outputs are those of before; unmerged, every bit of the base is back.
6. *remove*: classes, state-dict keys, bits and outputs are the base's.
7. *from PEFT* (all-linear only): a file that PEFT made on its own choice of layers gives us PEFT's outputs.

A model with a top-k in it turns a last bit into another choice. Where float32 differs, both sides run in float64, and
have to agree to 1e-9; the notes say so. "4/6 layers" are those that training reached, and all that were adapted.

- *pass*: every step holds.
- *refused*: a typed error of hf_lora at that step, which the note quotes. A model without a Linear layer is refused by
  "all-linear", and a model in which no layer's role is known by roles: name its layers.""".splitlines()


def page(found: Mapping[str, Any]) -> str:
    """The page's text."""
    rows: Sequence[Row] = found["rows"]
    built = [row for row in rows if "class" in row]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    notes: dict[str, int] = {}
    table = list(_table(built, notes))
    lines = [
        "# Architectures: the matrix",
        "",
        f"**transformers {found['versions']['transformers']} has configs of {len(rows)} model_types. A small model of "
        f"{len(built)} of them was built and fed.** " + " ".join(_counted(built, column) for column in COLUMNS),
        "",
        *_ABOUT,
        "",
        f"Run on {found['date']}, CPU, {versions}:",
        "",
        "```text",
        "python recipes/compatibility/architectures.py --write docs/pages",
        "```",
        "",
        "`--only REGEX` runs some rows again, `--check REGEX` one of the columns, and `--keep FILE` lets a run that",
        "was cut short go on.",
        "",
        "## Built",
        "",
        "| model_type | class | all-linear | roles | notes |",
        "|---|---|---|---|---|",
        *table,
        "",
        "## Not built",
        "",
        f"{len(rows) - len(built)} model_types, by the reason: the first thing that was said when a small model was",
        "made or fed.",
        "",
        *_unbuilt(rows),
        "",
        "## What was said",
        "",
        *(f"{number}. {_code(note)}" for note, number in notes.items()),
    ]
    return "\n".join(lines) + "\n"


def _counted(built: Sequence[Row], column: str) -> str:
    of = Counter(row[column]["outcome"] for row in built)
    against = sum(row[column]["outcome"] == "pass" and "peft" in row[column] for row in built)
    wrong = of["fail"] + of["error"]
    return (
        f"By {column if column == 'roles' else 'all-linear'} {of['pass']} pass ({against} of them against the formula, "
        f"because PEFT does not compute it), {of['refused']} are refused with a typed error, {wrong} failed."
    )


def _table(built: Sequence[Row], notes: dict[str, int]) -> Iterator[str]:
    for row in built:
        said = list(dict.fromkeys(note for column in COLUMNS for note in _notes(row[column])))
        marks = " ".join(f"[{notes.setdefault(note, len(notes) + 1)}](#what-was-said)" for note in said)
        cells = " | ".join(_shown(row[column]) for column in COLUMNS)
        yield f"| {row['model_type']} | {row['class']} | {cells} | {marks} |"


def _shown(cell: Row) -> str:
    layers = f", {cell['trained']}/{cell['layers']} layers" if "layers" in cell else ""
    roles = f" ({' '.join(cell['roles'])})" if cell.get("roles") else ""
    if cell["outcome"] == "pass":
        return f"pass{roles}{layers}"
    return f"{cell['outcome']} ({cell['step']}){roles}"


def _notes(cell: Row) -> Iterator[str]:
    if "why" in cell:
        yield _same(cell["why"])
    for name, start in (
        ("peft", "PEFT: "),
        ("peft_all_linear", "PEFT's all-linear: "),
        ("from_peft", "PEFT's file: "),
        ("merge", "merged with untie=True: "),
    ):
        if name in cell:
            yield start + _same(cell[name])
    for role, why in cell.get("refused_roles", {}).items():
        yield f"role {role}: {_same(why)}"
    if "float64" in cell:
        yield "in float64: " + "; ".join(_same(said.partition(":")[0]) for said in cell["float64"])
    if "inputs_require_grad" in cell:
        yield "trained after enable_input_require_grads()"


def _same(note: str) -> str:
    """A note without what only numbers and paths make different."""
    note = re.sub(r"\b\d+(?:\.\d+)?e[+-]?\d+\b", "…", " ".join(note.split()))
    note = re.sub(r"(?<=\{)'[\w.', ]+'(?=\})", lambda m: ", ".join(sorted(m[0].split(", "))), note)
    return re.sub(r"(?<=\[)'[\w.', ]+'(?=\])", lambda m: ", ".join(sorted(m[0].split(", "))), note)


def _unbuilt(rows: Sequence[Row]) -> Iterator[str]:
    by: dict[str, list[str]] = {}
    for row in rows:
        if "class" not in row:
            why = re.sub(r"^\w+ \([\w, ]+\): ", "", row["not_built"])
            by.setdefault(why, []).append(row["model_type"])
    for why, names in sorted(by.items(), key=lambda item: (-len(item[1]), item[1])):
        yield f"- {', '.join(names)}: {_code(why)}"


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"
