"""How well a model answers: teacher-forced loss, ROUGE-L of greedy answers, and the paired error of a difference.

- loss: −log p(token | prompt, earlier tokens), averaged over the answer's tokens, then over the held-out examples.
- ROUGE-L: F-measure of the longest common subsequence of words × 100 (package rouge-score, no stemming; the best
  reference counts where there are several), averaged over the held-out examples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

from .data import IGNORED, Example, Prompter, first_line

__all__ = ["Difference", "Measured", "batches", "collate", "measure", "on_device", "paired_difference", "rouge_l"]

_Z = 1.959963985  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Measured:
    """One contestant on the held-out examples, one number an example; None where it has no such number."""

    name: str
    rouge: tuple[float, ...] | None = None
    loss: tuple[float, ...] | None = None
    texts: tuple[str, ...] | None = None
    note: str = ""

    def mean(self, metric: str) -> float | None:
        """Over the examples; None where there is none."""
        values = getattr(self, metric)
        return None if values is None else fmean(values)


@dataclass(frozen=True)
class Difference:
    """A mean paired difference and its 95 % error."""

    mean: float
    error: float

    @property
    def positive(self) -> bool:
        """Above zero by more than the error."""
        return self.mean > self.error


def paired_difference(ours: Sequence[float], theirs: Sequence[float], groups: Sequence[str]) -> Difference:
    """Mean of `ours - theirs` over examples ± 95 %, with whole groups as the independent units.

    Examples of one module resemble each other, so the error is the cluster-robust one: with d_i the differences, m
    their mean and G groups, se² = G/(G-1) · Σ_g (Σ_{i in g} (d_i - m))² / n²; the error is t(G-1) · se. With one
    example a group this is the usual paired t interval. With fewer than two groups it is infinite.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = fmean(differences)
    sums: dict[str, float] = {}
    for difference, group in zip(differences, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + difference - mean
    count = len(sums)
    if count < 2:
        return Difference(mean, math.inf)
    squared = math.fsum(total * total for total in sums.values()) / len(differences) ** 2
    return Difference(mean, _t975(count - 1) * math.sqrt(squared * count / (count - 1)))


def _t975(freedom: int) -> float:
    """Student's t, 97.5 % point, by Fisher's expansion of it in 1/freedom (within 1 % from 5 degrees of freedom on)."""
    z, f = _Z, freedom
    terms = (
        (z**3 + z) / (4 * f),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * f**3),
    )
    return z + sum(terms)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure × 100 of `text` against the reference that fits it best."""
    return 100.0 * max(float(_scorer().score(reference, text)["rougeL"].fmeasure) for reference in references)


def collate(features: Sequence[dict[str, list[int]]], pad: int) -> dict[str, Any]:
    """Left-padded tensors of shape (batch, longest), and labels and logits for the answer's end only.

    With the padding on the left every answer stands at the right edge, so the model computes the vocabulary's logits
    for the last `logits_to_keep` positions and `labels` has just those: a fifth of the work, most of the memory, saved.
    """
    import torch

    longest = max(len(f["input_ids"]) for f in features)
    learned = max(sum(label != IGNORED for label in f["labels"]) for f in features)
    kept = min(longest, learned + 1)  # the position before the first answer token predicts it
    rows = [(longest - len(f["input_ids"]), f) for f in features]
    labels = [[IGNORED] * gap + f["labels"] for gap, f in rows]
    return {
        "input_ids": torch.tensor([[pad] * gap + f["input_ids"] for gap, f in rows]),
        "attention_mask": torch.tensor([[0] * gap + [1] * len(f["input_ids"]) for gap, f in rows]),
        "labels": torch.tensor([row[longest - kept :] for row in labels]),
        "logits_to_keep": kept,
    }


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices sorted by length, in batches of at most `tokens` padded tokens: little padding, bounded memory."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and lengths[index] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def measure(
    model: Any,
    prompter: Prompter,
    examples: Sequence[Example],
    shots: Sequence[Example] = (),
    *,
    new_tokens: int,
    step: Callable[[int], None] = lambda count: None,
) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """The loss of every example and the greedy answer to it; `shots` are answered examples shown first.

    The prompts are read once, into a cache that both start from. The loss leaves the end token out: a model that was
    never taught to stop is not blamed for it. An answer is the first line that says something. `step` is told how many
    are done.
    """
    import torch

    prompts = [prompter.prompt(example, shots) for example in examples]
    losses, texts = [0.0] * len(examples), [""] * len(examples)
    for batch in batches([len(prompt) + new_tokens for prompt in prompts], 3072):
        with torch.inference_mode():
            read = _read(model, [prompts[i] for i in batch], prompter.tokenizer.pad_token_id)
            found = _losses(model, copy.deepcopy(read), [prompter.answer(examples[i]) for i in batch])
            written = _greedy(model, read, prompter.tokenizer, new_tokens)
        for index, loss, text in zip(batch, found, written, strict=True):
            losses[index], texts[index] = loss, first_line(text)
        step(len(batch))
    return tuple(losses), tuple(texts)


@dataclass
class _Reading:
    """A batch that was read so far: the keys and values, which positions count, the next token's logits."""

    cache: Any
    mask: Any  # (batch, length)
    logits: Any  # (batch, vocabulary)

    def read_on(self, model: Any, ids: Any, mask: Any) -> Any:
        """Read `ids` (batch, more) where `mask` is 1; returns the logits after each, (batch, more, vocabulary)."""
        import torch

        self.mask = torch.cat([self.mask, mask], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]
        return output.logits


def _read(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> _Reading:
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    return _Reading(output.past_key_values, mask, output.logits[:, -1])


def _losses(model: Any, read: _Reading, answers: Sequence[Sequence[int]]) -> list[float]:
    """Mean -log p over each answer's tokens."""
    import torch

    longest = max(map(len, answers))
    labels = torch.tensor([[*a, *[IGNORED] * (longest - len(a))] for a in answers], device=model.device)
    first = read.logits[:, None]
    known = labels != IGNORED
    rest = read.read_on(model, labels[:, :-1].clamp(min=0), known[:, :-1].long()) if longest > 1 else first[:, :0]
    logits = torch.cat([first, rest], 1).float()
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    found: list[float] = (each.sum(1) / known.sum(1)).tolist()
    return found


def _greedy(model: Any, read: _Reading, tokenizer: Any, new_tokens: int) -> list[str]:
    """The likeliest token, again and again, until every row has ended or written a line that says something."""
    import torch

    breaks, speaks = (table.to(model.device) for table in _token_tables(tokenizer))
    ended = torch.zeros(len(read.mask), dtype=torch.bool, device=model.device)
    spoken, written = ended.clone(), []
    for count in range(1, new_tokens + 1):
        token = read.logits.argmax(-1).masked_fill(ended, tokenizer.eos_token_id)
        written.append(token)
        spoken |= speaks[token]
        ended |= (token == tokenizer.eos_token_id) | (breaks[token] & spoken)
        if ended.all() or count == new_tokens:
            break
        read.read_on(model, token[:, None], torch.ones_like(token)[:, None])
    texts: list[str] = tokenizer.batch_decode(torch.stack(written, 1), skip_special_tokens=True)
    return texts


@cache
def _token_tables(tokenizer: Any) -> tuple[Any, Any]:
    """Per token: does it break the line; does it say something (a letter or a digit)."""
    import torch

    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    breaks = torch.tensor(["\n" in text for text in texts])
    speaks = torch.tensor([any(c.isalnum() for c in text) for text in texts])
    return breaks, speaks & ~breaks


def on_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    """The batch's tensors on `device`, its numbers as they are."""
    return {name: value if isinstance(value, int) else value.to(device) for name, value in batch.items()}
