"""Greedy answers to many prompts, what they have in common being read once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from hf_lora.quickstart.data import first_line
from hf_lora.quickstart.evaluate import batches

__all__ = ["answers"]

_TOKENS = 3072  # in a batch


def answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[str, ...]:
    """The likeliest token again and again, to the end of the first line that says something, or `new_tokens`."""
    common = _common(prompts)
    texts = [""] * len(prompts)
    with torch.inference_mode():
        shared = model(torch.tensor([common]), use_cache=True, logits_to_keep=1).past_key_values if common else None
        rest = [list(p)[len(common) :] for p in prompts]
        for batch in batches([len(ids) + new_tokens for ids in rest], _TOKENS):
            written = _greedy(model, tokenizer, shared, len(common), [rest[i] for i in batch], new_tokens)
            for index, text in zip(batch, written, strict=True):
                texts[index] = first_line(text)
    return tuple(texts)


def _common(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all begin with, less than the whole of any."""
    first, last = list(min(prompts)), list(max(prompts))  # in the order of words of a dictionary
    same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(same, min(map(len, prompts)) - 1)]


def _greedy(
    model: Any, tokenizer: Any, shared: Any, before: int, rows: Sequence[Sequence[int]], new_tokens: int
) -> list[str]:
    """Rows padded on the left, behind `before` tokens whose keys and values are in `shared`."""
    longest = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[1] * before + [0] * (longest - len(row)) + [1] * len(row) for row in rows])
    cache = copy.deepcopy(shared)
    if cache is not None:
        cache.batch_repeat_interleave(len(rows))
    found: list[list[int]] = [[] for _ in rows]
    ended = [False] * len(rows)
    for _ in range(new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        for row, token in enumerate(ids[:, 0].tolist()):
            if not ended[row]:
                found[row].append(token)
                said = tokenizer.decode(found[row], skip_special_tokens=True)
                ended[row] = token == tokenizer.eos_token_id or "\n" in said.lstrip()
        if all(ended):
            break
    return [tokenizer.decode(row, skip_special_tokens=True) for row in found]
