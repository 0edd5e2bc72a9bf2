"""How well a model answers: teacher-forced loss, ROUGE-L of greedy answers, and the paired error of a difference.

- loss: −log p(token | prompt, earlier tokens), averaged over the answer's tokens, then over the held-out examples.
- ROUGE-L: F-measure of the longest common subsequence of words × 100 (package rouge-score, no stemming; the best
  reference counts where there are several), averaged over the held-out examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

from .data import IGNORED, Example, Prompter, first_line

__all__ = [
    "Difference",
    "Measured",
    "answers",
    "batches",
    "collate",
    "losses",
    "on_device",
    "paired_difference",
    "rouge_l",
]

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


def paired_difference(better: Sequence[float], worse: Sequence[float], groups: Sequence[str]) -> Difference:
    """Mean of `better - worse` over examples ± 95 %, with whole groups as the independent units.

    Examples of one module resemble each other, so the error is the cluster-robust one: with d_i the differences, d̄ their
    mean and G groups, se² = G/(G-1) · Σ_g (Σ_{i in g} (d_i - d̄))² / n²; the error is t(G-1)·se. With one example a group
    this is the usual paired t interval. With fewer than two groups it is infinite.
    """
    differences = [b - w for b, w in zip(better, worse, strict=True)]
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

    With the padding on the left every answer stands at the right edge, so the model computes the vocabulary's logits for
    the last `logits_to_keep` positions and `labels` has just those: a fifth of the work, and most of the memory, saved.
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


Step = Callable[[int], None]  # told how many examples are done


def losses(
    model: Any,
    prompter: Prompter,
    examples: Sequence[Example],
    shots: Sequence[Example] = (),
    *,
    step: Step | None = None,
) -> tuple[float, ...]:
    """The loss of every example, without the end token: a model that was never taught to stop is not blamed for it."""
    import torch

    features = []
    for example in examples:
        prompt, answer = prompter.prompt(example, shots), prompter.answer(example)
        features.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    found = [0.0] * len(examples)
    for batch in batches([len(f["input_ids"]) for f in features], 2048):
        inputs = on_device(collate([features[i] for i in batch], prompter.tokenizer.pad_token_id), model.device)
        labels = inputs.pop("labels")[:, 1:]
        with torch.inference_mode():
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            each = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )
            mean = each.sum(1) / (labels != IGNORED).sum(1)
        for index, value in zip(batch, mean.tolist(), strict=True):
            found[index] = value
        if step:
            step(len(batch))
    return tuple(found)


def answers(
    model: Any,
    prompter: Prompter,
    examples: Sequence[Example],
    shots: Sequence[Example] = (),
    *,
    new_tokens: int,
    step: Step | None = None,
) -> tuple[str, ...]:
    """The greedy answer to every example: its first line that says something."""
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    tokenizer = prompter.tokenizer
    greedy = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    prompts = [{"input_ids": ids, "labels": ids} for ids in (prompter.prompt(e, shots) for e in examples)]
    found = [""] * len(examples)
    for batch in batches([len(p["input_ids"]) + new_tokens for p in prompts], 4096):
        inputs = on_device(collate([prompts[i] for i in batch], tokenizer.pad_token_id), model.device)
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        start = ids["input_ids"].shape[1]
        stop = StoppingCriteriaList([_LineWritten(tokenizer, start)])
        with torch.inference_mode():
            written = model.generate(**ids, generation_config=greedy, stopping_criteria=stop)[:, start:]
        for index, text in zip(batch, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            found[index] = first_line(text)
        if step:
            step(len(batch))
    return tuple(found)


class _LineWritten:
    """Stops a row once it has written a line that says something: the rest would not be read."""

    def __init__(self, tokenizer: Any, start: int) -> None:
        self.start = start
        self.breaks, self.speaks = _token_tables(tokenizer)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        new = input_ids[:, self.start :]
        spoken = self.speaks.to(new.device)[new].cumsum(1) > 0
        return (self.breaks.to(new.device)[new] & spoken).any(1)


@cache
def _token_tables(tokenizer: Any) -> tuple[Any, Any]:
    """Per token: does it break the line; does it say something (a letter or a digit)."""
    import torch

    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    breaks = torch.tensor(["\n" in text for text in texts])
    speaks = torch.tensor([any(c.isalnum() for c in text) for text in texts])
    return breaks, speaks & ~breaks


def on_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    return {name: value if isinstance(value, int) else value.to(device) for name, value in batch.items()}
