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
# Of the largest weight: what rounding leaves of a merge, and of one after another. bfloat16 keeps 8 bits.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01}
Tensors = dict[str, Tensor]


class _Ours:
    def __init__(self, model: Any) -> None:
        self.model = model

    def merge(self, name: str) -> None:
        self.model.merge_lora(name)

    def unmerge(self) -> None:
        self.model.unmerge_lora()

    def swap(self, name: str) -> None:
        if "replace" in inspect.signature(self.model.merge_lora).parameters:
            self.model.merge_lora(name, replace=True)
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
    own = _weights(base)
    done: dict[str, dict[str, Tensors]] = {"merge": {}, "swap": {}, "unmerge": {}}
    moved: dict[str, float] = {}
    for who, side in sides.items():
        side.merge("a0")
        done["merge"][who] = _weights(side.model)
        side.swap("a1")
        done["swap"][who] = _weights(side.model)
        side.unmerge()
        done["unmerge"][who] = after = _weights(side.model)
        moved[who] = sum(int((after[k] != w).sum()) for k, w in own.items()) / sum(w.numel() for w in own.values())
    effect = _apart(done["merge"][OURS], own)
    assert effect > 0.01, f"the merge changes the weights by {effect:.1e} only: the comparison would mean nothing"
    tolerance = _TOLERANCE[base.dtype]
    checks = {
        verb: {
            OURS: Check(PEFT, _apart(weights[OURS], weights[PEFT]), tolerance),
            PEFT: Check(OURS, _apart(weights[PEFT], weights[OURS]), tolerance),
        }
        for verb, weights in done.items()
    }
    checks["unmerge"][OURS] = Check("the base", _apart(done["unmerge"][OURS], own), 0.0)
    del done
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


def _weights(model: Any) -> Tensors:
    """Copies of the weights that the adapters touch, by the base's names."""
    found = {}
    for path, parameter in model.named_parameters():
        name = path.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name.endswith(".weight") and ".lora_" not in name and name.split(".")[-2] in subjects.ALL:
            found[name] = parameter.detach().clone()
    return found


def _apart(a: Tensors, b: Tensors) -> float:
    """The largest difference between two models' weights, over the largest weight of its matrix."""
    assert a.keys() == b.keys()
    return max(difference(a[name], b[name]) for name in b)


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
