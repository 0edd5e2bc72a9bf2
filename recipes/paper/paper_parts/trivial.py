"""What needs no model: the number that every system has to beat. All is chosen on the training examples."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from hf_lora.quickstart.baselines import best_constant, copied_words
from hf_lora.quickstart.data import Example

__all__ = ["trivial"]


def trivial(data: Any) -> dict[str, list[Any]]:
    """Predictions by baseline: the commonest class, overlapping words, a constant text, the attributes copied."""
    if data.task.kind == "class":
        (commonest, _), *_ = Counter(int(example["labels"]) for example in data.train).most_common()
        return {"commonest class": [commonest] * len(data.eval)}
    if data.task.kind == "score":
        mean = fmean(float(example["labels"]) for example in data.train)
        return {
            "mean score": [mean] * len(data.eval),
            "shared words": [_overlap(row) for row in data.eval_rows],
        }
    train, test = _examples(data)
    return {
        "best constant text": list(best_constant(train, test).texts or ()),
        "copied attributes": list(copied_words(train, test, "the attributes").texts or ()),
    }


def _overlap(row: Mapping[str, Any]) -> float:
    one, two = (set(re.findall(r"\w+", str(row[key]).lower())) for key in ("sentence1", "sentence2"))
    return 5 * len(one & two) / max(1, len(one | two))


def _examples(data: Any) -> tuple[list[Example], list[Example]]:
    def made(row: Mapping[str, Any], references: tuple[str, ...]) -> Example:
        text = row["meaning_representation"]
        copied = " ".join(re.findall(r"\[([^\]]*)\]", text)) or text
        return Example(prompt=text, target=references[0], references=references, group=text, copied=copied)

    rows = random.Random("paper trivial").sample(data.rows, min(len(data.train), len(data.rows)))
    train = [made(row, (row["human_reference"],)) for row in rows]
    test = [made(row, tuple(refs)) for row, refs in zip(data.eval_rows, data.references, strict=True)]
    return train, test
