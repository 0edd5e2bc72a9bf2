"""NIST and CIDEr, from their definitions, over lists of tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

__all__ = ["cider", "nist", "ngrams"]

Tokens = Sequence[str]


def ngrams(tokens: Tokens, n: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def nist(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], *, order: int = 5) -> float:
    """NIST of a corpus: matching n-grams weighted by their information, times a penalty for what is too short.

    info(w1…wn) = log2(count(w1…wn-1) / count(w1…wn)) over all references; of each order the sum over the matched
    n-grams is divided by the candidates' n-grams; the orders are added. The penalty is exp(β log² min(1, c/r)), with c
    and r the lengths of candidates and (on average) references, β so that it is 1/2 at c/r = 2/3.
    (Doddington 2002, mteval-v13a.)
    """
    counts: Counter[tuple[str, ...]] = Counter()
    words = 0
    for refs in references:
        for reference in refs:
            words += len(reference)
            for n in range(1, order + 1):
                counts.update(ngrams(reference, n))
    score = 0.0
    for n in range(1, order + 1):
        gained, total = 0.0, 0
        for candidate, refs in zip(candidates, references, strict=True):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in refs:
                most |= ngrams(reference, n)
            ours = ngrams(candidate, n)
            total += sum(ours.values())
            for gram, count in (ours & most).items():
                before = counts[gram[:-1]] if n > 1 else words
                gained += count * math.log2(before / counts[gram])
        score += gained / total if total else 0.0
    length = sum(map(len, candidates))
    reference_length = sum(sum(map(len, refs)) / len(refs) for refs in references)
    if not length or not reference_length:
        return 0.0
    beta = math.log(0.5) / math.log(1.5) ** 2
    return score * math.exp(beta * math.log(min(1.0, length / reference_length)) ** 2)


def cider(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], *, order: int = 4, sigma: float = 6.0
) -> list[float]:
    """CIDEr-D of each candidate, × 10: the mean is the corpus' score.

    Each text is a vector of tf-idf weights, one for each n-gram; the idf counts in how many items' references an n-gram
    occurs. Similarity is Σ min(c, r)·r / (‖c‖ ‖r‖), times exp(-(l_c - l_r)² / 2σ²), averaged over references and the
    orders 1 to 4. (Vedantam et al. 2015; the clipped form of coco-caption, which the E2E challenge's scripts use.)
    """
    items = len(references)
    seen: Counter[tuple[str, ...]] = Counter()
    for refs in references:
        seen.update({gram for r in refs for n in range(1, order + 1) for gram in ngrams(r, n)})
    log_items = math.log(items) if items else 0.0

    def vectors(tokens: Tokens) -> list[dict[tuple[str, ...], float]]:
        return [
            {gram: tf * (log_items - math.log(max(1, seen[gram]))) for gram, tf in ngrams(tokens, n).items()}
            for n in range(1, order + 1)
        ]

    def length(tokens: Tokens) -> int:
        return max(0, len(tokens) - 1)  # coco-caption counts bigrams

    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        ours, total = vectors(candidate), 0.0
        for reference in refs:
            delta = length(candidate) - length(reference)
            for c, r in zip(ours, vectors(reference), strict=True):
                norm = math.sqrt(sum(v * v for v in c.values())) * math.sqrt(sum(v * v for v in r.values()))
                dot = sum(min(value, r[gram]) * r[gram] for gram, value in c.items() if gram in r)
                total += (dot / norm if norm else 0.0) * math.exp(-(delta**2) / (2 * sigma**2))
        scores.append(10.0 * total / order / max(1, len(refs)))
    return scores
