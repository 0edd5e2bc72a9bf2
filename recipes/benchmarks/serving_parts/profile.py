"""Where a routed decode step spends its time: operators by kind, counted and timed, beside base and PEFT.

Counts are exact. The profiler slows every operator down, so its times say how the time is shared, not how long it is;
what is left of the wall's time is Python's and the dispatcher's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from .measure import Case, Check, Outcome, difference
from .rows import BASE, HAND, on_one_model, step
from .sizes import Sizes

__all__ = ["measure_profile"]

OURS, FIRST, PEFT = "hf_lora, route of all", "hf_lora, route of all, first call", "PEFT, adapter_names of all"
_KINDS = {
    "matrix products of the base (addmm, mm)": ("aten::addmm", "aten::mm"),
    "batched products (bmm, baddbmm)": ("aten::bmm", "aten::baddbmm"),
    "additions": ("aten::add", "aten::add_"),
    "copies and gathers": ("aten::copy_", "aten::index", "aten::index_select", "aten::cat", "aten::clone"),
    "views": (
        *("aten::view", "aten::reshape", "aten::_reshape_alias", "aten::transpose", "aten::t", "aten::as_strided"),
        *("aten::slice", "aten::select", "aten::expand", "aten::unsqueeze", "aten::permute", "aten::_unsafe_view"),
    ),
}


def measure_profile(root: Path, sizes: Sizes) -> list[Case]:
    """A decode step of 32 rows over 32 adapters."""
    names = [f"a{i}" for i in range(sizes.rows)]
    with on_one_model(root, sizes) as (base, mine, peft, hand, routes):
        forward = step(base, "decode", sizes.rows, sizes.past)
        calls: dict[str, tuple[Callable[[], Any], Callable[[], None]]] = {
            BASE: forward.on(base),
            HAND: forward.on(hand),
            PEFT: forward.on(peft, adapter_names=names),
        }
        run, reset = forward.on(mine)
        calls[OURS] = routes(names, run), reset
        turned = list(names)

        def first() -> Any:
            turned.append(turned.pop(0))
            with mine.route_lora(turned):
                return run()

        calls[FIRST] = first, reset
        counts: dict[str, dict[str, float]] = {}
        times: dict[str, dict[str, float]] = {}
        logits = {}
        for name, (call, after) in calls.items():
            logits[name] = call().logits
            after()
            counts[name], times[name] = _profiled(call, after, sizes.profiles)
        with mine.no_lora():
            none = run().logits
        reset()
        logits["the same, PEFT"] = forward.on(peft, adapter_names=[*names[1:], names[0]])[0]().logits
    checks = {
        BASE: Check("hf_lora, no_lora", difference(logits[BASE], none), 0.0),
        FIRST: Check(PEFT, difference(logits[FIRST], logits["the same, PEFT"]), 1e-4),
        **{name: Check(PEFT, difference(logits[name], logits[PEFT]), 1e-4) for name in (HAND, OURS)},
        PEFT: Check(OURS, difference(logits[PEFT], logits[OURS]), 1e-4),
    }
    cases = []
    for kind in next(iter(counts.values())):
        outcomes = [Outcome(name, {0: counts[name][kind]}, None, checks[name]) for name in calls]
        cases.append(Case(f"operators called: {kind}", "calls", None, outcomes))
    for kind in next(iter(times.values())):
        outcomes = [Outcome(name, {0: times[name][kind]}, None, checks[name]) for name in calls]
        cases.append(Case(f"time under the profiler: {kind}", "ms", None, outcomes))
    cases[0].notes.append(" ".join((__doc__ or "").split("\n\n")[1].split()))
    return cases


def _profiled(
    call: Callable[[], Any], after: Callable[[], None], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Calls of operators by kind in one step, and milliseconds: by kind, and of the wall without a profiler."""
    walls = []
    for _ in range(4 * repeats):
        start = time.perf_counter()
        call()
        walls.append(1e3 * (time.perf_counter() - start))
        after()
    counts: dict[str, float] = dict.fromkeys([*_KINDS, "others", "all"], 0)
    times: dict[str, float] = dict.fromkeys([*_KINDS, "others", "all"], 0)
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            call()
        after()
        for event in profiler.key_averages():
            if not event.key.startswith("aten::"):
                continue
            kind = next((kind for kind, keys in _KINDS.items() if event.key in keys), "others")
            for key in (kind, "all"):
                counts[key] += event.count / repeats
                times[key] += event.self_cpu_time_total / 1e3 / repeats
    times["the wall's, without a profiler"] = sorted(walls)[len(walls) // 2]
    return counts, times
