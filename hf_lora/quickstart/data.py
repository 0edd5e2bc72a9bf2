"""What a task's data is: examples to learn from, held-out ones to measure on, and how one becomes token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Example", "Prompter", "TaskData", "first_line"]

IGNORED = -100  # the label of a token that is not learned: transformers' convention


@dataclass(frozen=True)
class Example:
    """One prompt and its answer.

    `references` are all the answers that count as right, `group` is the unit that was held out as a whole (a module, a
    meaning representation), `copied` is the answer that needs no model: the prompt's own words.
    """

    prompt: str
    target: str
    references: tuple[str, ...]
    group: str
    copied: str


@dataclass(frozen=True)
class TaskData:
    """A task: its examples, the question put to the model, and the words in which a report speaks about it.

    `prompt_tokens` is the budget that a prompt is cut to, `answer_tokens` the longest answer that is generated.
    """

    name: str
    title: str
    question: str
    unit: str
    copying: str
    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    facts: tuple[str, ...]
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Prompter:
    """Turns examples into token ids: the model's own chat format where its tokenizer has one, else plain text.

    The loss and the generated text are measured with the same ids, for the base and the adapter alike.
    """

    tokenizer: Any
    question: str
    budget: int

    def prompt(self, example: Example, shots: Sequence[Example] = ()) -> list[int]:
        """The ids up to where the answer begins; `shots` are answered examples that come first."""
        turns = [_turn("system", "")]  # empty: the template's own greeting would cost every prompt twenty tokens
        for shot in shots:
            turns += [_turn("user", self.asked(shot)), _turn("assistant", shot.target)]
        turns.append(_turn("user", self.asked(example)))
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        else:
            text = "\n\n".join(turn["content"] for turn in turns[1:]) + "\n\n"
        return self._ids(text)

    def answer(self, example: Example) -> list[int]:
        """The ids of the answer, without the end token."""
        return self._ids(example.target)

    def features(self, example: Example) -> dict[str, list[int]]:
        """A training example: prompt, answer, end token; only the last two are learned."""
        prompt, answer = self.prompt(example), [*self.answer(example), self.tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    def asked(self, example: Example) -> str:
        """What the user says: the prompt's text, cut to the budget, and the question."""
        ids = self._ids(example.prompt)
        text = example.prompt if len(ids) <= self.budget else self.tokenizer.decode(ids[: self.budget]) + " …"
        return f"{text}\n\n{self.question}"

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def first_line(text: str) -> str:
    """The first line that says something: what a generated text is judged by, whoever wrote it."""
    lines = (line.strip().strip("\"'`").strip() for line in text.splitlines())
    return next((line for line in lines if line), "")


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
