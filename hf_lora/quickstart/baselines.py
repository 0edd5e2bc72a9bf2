"""What needs no training: the numbers that a trained adapter has to beat.

Everything is chosen on the training examples only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .data import Example, Prompter
from .evaluate import Measured, rouge_l

__all__ = ["best_constant", "copied_words", "short_shots", "token_frequency_losses"]

_PREFIXES = ("", "Return", "Return the", "Return a", "The", "There is a")
_WORDS = 2500  # of training answers that a candidate constant is judged by: enough to rank them, in seconds


def best_constant(train: Sequence[Example], heldout: Sequence[Example]) -> Measured:
    """One string for everything: the training answer with the best mean ROUGE-L, then improved word by word.

    The climb adds, drops and replaces words while that helps on the training answers. The result is often gibberish,
    but it is the strongest constant we know, and stronger than any real answer.
    """
    words = [_words(e.target) for e in train]
    judges = [_Judge.of(answer) for answer in words[: max(1, _WORDS * len(words) // sum(map(len, words)))]]
    common = [word for word, _ in Counter(word for answer in words for word in answer).most_common(20)]
    best = max(words, key=lambda candidate: _mean_f(candidate, judges))
    score = _mean_f(best, judges)
    while True:
        candidate = max(_neighbours(best, common), key=lambda c: _mean_f(c, judges))
        if (reached := _mean_f(candidate, judges)) <= score:
            break
        best, score = candidate, reached
    text = " ".join(best)
    rouge = tuple(rouge_l(text, e.references) for e in heldout)
    return Measured("best constant", rouge=rouge, texts=(text,) * len(heldout), note=f"“{text}”")


def copied_words(train: Sequence[Example], heldout: Sequence[Example], what: str) -> Measured:
    """The prompt's own words behind the opening that suits the training answers best."""

    def text(prefix: str, example: Example) -> str:
        return f"{prefix} {example.copied}".strip()

    judges = train[:256]
    prefix = max(_PREFIXES, key=lambda p: sum(rouge_l(text(p, e), e.references) for e in judges))
    texts = tuple(text(prefix, e) for e in heldout)
    rouge = tuple(rouge_l(t, e.references) for t, e in zip(texts, heldout, strict=True))
    return Measured("copied words", rouge=rouge, texts=texts, note=f"“{prefix} …” and {what}" if prefix else what)


def token_frequency_losses(
    prompter: Prompter, train: Sequence[Example], heldout: Sequence[Example]
) -> tuple[float, ...]:
    """The loss of always predicting the training answers' token frequencies (Witten-Bell smoothed): no prompt is read.

    p(t) = c(t)/(N+T) for a token seen c(t) times, T/((N+T)(V-T)) for an unseen one; N tokens, T distinct, vocabulary V.
    """
    counts = Counter(token for e in train for token in prompter.answer(e))
    total, distinct, vocabulary = counts.total(), len(counts), len(prompter.tokenizer)
    unseen = distinct / ((total + distinct) * max(1, vocabulary - distinct))

    def loss(token: int) -> float:
        return -math.log(counts[token] / (total + distinct) if token in counts else unseen)

    return tuple(math.fsum(map(loss, ids)) / len(ids) for ids in map(prompter.answer, heldout))


def short_shots(prompter: Prompter, train: Sequence[Example], count: int = 3) -> tuple[Example, ...]:
    """Examples to show before the question: short ones of different groups, so that they cost little and fit whole."""
    lengths = {e: len(prompter.prompt(e)) for e in train}
    shortest = sorted(lengths.values())[len(lengths) // 4]
    chosen: dict[str, Example] = {}
    for example in train:  # already in random order
        if len(chosen) < count and lengths[example] <= shortest and example.group not in chosen:
            chosen[example.group] = example
    return tuple(chosen.values())


def _words(text: str) -> list[str]:
    from rouge_score.tokenizers import DefaultTokenizer

    words: list[str] = DefaultTokenizer(False).tokenize(text)
    return words


@dataclass(frozen=True)
class _Judge:
    """An answer that candidates are compared with: its length, and for each word the positions as bits."""

    length: int
    where: dict[str, int]

    @classmethod
    def of(cls, words: Sequence[str]) -> _Judge:
        where: dict[str, int] = {}
        for position, word in enumerate(words):
            where[word] = where.get(word, 0) | 1 << position
        return cls(len(words), where)


def _mean_f(candidate: Sequence[str], judges: Sequence[_Judge]) -> float:
    """Mean ROUGE-L F-measure (0..1): 2·LCS/(|a|+|b|), the same number as rouge-score's, fast enough to search with."""
    total = sum(2 * _lcs(candidate, judge) / max(1, len(candidate) + judge.length) for judge in judges)
    return total / len(judges)


def _lcs(words: Sequence[str], judge: _Judge) -> int:
    """Length of the longest common subsequence, by Hyyrö's bit-parallel recurrence: an integer holds a table's row."""
    row = mask = (1 << judge.length) - 1
    for word in words:
        matched = row & judge.where.get(word, 0)
        row = ((row + matched) | (row - matched)) & mask
    return judge.length - row.bit_count()


def _neighbours(words: list[str], common: Sequence[str]) -> list[list[str]]:
    added = [[*words[:i], word, *words[i:]] for i in range(len(words) + 1) for word in common]
    replaced = [[*words[:i], word, *words[i + 1 :]] for i in range(len(words)) for word in common]
    dropped = [words[:i] + words[i + 1 :] for i in range(len(words))] if len(words) > 1 else []
    return added + replaced + dropped
