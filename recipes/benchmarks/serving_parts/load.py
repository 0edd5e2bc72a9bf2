"""Load an adapter of 420 tensors from its folder, onto a model that holds none, nine or ninety-nine."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from . import subjects
from .measure import Case, Check, Competitor, Goal, Outcome, difference, frozen, in_turn
from .sizes import Sizes

__all__ = ["measure_load"]

_GOAL = Goal(4.0, "ratio", "design")
READ, OURS, PEFT, LOW = "reading the file", "hf_lora", "PEFT", "PEFT, low_cpu_mem_usage"


def measure_load(root: Path, sizes: Sizes) -> list[Case]:
    """The 1st, 10th and 100th load, and a hundred one after another."""
    base = subjects.llama(sizes.load_shape)
    folders = subjects.adapters(root, base, 4, subjects.ALL, sizes.load_rank)
    new = folders[-1]
    ids = torch.arange(8).view(1, 8)
    most = sizes.load_residents[-1]
    onto: dict[int, tuple[Any, Any]] = {}
    every: dict[str, list[float]] = {}
    for count in sizes.load_residents:
        mine, every[OURS] = subjects.ours(subjects.sharing(base), folders, count)
        peft, every[PEFT] = subjects.theirs(subjects.sharing(base), folders, count) if count else (None, [])
        onto[count] = mine, peft
    cases = []
    with frozen():
        for count in sizes.load_residents:
            mine, peft = onto[count]
            cases.append(_measure(count, base, mine, peft, new, ids, sizes))
    file = new / "adapter_model.safetensors"
    cases[0].notes.append(
        f"{len(load_file(file))} tensors, {file.stat().st_size / 1e6:.1f} MB, rank {sizes.load_rank}; the file "
        "is in the page cache. The same load is repeated, and what it loaded is removed between (not timed). PEFT's "
        "first is PeftModel.from_pretrained, the others load_adapter."
    )
    checks = {name: cases[-1][name].check for name in (OURS, PEFT)}
    outcomes = [Outcome(name, {i: 1e3 * s for i, s in enumerate(every[name])}, None, checks[name]) for name in checks]
    cases.append(Case(f"{most} loads one after another, each", "ms", None, outcomes))
    slowest = {name: max(seconds) * 1e3 for name, seconds in every.items()}
    cases[-1].notes.append(
        f"The {most} loads in order: "
        + "; ".join(f"{name} {_ends(every[name])}, slowest {slowest[name]:.0f} ms" for name in every)
        + "."
    )
    return cases


def _ends(seconds: list[float]) -> str:
    tenth = max(len(seconds) // 10, 1)
    first, last = (statistics.median(part) * 1e3 for part in (seconds[:tenth], seconds[-tenth:]))
    return f"median of the first tenth {first:.0f} ms, of the last {last:.0f} ms"


def _measure(count: int, base: Any, mine: Any, peft: Any, new: Path, ids: Tensor, sizes: Sizes) -> Case:
    file = new / "adapter_model.safetensors"

    def load() -> None:
        mine.load_lora(new, name="new")

    def remove() -> None:
        mine.remove_lora("new")

    bare = subjects.sharing(base) if peft is None else None
    held: list[Any] = []

    def load_peft(**options: Any) -> Callable[[], None]:
        def run() -> None:
            from peft import PeftModel

            if bare is None:
                peft.load_adapter(str(new), adapter_name="new", **options)
            else:
                held.append(PeftModel.from_pretrained(bare, str(new), adapter_name="new", **options))

        return run

    def remove_peft() -> None:
        if bare is None:
            peft.delete_adapter("new")
        else:
            held.pop().unload()

    def output_peft(run: Callable[[], None]) -> Tensor:
        run()
        model = held[0] if held else peft
        model.eval().set_adapter("new")
        logits: Tensor = model(input_ids=ids).logits
        if bare is None:
            model.set_adapter("a0")
        remove_peft()
        return logits

    with subjects.quiet():
        logits = {PEFT: output_peft(load_peft()), LOW: output_peft(load_peft(low_cpu_mem_usage=True))}
        load()
        with mine.use_lora("new"):
            logits[OURS] = mine.eval()(input_ids=ids).logits
        written = mine.lora_state_dict("new")
        remove()
        tensors = load_file(file)
        assert tensors.keys() == written.keys()
        checks = {
            READ: Check("what hf_lora saves", max(difference(written[k], t) for k, t in tensors.items()), 0.0),
            OURS: Check(PEFT, difference(logits[OURS], logits[PEFT]), 1e-4),
            PEFT: Check(OURS, difference(logits[PEFT], logits[OURS]), 1e-4),
            LOW: Check(OURS, difference(logits[LOW], logits[OURS]), 1e-4),
        }
        del tensors, written
        slow = 1 if bare is not None else sizes.peft_every
        competitors = [
            Competitor(READ, lambda: load_file(file)),
            Competitor(OURS, load, after=remove),
            Competitor(PEFT, load_peft(), after=remove_peft, every=slow),
            Competitor(LOW, load_peft(low_cpu_mem_usage=True), after=remove_peft, every=slow),
        ]
        return in_turn(
            f"load number {count + 1}",
            competitors,
            rounds=sizes.load_rounds,
            checks=checks,
            reference=READ,
            goals={OURS: _GOAL},
            rivals={OURS: PEFT},
        )
