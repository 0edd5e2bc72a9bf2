"""Few-shot prompting: a language model reads some answered examples, and nothing trains.

Classes and scores are read off the next token: the likeliest of the label words, or the mean of the digits 0 to 5 under
their probabilities. What the examples have in common is read once.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_lora.recipe.base import find
from hf_lora.recipe.schema import Base, Data, Source

__all__ = ["PROMPTS", "few_shot"]

# task -> (question with the row's columns, the answers that classes have)
PROMPTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "sst2": ("Review: {sentence}\nSentiment:", (" negative", " positive")),
    "cola": ("Sentence: {sentence}\nGrammatical:", (" no", " yes")),
    "mrpc": ("First: {sentence1}\nSecond: {sentence2}\nSame meaning:", (" no", " yes")),
    "qqp": ("First: {question1}\nSecond: {question2}\nSame question:", (" no", " yes")),
    "rte": ("Text: {sentence1}\nClaim: {sentence2}\nThe claim follows:", (" yes", " no")),
    "qnli": ("Question: {question}\nText: {sentence}\nThe text answers it:", (" yes", " no")),
    "mnli": ("Text: {premise}\nClaim: {hypothesis}\nThe claim follows:", (" yes", " maybe", " no")),
    "stsb": ("First: {sentence1}\nSecond: {sentence2}\nSimilarity from 0 to 5:", (" 0", " 1", " 2", " 3", " 4", " 5")),
    "e2e": ("Attributes: {meaning_representation}\nDescription:", ()),
}
_MODELS: dict[str, Any] = {}


def few_shot(
    data: Any,
    *,
    base: str,
    count: int,
    max_eval: int | None = None,
    rows: int = 16,
    seed: int = 0,
    generation: Mapping[str, Any],
    step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Predictions for the first `max_eval` examples after `count` answered ones, chosen by the seed."""
    began = time.perf_counter()
    if base not in _MODELS:
        plain = Data(train=Source(file="none.txt"), text="{text}")  # only tells the task: causal-lm
        found = find(Base(model=base, dtype="float32"), plain)
        _MODELS.clear()
        _MODELS[base] = (found.model(), found.tokenizer, found.pad)
    model, tokenizer, pad = _MODELS[base]
    question, words = PROMPTS[data.name]
    chosen = _balanced(data, count, seed)
    shown = "".join(f"{question.format(**row)}{_answer(data, row, words)}\n\n" for row in chosen)
    asked = [question.format(**row) for row in data.eval_rows[:max_eval]]
    with torch.inference_mode():
        start = tokenizer(shown, return_tensors="pt")["input_ids"]
        read = model(start, use_cache=True, logits_to_keep=1).past_key_values
        answers: list[Any] = [None] * len(asked)
        order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
        for at in range(0, len(order), rows):
            indices = order[at : at + rows]
            texts = [asked[i] for i in indices]
            found_answers = _ask(model, tokenizer, pad, read, start, texts, words, data, generation)
            for i, answer in zip(indices, found_answers, strict=True):
                answers[i] = answer
            step(min(at + rows, len(order)), len(order))
    total = sum(p.numel() for p in model.parameters())
    seconds = round(time.perf_counter() - began, 2)
    return {"trainable": 0, "head": 0, "total": total, "steps": 0, "predictions": answers, "seconds": seconds}


def _ask(
    model: Any,
    tokenizer: Any,
    pad: int,
    read: Any,
    start: Any,
    texts: list[str],
    words: Any,
    data: Any,
    generation: Any,
) -> list[Any]:
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    longest, seen = max(map(len, ids)), start.shape[1]
    cache = copy.deepcopy(read)
    cache.batch_repeat_interleave(len(ids))
    # Padding stands between the examples and the question, so that every question ends at the right edge.
    gaps = [longest - len(row) for row in ids]
    batch = torch.tensor([[pad] * gap + row for gap, row in zip(gaps, ids, strict=True)])
    mask = torch.tensor([[1] * seen + [0] * gap + [1] * len(row) for gap, row in zip(gaps, ids, strict=True)])
    if not words:
        whole = torch.cat([start.expand(len(ids), -1), batch], 1)
        written = model.generate(
            whole, attention_mask=mask, past_key_values=cache, pad_token_id=pad, **{**generation, "num_beams": 1}
        )
        texts = tokenizer.batch_decode(written[:, whole.shape[1] :], skip_special_tokens=True)
        return [next((line for line in text.splitlines() if line.strip()), "").strip() for text in texts]
    positions = (mask.cumsum(1) - 1)[:, seen:]
    logits = model(batch, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits[
        :, -1
    ]
    first = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    chances = logits[:, first].float().softmax(-1)
    if data.task.kind == "score":
        return (chances @ torch.arange(len(words), dtype=torch.float)).tolist()
    return chances.argmax(-1).tolist()


def _balanced(data: Any, count: int, seed: int) -> list[Mapping[str, Any]]:
    """Examples of each class in turn, short ones, in an order of the seed's."""
    rng = random.Random(f"paper few-shot {seed}")
    rows = sorted(data.rows, key=lambda row: sum(len(str(value)) for value in row.values()))
    rows = rows[len(rows) // 4 : len(rows) // 2]
    rng.shuffle(rows)
    if data.task.kind != "class":
        return rows[:count]
    by_class: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_class.setdefault(int(row["label"]), []).append(row)
    chosen = [group[k] for k in range(count) for _, group in sorted(by_class.items()) if k < len(group)][:count]
    rng.shuffle(chosen)
    return chosen


def _answer(data: Any, row: Mapping[str, Any], words: tuple[str, ...]) -> str:
    if not words:
        return f" {row['human_reference']}"
    return words[round(float(row["label"]))]
