"""How well the base, the trivial answers and the adapter do on what is held out, greedily and with paired errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_lora.quickstart import baselines
from hf_lora.quickstart.data import Example
from hf_lora.quickstart.evaluate import paired_difference, rouge_l
from hf_lora.recipe.schema import Data

from .tasks import Material, Row, Task

__all__ = ["Contestant", "Scores", "Writer", "error", "said", "score", "shots_of", "trivial"]

_Z = 1.959963985  # the normal distribution's 97.5 % point
_RESAMPLED = 10_000


@dataclass(frozen=True)
class Writer:
    """A recipe's rows as token ids, the way that the recipe trains on them.

    Answered examples that come first are earlier turns of a chat, or stand before it with an empty line between.
    """

    tokenizer: Any
    data: Data

    def prompt(self, example: Example, shots: Sequence[Example] = ()) -> list[int]:
        """Up to where the answer begins. `example.prompt` is the recipe's prompt, rendered."""
        if not self.data.chat:
            return self._ids("".join(f"{s.prompt}{self.completion(s)}\n\n" for s in shots) + example.prompt)
        turns = [] if self.data.system is None else [("system", self.data.system)]
        for shot in shots:
            turns += [("user", shot.prompt), ("assistant", self.completion(shot))]
        turns.append(("user", example.prompt))
        chat = [{"role": role, "content": content} for role, content in turns]
        return self._ids(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def answer(self, example: Example) -> list[int]:
        """What is to be written."""
        return self._ids(self.completion(example))

    def completion(self, example: Example) -> str:
        """The answer as the recipe's template has it: with the space before it, say."""
        template = self.data.template("completion")
        return template.render(dict.fromkeys(template.columns, example.target))

    def examples(self, rows: Sequence[Row], material: Material | None, task: Task) -> tuple[Example, ...]:
        """Rows as examples; of the held-out rows `material` has the references and groups."""
        template = self.data.template("prompt")
        found = []
        for index, row in enumerate(rows):
            target = row[task.answer]
            references, group, copied = ((target,), target if task.classes else row[task.column], "")
            if material is not None:
                references, group = material.references[index], material.groups[index]
                copied = material.copied[index]
            found.append(Example(template.render(row), target, references, group, copied))
        return tuple(found)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


@dataclass(frozen=True)
class Contestant:
    """Somebody's answers to the held-out examples."""

    name: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """A table: contestant → metric → value; how much better the adapter is than each, with the 95 % error."""

    metrics: tuple[str, ...]
    values: Mapping[str, Mapping[str, float]]
    better_by: Mapping[str, Mapping[str, tuple[float, float]]]


def shots_of(task: Task, writer: Writer, train: Sequence[Example]) -> tuple[Example, ...]:
    """Answered examples for the base: three short ones, or two of each class in turn."""
    if not task.classes:
        return baselines.short_shots(writer, train[:512])  # type: ignore[arg-type]
    of = {answer: [e for e in train[:64] if e.target == answer][:2] for answer in task.classes}
    return tuple(example for both in zip(*of.values(), strict=True) for example in both)


def trivial(task: Task, material: Material, train: Sequence[Example], held: Sequence[Example]) -> list[Contestant]:
    """The answers that need no model. Chosen on the training rows."""
    if task.classes:
        return [Contestant(f"always “{task.classes[0]}”", (task.classes[0],) * len(held))]
    constant = baselines.best_constant(train, held)
    texts = constant.texts or ()
    return [Contestant(f"one text for all: “{texts[0]}”", texts), Contestant(task.copying, material.copied)]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def score(task: Task, contestants: Sequence[Contestant], material: Material) -> Scores:
    """Every contestant's numbers; the last is the adapter, which the others are compared with."""
    metrics = {"ROUGE-L": ("ROUGE-L",), "accuracy": ("accuracy",)}.get(task.metric, (task.metric, "accuracy"))
    ours = contestants[-1]
    values: dict[str, dict[str, float]] = {}
    better: dict[str, dict[str, tuple[float, float]]] = {}
    for contestant in contestants:
        values[contestant.name] = {metric: _value(task, metric, contestant, material) for metric in metrics}
        if contestant is not ours:
            better[contestant.name] = {metric: _better(task, metric, ours, contestant, material) for metric in metrics}
    return Scores(metrics, values, better)


def _each(task: Task, metric: str, contestant: Contestant, material: Material) -> list[float]:
    """One number an example; of these the value is the mean."""
    pairs = zip(contestant.texts, material.references, strict=True)
    if metric == "ROUGE-L":
        return [rouge_l(text, references) for text, references in pairs]
    return [100.0 * (said(text, task.classes) == references[0]) for text, references in pairs]


def said(text: str, classes: Sequence[str]) -> str | None:
    """The class that an answer names as its first word; None for another answer, which counts as wrong."""
    word = text.split()[0].strip(".,;:!\"'").lower() if text.split() else ""
    return word if word in classes else None


def _value(task: Task, metric: str, contestant: Contestant, material: Material) -> float:
    if metric == "Matthews correlation":
        truth, found = _coded(task, contestant, material)
        return float(_matthews(np.bincount(2 * truth + found, minlength=4)))
    return float(np.mean(_each(task, metric, contestant, material)))


def _better(task: Task, metric: str, ours: Contestant, other: Contestant, material: Material) -> tuple[float, float]:
    if metric != "Matthews correlation":
        pair = [_each(task, metric, contestant, material) for contestant in (ours, other)]
        difference = paired_difference(pair[0], pair[1], material.groups)
        return difference.mean, difference.error
    (truth, mine), (_, theirs) = (_coded(task, contestant, material) for contestant in (ours, other))
    return error(truth, mine, theirs)


def error(truth: Any, mine: Any, theirs: Any) -> tuple[float, float]:
    """The difference of two Matthews correlations × 100, and 1.96 times its standard deviation over bootstrap samples.

    The examples are resampled together (both answers and the truth): a multinomial over the eight kinds of example.
    """
    kinds = np.bincount(4 * truth + 2 * mine + theirs, minlength=8)

    def difference(counts: Any) -> Any:
        cube = counts.reshape(*counts.shape[:-1], 2, 2, 2)
        return _matthews(cube.sum(-1).reshape(*counts.shape[:-1], 4)) - _matthews(
            cube.sum(-2).reshape(*counts.shape[:-1], 4)
        )

    samples = np.random.default_rng(0).multinomial(kinds.sum(), kinds / kinds.sum(), _RESAMPLED)
    return float(difference(kinds)), float(_Z * difference(samples).std(ddof=1))


def _coded(task: Task, contestant: Contestant, material: Material) -> tuple[Any, Any]:
    """0 for the commonest class, 1 for the other: the truth, and what was said. No answer counts as the commonest."""
    truth = np.array([task.classes.index(references[0]) for references in material.references])
    words = [said(text, task.classes) or task.classes[0] for text in contestant.texts]
    return truth, np.array([task.classes.index(word) for word in words])


def _matthews(counts: Any) -> Any:
    """φ × 100 of counts (truth, said) = 00, 01, 10, 11 along the last axis; 0 where one of the two is constant."""
    a, b, c, d = np.moveaxis(np.asarray(counts, dtype=float), -1, 0)
    below = np.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    return np.where(below > 0, 100 * (a * d - b * c) / np.where(below > 0, below, 1), 0.0)


def unanswered(task: Task, contestant: Contestant) -> int:
    """Answers that are none of the classes."""
    return sum(said(text, task.classes) is None for text in contestant.texts) if task.classes else 0
