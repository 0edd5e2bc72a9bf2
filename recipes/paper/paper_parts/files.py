"""Published files of the tasks, rewritten as JSON lines with the Hub's column names, so that one recipe reads both.

A table row says where a split is and how a line becomes a row; nothing is filtered or changed.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SPLITS", "MissingDataError", "rewrite"]

Row = dict[str, Any]


class MissingDataError(SystemExit):
    """The folder lacks a file that a task needs."""


@dataclass(frozen=True)
class Split:
    """Files (joined, in order) and the function from their text to rows."""

    files: tuple[str, ...]
    rows: Callable[[str], Iterable[Row]]


def _labelled_lines(text: str) -> Iterator[Row]:
    """`label text`, a line each."""
    for line in text.splitlines():
        label, _, sentence = line.partition(" ")
        yield {"sentence": sentence.strip(), "label": int(label)}


def _table(
    columns: dict[str, int], *, header: bool, delimiter: str = "\t", classes: tuple[str, ...] = ()
) -> Callable[[str], Iterator[Row]]:
    """Delimited lines; a tab means that quotes are plain characters. `columns`: name -> position."""

    def rows(text: str) -> Iterator[Row]:
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
        for number, fields in enumerate(reader):
            if not fields or (header and number == 0):
                continue
            row: Row = {name: fields[at] for name, at in columns.items()}
            if "label" in row:
                label = row["label"]
                row["label"] = classes.index(label) if classes else float(label) if "." in label else int(label)
            yield row

    return rows


_COLA = _table({"label": 1, "sentence": 3}, header=False)
_MRPC = _table({"label": 0, "sentence1": 3, "sentence2": 4}, header=True)
_RTE = _table({"sentence1": 1, "sentence2": 2, "label": 3}, header=True, classes=("entailment", "not_entailment"))
_STSB = _table({"sentence1": 0, "sentence2": 1, "label": 2}, header=False, delimiter=",")
_E2E = _table({"meaning_representation": 0, "human_reference": 1}, header=True, delimiter=",")

# (task, split) -> where it is. MRPC has no development set of its own here: its test set is measured on.
SPLITS: dict[tuple[str, str], Split] = {
    ("sst2", "train"): Split(("sst2/stsa.binary.train",), _labelled_lines),
    ("sst2", "dev"): Split(("sst2/stsa.binary.dev",), _labelled_lines),
    ("cola", "train"): Split(("cola/in_domain_train.tsv",), _COLA),
    ("cola", "dev"): Split(("cola/in_domain_dev.tsv", "cola/out_of_domain_dev.tsv"), _COLA),
    ("mrpc", "train"): Split(("mrpc/msr_paraphrase_train.txt",), _MRPC),
    ("mrpc", "dev"): Split(("mrpc/msr_paraphrase_test.txt",), _MRPC),
    ("rte", "train"): Split(("rte/train.tsv",), _RTE),
    ("rte", "dev"): Split(("rte/dev.tsv",), _RTE),
    ("stsb", "train"): Split(("stsb/stsb-en-train.csv",), _STSB),
    ("stsb", "dev"): Split(("stsb/stsb-en-dev.csv",), _STSB),
    ("e2e", "train"): Split(("e2e/devset.csv",), _E2E),
    ("e2e", "dev"): Split(("e2e/testset_w_refs.csv",), _E2E),
}


def rewrite(task: str, data: Path, work: Path) -> None:
    """Write `work/task/train.jsonl` and `dev.jsonl` from the published files in `data`. Raises `MissingDataError`."""
    for (name, split), source in SPLITS.items():
        if name != task:
            continue
        files = [data / file for file in source.files]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise MissingDataError(f"{task}: {', '.join(missing)} not found. Give the folder of the data with --data.")
        rows = [row for file in files for row in source.rows(file.read_text(encoding="utf-8-sig"))]
        target = work / task / f"{split}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, target)
