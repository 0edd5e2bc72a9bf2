"""The E2E task's data: a restaurant's attributes in, a description out (Novikova et al., 2017).

Learns from devset.csv and is measured on testset_w_refs.csv, both of the published data set (columns `mr`, `ref`).
What is held out is the meaning representation: none of the measured ones occurs in the training file.
"""

from __future__ import annotations

import csv
import random
import re
from pathlib import Path

from .data import Example, TaskData
from .problems import DataError

__all__ = ["TEST_FILE", "TRAIN_FILE", "e2e_task", "read_rows"]

TRAIN_FILE = "devset.csv"
TEST_FILE = "testset_w_refs.csv"
_REMEDY = (
    f"Pass `--data FOLDER` with {TRAIN_FILE} and {TEST_FILE} of the E2E data set "
    "(https://github.com/tuetschek/e2e-dataset)."
)


def e2e_task(folder: Path | None, *, seed: int = 0, train: int = 640, heldout: int = 64) -> TaskData:
    """The task from a folder with the two files; `DataError` says what is wrong with it."""
    if folder is None:
        raise DataError("The task e2e reads its data from a folder.", name="--data", remedy=_REMEDY)
    learned, measured = read_rows(folder / TRAIN_FILE), read_rows(folder / TEST_FILE)
    unseen = [mr for mr in measured if mr not in learned]
    rng = random.Random(f"hf_lora e2e {seed}")
    pairs = [(mr, ref) for mr, refs in learned.items() for ref in refs]
    chosen = rng.sample(pairs, min(train, len(pairs)))
    held = rng.sample(unseen, min(heldout, len(unseen)))
    if len(chosen) < 2 or len(held) < 2:
        raise DataError(
            f"{folder} leaves {len(chosen)} examples to learn from and {len(held)} meaning representations to "
            "measure on.",
            name="--data",
            value=str(folder),
            expected="at least two of each, with no meaning representation in both files",
            remedy=_REMEDY,
        )
    return TaskData(
        name="e2e",
        title="restaurant descriptions (E2E)",
        question="Describe this place in one or two sentences.",
        unit="meaning representation",
        copying="the attributes' values",
        train=tuple(_example(mr, (ref,)) for mr, ref in chosen),
        heldout=tuple(_example(mr, measured[mr]) for mr in held),
        facts=(
            f"{len(pairs)} descriptions of {len(learned)} meaning representations in {TRAIN_FILE}",
            f"held out: {len(held)} meaning representations of {TEST_FILE}, none of them in {TRAIN_FILE}",
        ),
        prompt_tokens=96,
        answer_tokens=48,
    )


def read_rows(file: Path) -> dict[str, tuple[str, ...]]:
    """The references of each meaning representation, in the file's order."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if not {"mr", "ref"} <= set(reader.fieldnames or ()):
                raise DataError(
                    f"{file} has the columns {reader.fieldnames or []}, not `mr` and `ref`.",
                    name="--data",
                    value=reader.fieldnames,
                    expected=["mr", "ref"],
                    remedy=_REMEDY,
                )
            rows: dict[str, list[str]] = {}
            for number, row in enumerate(reader, start=2):
                if not row["mr"] or not row["ref"]:
                    raise DataError(
                        f"{file}, row {number}: a row needs both `mr` and `ref`, and this one is {dict(row)}.",
                        name="--data",
                        value=dict(row),
                        remedy=_REMEDY,
                    )
                rows.setdefault(row["mr"].strip(), []).append(" ".join(row["ref"].split()))
    except OSError as error:
        what = f"{file.parent} is not a folder" if not file.parent.is_dir() else f"{file} cannot be read"
        raise DataError(f"{what} ({error.strerror}).", name="--data", value=str(file.parent), remedy=_REMEDY) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is no CSV file: {error}.", name="--data", value=str(file), remedy=_REMEDY) from error
    return {mr: tuple(refs) for mr, refs in rows.items()}


def _example(mr: str, references: tuple[str, ...]) -> Example:
    values = re.findall(r"\[([^\]]*)\]", mr)
    return Example(prompt=mr, target=references[0], references=references, group=mr, copied=" ".join(values) or mr)
