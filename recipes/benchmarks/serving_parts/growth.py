"""What a switch, a load and a routed decode step cost with 1 to 1,000 adapters resident.

There is a model for each number of residents, side by side, so that they too are timed in turn. Adapter "a<i>" is file
i mod 8; what is computed is checked against the same maths by hand from the files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import subjects
from .measure import Case, Check, Competitor, Goal, difference, frozen, in_turn
from .rows import BASE, Routes, Step, step
from .sizes import Sizes

__all__ = ["measure_growth"]

_SWITCH = Goal(0.1, "value", "design")
_FLAT = Goal(1.2, "ratio", "issue")
HAND = "the same maths by hand"


@dataclass
class Residents:
    """The models, by the number of their adapters."""

    base: Any
    folders: list[Path]
    mine: dict[int, Any]
    peft: dict[int, Any]

    def check(self, output: Tensor, forward: Step, residents: list[int]) -> Check:
        """A forward's logits against the maths by hand, row i through adapter `residents[i]`."""
        rows = [i % len(self.folders) for i in residents]
        hand = subjects.by_hand(subjects.sharing(self.base), self.folders, rows)
        return Check(HAND, difference(output, forward.on(hand)[0]().logits), 1e-4)


def measure_growth(root: Path, sizes: Sizes) -> list[Case]:
    """Switch, load, decode: each against the number of residents."""
    base = subjects.llama(sizes.deep_shape)
    folders = subjects.adapters(root, base, 8, subjects.ALL, rank=4)
    models = Residents(
        base,
        folders,
        {n: subjects.ours(subjects.sharing(base), folders, n)[0] for n in sizes.residents},
        {n: subjects.theirs(subjects.sharing(base), folders, n)[0] for n in sizes.peft_residents},
    )
    with frozen():
        cases = [
            _switch(models, sizes),
            _load(models, sizes),
            *_decode_one(models, sizes),
            *_decode_many(models, sizes),
        ]
    layers = sizes.deep_shape["num_hidden_layers"]
    cases[0].notes.append(
        f"{layers} layers, {7 * layers} targets, hidden {sizes.deep_shape['hidden_size']}, rank 4; a model "
        f"for each number of residents. PEFT with more than {sizes.peft_residents[-1]} was left out: each of its loads "
        "takes longer than the one before (below), and there is no other way to put them there."
    )
    return cases


def _named(who: str, n: int) -> str:
    return f"{who}, {n:,} resident"


def _switch(models: Residents, sizes: Sizes) -> Case:
    competitors, checks = [], {}
    forward = step(models.base, "prefill", 2, 4)
    sides = (("hf_lora", models.mine, "set_lora", 20), ("PEFT", models.peft, "set_adapter", 1))
    for who, side, verb, inner in sides:
        for n, model in side.items():
            change = getattr(model, verb)
            change("a0")
            change(f"a{n - 1}")
            checks[_named(who, n)] = models.check(forward.on(model)[0]().logits, forward, [n - 1] * 2)
            competitors.append(Competitor(_named(who, n), _back_and_forth(change, n), inner=inner))
    return in_turn(
        "switch between the first resident and the last",
        competitors,
        rounds=sizes.rounds,
        checks=checks,
        reference=_named("hf_lora", sizes.residents[0]),
        goals={_named("hf_lora", n): _SWITCH for n in models.mine},
        rivals={_named("hf_lora", n): _named("PEFT", n) for n in models.peft},
    )


def _back_and_forth(change: Callable[[str], None], n: int) -> Callable[[], None]:
    first = True

    def run() -> None:
        nonlocal first
        first = not first
        change("a0" if first else f"a{n - 1}")

    return run


def _load(models: Residents, sizes: Sizes) -> Case:
    competitors, checks = [], {}
    forward = step(models.base, "prefill", 2, 4)
    new = len(models.folders) - 1

    def enter(name: str, model: Any, load: Callable[[], Any], use: Callable[[str], Any], remove: Callable[[str], Any],
              every: int = 1) -> None:  # fmt: skip
        load()
        model.eval()
        use("new")
        checks[name] = models.check(forward.on(model)[0]().logits, forward, [new] * 2)
        use("a0")
        remove("new")
        competitors.append(Competitor(name, load, after=lambda: remove("new"), every=every))

    for n, model in models.mine.items():
        load = _loader(model.load_lora, models.folders[new], "name")
        enter(_named("hf_lora", n), model, load, model.set_lora, model.remove_lora)
    for n, model in models.peft.items():
        load = _loader(model.load_adapter, models.folders[new], "adapter_name")
        enter(_named("PEFT", n), model, load, model.set_adapter, model.delete_adapter, sizes.peft_every)
    with subjects.quiet():
        return in_turn(
            "load one more",
            competitors,
            rounds=sizes.load_rounds,
            checks=checks,
            reference=_named("hf_lora", sizes.residents[0]),
            goals={_named("hf_lora", sizes.residents[-1]): _FLAT},
        )


def _loader(verb: Callable[..., Any], folder: Path, keyword: str) -> Callable[[], Any]:
    return lambda: verb(str(folder), **{keyword: "new"})


def _decode_one(models: Residents, sizes: Sizes) -> list[Case]:
    return _decode(
        models,
        f"decode step, {sizes.rows} rows, all through the last resident",
        {n: [n - 1] * sizes.rows for n in models.mine},
        sizes,
    )


def _decode_many(models: Residents, sizes: Sizes) -> list[Case]:
    enough = [n for n in models.mine if n >= sizes.rows]
    spread = {n: [i * (n // sizes.rows) for i in range(sizes.rows)] for n in enough}
    return _decode(models, f"decode step, {sizes.rows} rows, each through another resident", spread, sizes)


def _decode(models: Residents, label: str, rows: dict[int, list[int]], sizes: Sizes) -> list[Case]:
    forward = step(models.base, "decode", sizes.rows, sizes.past)
    competitors, checks = [], {}
    routes = [Routes(model) for model in models.mine.values()]

    def enter(name: str, n: int, run: Callable[[], Any], reset: Callable[[], None], every: int = 1) -> None:
        checks[name] = models.check(run().logits, forward, rows[n])
        reset()
        competitors.append(Competitor(name, run, after=reset, every=every))

    try:
        run, reset = forward.on(models.base)
        mine = next(iter(models.mine.values()))
        with mine.no_lora():
            checks[BASE] = Check("hf_lora, no_lora", difference(run().logits, forward.on(mine)[0]().logits), 0.0)
        reset()
        competitors.append(Competitor(BASE, run, after=reset))
        for (n, model), route in zip(models.mine.items(), routes, strict=True):
            if n in rows:
                run, reset = forward.on(model)
                names = [f"a{i}" for i in rows[n]]
                enter(_named("hf_lora", n), n, route(names, run), reset)
                enter(f"{_named('hf_lora', n)}, first call", n, _first(model, names, run), reset)
        for n, model in models.peft.items():
            if n in rows:
                run, reset = forward.on(model, adapter_names=[f"a{i}" for i in rows[n]])
                enter(_named("PEFT", n), n, run, reset, sizes.peft_every)
        first, last = (_named("hf_lora", n) for n in (min(rows), max(rows)))
        case = in_turn(
            label,
            competitors,
            rounds=sizes.rounds,
            checks=checks,
            reference=first,
            goals={last: _FLAT},
        )
        called = {f"{first}, first call": None, f"{last}, first call": _FLAT}
        return [case, case.seen(f"{label}: first call of a route", f"{first}, first call", called)]
    finally:
        for route in routes:
            route.close()


def _first(model: Any, names: list[str], forward: Callable[[], Any]) -> Callable[[], Any]:
    """The route entered for one call alone, and each time with its rows in another order."""
    turned = list(names)

    def run() -> Any:
        with model.route_lora(turned):
            output = forward()
        turned.append(turned.pop(0))
        return output

    return run
