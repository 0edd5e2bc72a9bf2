"""Merge an adapter into SmolLM2-135M's weights, take it out again, and put another in its place."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import subjects
from .measure import Case, Check, Competitor, Goal, Outcome, difference, frozen, in_turn
from .sizes import Sizes

__all__ = ["measure_merge"]

OURS, PEFT = "hf_lora", "PEFT"
_FASTER = Goal(1.0, "ratio", "issue")
_EXACT = Goal(0.0, "value", "design")
# In bfloat16 a merged weight is rounded to 8 bits, and the two round ΔW differently on the way.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


class _Ours:
    def __init__(self, model: Any) -> None:
        self.model = model

    def merge(self, name: str) -> None:
        self.model.merge_lora(name)

    def unmerge(self) -> None:
        self.model.unmerge_lora()

    def swap(self, name: str) -> None:
        if "swap" in inspect.signature(type(self.model).merge_lora).parameters:
            self.model.merge_lora(name, swap=True)
        else:  # a version without the verb
            self.unmerge()
            self.merge(name)


class _PEFT:
    def __init__(self, model: Any) -> None:
        self.model = model

    def merge(self, name: str) -> None:
        self.model.set_adapter(name)
        self.model.merge_adapter()

    def unmerge(self) -> None:
        self.model.unmerge_adapter()

    def swap(self, name: str) -> None:
        self.unmerge()
        self.merge(name)


def measure_merge(root: Path, sizes: Sizes) -> list[Case]:
    """Merge, unmerge and swap, in float32 and bfloat16."""
    base = subjects.smollm2()[0] if sizes.real else subjects.llama(sizes.rows_shape)
    folders = subjects.adapters(root, base, 2, subjects.ALL, rank=8, size=0.1)
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        cases += _measure(base.to(dtype), folders, sizes, str(dtype).removeprefix("torch."))
    cases[0].notes.append(
        f"{base.num_parameters() / 1e6:.0f} M parameters, 7 targets in each of {base.config.num_hidden_layers} layers, "
        "rank 8, ‖ΔW‖/‖W‖ about 0.1. hf_lora's merge keeps what it takes to restore every bit; PEFT's does not. "
        "PEFT's swap is unmerge_adapter, set_adapter, merge_adapter."
    )
    return cases


def _measure(base: Any, folders: list[Path], sizes: Sizes, dtype: str) -> list[Case]:
    sides: dict[str, Any] = {
        OURS: _Ours(subjects.ours(copy.deepcopy(base), folders)[0]),
        PEFT: _PEFT(subjects.theirs(copy.deepcopy(base), folders)[0]),
    }
    ids = torch.arange(3, 35).view(2, 16)
    outputs: dict[str, dict[str, Tensor]] = {"merge": {}, "swap": {}, "unmerge": {}}
    moved: dict[str, float] = {}
    for who, side in sides.items():
        side.merge("a0")
        outputs["merge"][who] = side.model(input_ids=ids).logits
        side.swap("a1")
        outputs["swap"][who] = side.model(input_ids=ids).logits
        side.unmerge()
        with side.model.no_lora() if who == OURS else side.model.disable_adapter():
            outputs["unmerge"][who] = side.model(input_ids=ids).logits
        moved[who] = _moved(base, side.model)
    tolerance = _TOLERANCE[base.dtype]
    checks = {
        verb: {
            OURS: Check(PEFT, difference(logits[OURS], logits[PEFT]), tolerance),
            PEFT: Check(OURS, difference(logits[PEFT], logits[OURS]), tolerance),
        }
        for verb, logits in outputs.items()
    }
    with frozen():
        cases = [_verb(verb, dtype, sides, checks[verb], sizes) for verb in ("merge", "unmerge", "swap")]
    cases.append(
        Case(
            f"weights that are not the base's after merge, swap and unmerge, {dtype}",
            "%",
            None,
            [
                Outcome(OURS, {0: 100 * moved[OURS]}, _EXACT, checks["unmerge"][OURS], PEFT),
                Outcome(PEFT, {0: 100 * moved[PEFT]}, None, checks["unmerge"][PEFT]),
            ],
        )
    )
    return cases


def _moved(base: Any, model: Any) -> float:
    """The share of the base's weights, of the layers that are adapted, whose bits are others now."""
    weights = dict(base.named_parameters())
    changed = total = 0
    for path, parameter in model.named_parameters():
        name = path.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name in weights and name.split(".")[-2] in subjects.ALL:
            changed += int((parameter.data.view(-1) != weights[name].data.view(-1)).sum())
            total += parameter.numel()
    return changed / total


def _verb(verb: str, dtype: str, sides: dict[str, Any], checks: dict[str, Check], sizes: Sizes) -> Case:
    competitors = []
    for who, side in sides.items():
        names = itertools.cycle(["a1", "a0"])
        competitors.append(Competitor(who, *_prepared(verb, side, names)))
        if verb == "swap":
            side.merge("a0")
    case = in_turn(
        f"{verb}, {dtype}",
        competitors,
        rounds=sizes.merge_rounds,
        checks=checks,
        reference=PEFT,
        goals={OURS: _FASTER} if verb == "swap" else {},
        rivals={OURS: PEFT},
        warmup=1,
    )
    if verb == "swap":
        for side in sides.values():
            side.unmerge()
    return case


def _prepared(
    verb: str, side: Any, names: Iterator[str]
) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """What is timed, and what stands before and after it."""

    def nothing() -> None:
        return None

    return {
        "merge": (lambda: side.merge("a0"), nothing, side.unmerge),
        "unmerge": (side.unmerge, lambda: side.merge("a0"), nothing),
        "swap": (lambda: side.swap(next(names)), nothing, nothing),
    }[verb]
