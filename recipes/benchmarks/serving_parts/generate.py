"""Answer 32 requests for 32 adapters with SmolLM2-135M: greedy, left-padded prompts of mixed length."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import subjects
from .measure import TOLERANCE, Case, Check, Competitor, difference, frozen, in_turn
from .sizes import Sizes

__all__ = ["measure_generate"]

BASE = "base"
OURS, PEFT, SERIAL = "hf_lora, route_lora", "PEFT, adapter_names", "PEFT, one request after another"
ONE, PEFT_ONE = "hf_lora, one for all", "PEFT, one for all"
_TASKS = (
    "Say what this function returns: ",
    "Translate into French: ",
    "Summarise in one sentence what happened at the meeting on Monday, who was there, and what they decided: ",
    "Name: The Mill. Food: Italian. Price: low. Area: riverside. Write one sentence about it. ",
)
_TEXTS = (
    "def f(x): return x + 1",
    "The train from the coast was late again, so nobody waited.",
    "We agreed to move the release by a week, since two of the tests had been failing for days and nobody had seen it.",
    "Good morning",
    "Every adapter in this batch is another task, and every row of it another length.",
)


def measure_generate(root: Path, sizes: Sizes) -> list[Case]:
    """Tokens per second, with adapters on q and v, and on all linear layers."""
    if sizes.real:
        base, tokenizer, origin = subjects.smollm2()
        texts = [_TASKS[i % len(_TASKS)] + _TEXTS[i % len(_TEXTS)] for i in range(sizes.rows)]
        encoded = tokenizer(texts, return_tensors="pt", padding=True)
        batch = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        stop = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    else:
        base, origin = subjects.llama(sizes.rows_shape), "random weights"
        batch, stop = _random_batch(base, sizes), {"eos_token_id": 2, "pad_token_id": 0}
    cases = []
    for label, targets in (("q and v", subjects.QV), ("all linear layers", subjects.ALL)):
        folders = subjects.adapters(root / label[:1], base, sizes.rows, targets, rank=8, size=0.05)
        cases.append(_measure(label, base, folders, batch, stop, sizes))
    lengths = batch["attention_mask"].sum(1)
    cases[0].notes.insert(
        0,
        f"The base: {origin}. Prompts of {int(lengths.min())} to {int(lengths.max())} tokens, {sizes.new_tokens} new "
        "tokens for each of them (the end of the text is not let come), rank 8. A call of generate is timed whole: the "
        "route is entered in it, as a server would.",
    )
    return cases


def _random_batch(base: Any, sizes: Sizes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, base.config.vocab_size, (sizes.rows, 6), generator=generator)
    mask = (torch.arange(6) >= (torch.arange(sizes.rows) % 3).view(-1, 1)).long()
    return {"input_ids": torch.where(mask == 1, ids, 0), "attention_mask": mask}


def _measure(
    label: str, base: Any, folders: list[Path], batch: dict[str, Tensor], stop: dict[str, int], sizes: Sizes
) -> Case:
    mine, _ = subjects.ours(copy.deepcopy(base), folders)
    peft, _ = subjects.theirs(copy.deepcopy(base), folders)
    names = [f"a{i}" for i in range(sizes.rows)]
    count = sizes.new_tokens
    options = {**stop, "do_sample": False, "max_new_tokens": count, "min_new_tokens": count}

    def generated(model: Any, batch: dict[str, Tensor] = batch, **kwargs: Any) -> Tensor:
        tokens: Tensor = model.generate(**batch, **options, **kwargs)
        return tokens

    def routed() -> Tensor:
        with mine.route_lora(names):
            return generated(mine)

    def one() -> Tensor:
        with mine.use_lora("a0"):
            return generated(mine)

    def serial() -> list[Tensor]:
        outputs = []
        for i, name in enumerate(names):
            alone = {key: value[i : i + 1, batch["attention_mask"][i] == 1] for key, value in batch.items()}
            peft.set_adapter(name)
            outputs.append(generated(peft, alone)[0, -count:])
        return outputs

    def base_alone() -> Tensor:
        return generated(base)

    def with_none() -> Tensor:
        with mine.no_lora():
            return generated(mine)

    def peft_one() -> Tensor:
        peft.set_adapter("a0")
        return generated(peft)

    def peft_mixed() -> Tensor:
        return generated(peft, adapter_names=names)

    runs: dict[str, Callable[[], Any]] = {
        BASE: base_alone,
        OURS: routed,
        PEFT: peft_mixed,
        ONE: one,
        PEFT_ONE: peft_one,
        SERIAL: serial,
    }
    new = {name: run()[:, -count:] for name, run in runs.items() if name != SERIAL}
    new[SERIAL] = torch.stack(serial())
    judges: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
        BASE: ("hf_lora, no_lora", lambda ids, mask: _with(mine.no_lora(), mine, ids, mask, count)),
        OURS: (PEFT, lambda ids, mask: _logits(peft, ids, mask, count, adapter_names=names)),
        PEFT: (OURS, lambda ids, mask: _with(mine.route_lora(names), mine, ids, mask, count)),
        SERIAL: (OURS, lambda ids, mask: _with(mine.route_lora(names), mine, ids, mask, count)),
        ONE: (PEFT_ONE, lambda ids, mask: _logits(peft, ids, mask, count, adapter_names=["a0"] * len(names))),
        PEFT_ONE: (ONE, lambda ids, mask: _with(mine.use_lora("a0"), mine, ids, mask, count)),
    }
    checks = {
        name: Check(judge, _shortfall(batch, new[name], logits_of, stop["eos_token_id"]), TOLERANCE)
        for name, (judge, logits_of) in judges.items()
    }
    prompt = batch["input_ids"], batch["attention_mask"]
    effect = difference(_with(mine.route_lora(names), mine, *prompt, 1), _logits(base, *prompt, 1))
    assert effect > 0.01, f"the adapters change the logits by {effect:.1e} only: the comparison would mean nothing"
    competitors = [Competitor(name, run, every=2 if name == SERIAL else 1) for name, run in runs.items()]
    with frozen():
        case = in_turn(
            f"{sizes.rows} requests, {label}",
            competitors,
            rounds=sizes.generate_rounds,
            checks=checks,
            unit="tokens/s",
            reference=BASE,
            warmup=0,  # each has run once already
            per=lambda seconds: sizes.rows * count / seconds,
        )
    same = float((new[OURS] == new[PEFT]).float().mean())
    case.notes.append(f"{label}: {100 * same:.1f} % of hf_lora's {new[OURS].numel()} tokens are PEFT's.")
    return case


def _with(block: Any, model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    with block:
        return _logits(model, ids, mask, count)


def _logits(model: Any, ids: Tensor, mask: Tensor, count: int, **kwargs: Any) -> Tensor:
    """What the last `count` tokens were chosen from, (N, count, V), in one forward without a cache."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=count + 1,
        **kwargs,
    )
    logits: Tensor = output.logits[:, :-1]
    return logits


def _shortfall(batch: dict[str, Tensor], new: Tensor, logits_of: Callable[[Tensor, Tensor], Tensor], eos: int) -> float:
    """How far a chosen token's logit is below the largest one, at worst, over max|logit|: 0 but for rounding."""
    ids = torch.cat([batch["input_ids"], new], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(new)], 1)
    logits = logits_of(ids, mask)
    largest = logits.abs().max()
    logits[..., eos] = -torch.inf  # min_new_tokens does not let it come
    return float((logits.max(-1).values - logits.gather(-1, new[..., None])[..., 0]).max() / largest)
