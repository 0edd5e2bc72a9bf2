"""A base, its tokenizer and a pool: rows of different adapters in one `generate`. Knows nothing of Ray."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRAConfigError, LoRAError, LoRAUnsupportedError
from ..pool import LoRAPool
from .answers import Completion
from .requests import Ask
from .settings import Base, Settings

__all__ = ["Engine", "Row", "cut", "groups", "keep_head_fast", "left_padded"]


@dataclass(frozen=True)
class Row:
    """A request in tokens."""

    ids: tuple[int, ...]
    adapter: str | None
    max_tokens: int


class Engine:
    """Completes prompts, greedily, each with its own adapter."""

    def __init__(self, settings: Settings) -> None:
        model, self.tokenizer = _load(settings.base)
        self.model, self.settings = model.eval(), settings
        keep_head_fast(model)
        config = model.config
        if config.is_encoder_decoder:
            raise LoRAUnsupportedError(
                f"The base is an encoder-decoder model ({config.model_type}); prompts are completed by decoders alone.",
                name="base",
                value=config.model_type,
                remedy="Serve a causal language model.",
            )
        self.context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        eos = model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        self.eos = frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)
        pad = self.tokenizer.pad_token_id
        self.pad: int = pad if pad is not None else min(self.eos, default=0)
        self.pool = LoRAPool(
            model,
            source=settings.source,
            device_slots=settings.device_slots,
            host_slots=settings.host_slots,
            **settings.pool_options,
        )
        self.batches = self.rows = self.mixed = 0
        self._one = threading.Lock()  # two batches at once would only take each other's time and memory

    def encode(self, ask: Ask) -> Row:
        """The prompt in tokens.

        Raises:
            LoRAConfigError: it has none, or too many.
        """
        ids = tuple(self.tokenizer(ask.prompt)["input_ids"])
        most = [self.settings.max_prompt_tokens, None if self.context is None else self.context - ask.max_tokens]
        limit = min((number for number in most if number is not None), default=None)
        if not ids or (limit is not None and len(ids) > limit):
            raise LoRAConfigError(
                f"The prompt has {len(ids)} tokens.",
                name="prompt",
                value=len(ids),
                expected="at least 1" if not ids else f"at most {limit}",
                remedy="Shorten the prompt, or ask for fewer max_tokens." if ids else "Give a prompt.",
            )
        return Row(ids, ask.adapter, ask.max_tokens)

    def complete(self, rows: Sequence[Row]) -> list[Completion | LoRAError]:
        """One `generate` for all rows (more, if they name more adapters than there are device slots).

        A row whose adapter cannot be used gets the error; the others are computed.
        """
        answers: dict[int, Completion | LoRAError] = {}
        with self._one:
            for group in groups([row.adapter for row in rows], self.settings.device_slots):
                adapters = [rows[i].adapter for i in group]
                try:
                    lease = self.pool.acquire([name for name in adapters if name is not None], strict=False)
                except LoRAError as error:
                    answers |= dict.fromkeys(group, error)
                    continue
                with lease:
                    failed = {i: lease.failures.get(rows[i].adapter or "") for i in group}
                    answers |= {i: error for i, error in failed.items() if error is not None}
                    kept = [i for i in group if i not in answers]
                    if kept:
                        with lease.route([rows[i].adapter for i in kept]):
                            answers |= zip(kept, self._generate([rows[i] for i in kept]), strict=True)
        return [answers[i] for i in range(len(rows))]

    def _generate(self, rows: Sequence[Row]) -> list[Completion]:
        ids, mask = left_padded([row.ids for row in rows], self.pad, self.model.device)  # (rows, length)
        length, limits = ids.shape[1], torch.tensor([row.max_tokens for row in rows], device=ids.device)

        def finished(so_far: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return so_far.shape[1] - length >= limits  # (rows,): a short row does not wait for the longest

        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(row.max_tokens for row in rows),
                stopping_criteria=[finished],
                do_sample=False,
                num_beams=1,
                pad_token_id=self.pad,
            )
        adapters = len({row.adapter for row in rows})
        self.batches, self.rows, self.mixed = self.batches + 1, self.rows + len(rows), self.mixed + (adapters > 1)
        answers = []
        for row, new in zip(rows, out[:, length:].tolist(), strict=True):
            kept, reason = cut(new, row.max_tokens, self.eos)
            text = self.tokenizer.decode(kept, skip_special_tokens=True)
            answers.append(Completion(text, reason, len(row.ids), len(kept), len(rows), adapters))
        return answers

    def close(self) -> None:
        """Close the pool, once no batch runs."""
        with self._one:
            self.pool.close()


def keep_head_fast(model: Any) -> None:
    """Give the head what it multiplies in one piece.

    A prefill takes each row's last position, which is a strided view. With a frozen weight torch multiplies such a view
    row by row: for 32 rows and 49,152 tokens 11 times slower in float32 on a CPU, 400 times in bfloat16.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(), *inputs[1:]) if inputs else None)


def cut(new: Sequence[int], max_tokens: int, eos: frozenset[int]) -> tuple[list[int], str]:
    """What of a row's new tokens is its answer, and why it ends there: to the first of `eos`, or to `max_tokens`."""
    kept = list(new[:max_tokens])
    for i, token in enumerate(kept):
        if token in eos:
            return kept[: i + 1], "stop"
    return kept, "length"


def groups(adapters: Sequence[str | None], slots: int) -> list[list[int]]:
    """The rows of a batch in groups, each of at most `slots` adapters. Rows of the base alone go with the first."""
    names: list[set[str]] = [set()]
    found: list[list[int]] = [[]]
    for i, adapter in enumerate(adapters):
        own = set() if adapter is None else {adapter}
        at = next((at for at, held in enumerate(names) if len(held | own) <= slots), len(names))
        if at == len(names):
            names.append(set())
            found.append([])
        names[at] |= own
        found[at].append(i)
    return [group for group in found if group]


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (rows, longest), so that every row ends where new tokens begin."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _load(base: Base) -> tuple[Any, Any]:
    """The model and its tokenizer; on the GPU if there is one, unless a function made them."""
    if callable(base):
        return base()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(base)
