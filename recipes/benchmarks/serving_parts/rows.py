"""A batch in which each row has its own adapter: a decode step, and a prefill."""

from __future__ import annotations

import contextvars
import copy
import random
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import subjects
from .measure import Case, Check, Competitor, Goal, compare, difference, frozen, in_turn
from .sizes import Sizes

__all__ = ["Routes", "measure_rows", "step"]

BASE, HAND, ONE, PEFT_ONE = "base", "the same maths by hand", "hf_lora, use_lora", "PEFT, set_adapter"
_GOALS = {"decode": Goal(1.4, "ratio", "design"), "prefill": Goal(1.2, "ratio", "design")}
_FLAT = Goal(1.1, "ratio", "issue")


class Routes:
    """Open routes on one model, each in a context of its own, so that several stay open side by side."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.open: list[tuple[contextvars.Context, ExitStack]] = []

    def __call__(self, names: list[str], forward: Callable[[], Any]) -> Callable[[], Any]:
        """`forward` inside `route_lora(names)`, which stays open from call to call."""
        context, stack = contextvars.copy_context(), ExitStack()
        context.run(stack.enter_context, self.model.route_lora(names))
        self.open.append((context, stack))
        return lambda: context.run(forward)

    def close(self) -> None:
        """End them."""
        for context, stack in self.open:
            context.run(stack.close)


class Step:
    """A forward of fixed inputs: T tokens a row, onto a cache of `past` tokens that is the same in every call."""

    def __init__(self, ids: Tensor, past: Any) -> None:
        self.ids, self.past = ids, past

    def on(self, model: Any, **kwargs: Any) -> tuple[Callable[[], Any], Callable[[], None]]:
        """The call, and what puts the cache back (not timed)."""
        cache = copy.deepcopy(self.past)
        if cache is None:
            return (lambda: model(input_ids=self.ids, use_cache=False, **kwargs)), (lambda: None)
        return (
            lambda: model(input_ids=self.ids, past_key_values=cache, **kwargs),
            lambda: cache.crop(-self.ids.shape[1]),
        )


def step(base: Any, kind: str, rows: int, past: int) -> Step:
    """`rows` rows of one token onto `past` cached ones ("decode"), or of `past` tokens ("prefill")."""
    ids = torch.randint(0, base.config.vocab_size, (rows, past + 1), generator=torch.Generator().manual_seed(1))
    if kind == "prefill":
        return Step(ids[:, :past], None)
    return Step(ids[:, past:], base(input_ids=ids[:, :past], use_cache=True).past_key_values)


@contextmanager
def on_one_model(root: Path, sizes: Sizes) -> Any:
    """base, hf_lora's, PEFT's and the model by hand, with the same adapters."""
    base = subjects.llama(sizes.rows_shape)
    folders = subjects.adapters(root, base, sizes.rows, subjects.ALL, rank=8)
    mine, _ = subjects.ours(copy.deepcopy(base), folders)
    peft, _ = subjects.theirs(copy.deepcopy(base), folders)
    hand = subjects.by_hand(copy.deepcopy(base), folders, range(sizes.rows))
    routes = Routes(mine)
    try:
        yield base, mine, peft, hand, routes
    finally:
        routes.close()


def measure_rows(root: Path, sizes: Sizes) -> list[Case]:
    """Decode steps and prefills with 1, 8 and 32 distinct adapters among the rows."""
    cases = []
    with on_one_model(root, sizes) as (base, mine, peft, hand, routes):
        for kind in ("decode", "prefill"):
            case = _measure(kind, base, mine, peft, hand, routes, sizes)
            one, most = sizes.distinct[0], sizes.distinct[-1]
            mine_one, mine_most = (f"hf_lora, route of {n}" for n in (one, most))
            peft_one, peft_most = (f"PEFT, adapter_names of {n}" for n in (one, most))
            flat = case.seen(
                f"{case.name}: {most} distinct against {one}", mine_one, {mine_one: None, mine_most: _FLAT}
            )
            also = case.seen(f"{flat.name}, PEFT", peft_one, {peft_one: None, peft_most: None})
            cases += [case, flat, also]
    return cases


def _measure(kind: str, base: Any, mine: Any, peft: Any, hand: Any, routes: Routes, sizes: Sizes) -> Case:
    forward = step(base, kind, sizes.rows, sizes.past)
    length = forward.ids.shape[1]
    label = f"{sizes.rows} rows, T={length}" + (f" after {sizes.past}" if kind == "decode" else "")
    shuffled = random.Random(0)
    competitors: list[Competitor] = []
    checks: dict[str, Check] = {}
    outputs: dict[str, Tensor] = {}
    against: dict[str, str] = {}

    def enter(name: str, run: Callable[[], Any], reset: Callable[[], None], other: str, **options: Any) -> None:
        outputs[name], against[name] = run().logits, other
        reset()
        competitors.append(Competitor(name, run, after=reset, **options))

    enter(BASE, *forward.on(base), "hf_lora, no_lora")
    run, reset = forward.on(mine)
    with mine.no_lora():
        outputs["hf_lora, no_lora"] = run().logits
    reset()

    def single() -> Any:
        with mine.use_lora("a0"):
            return run()

    enter(ONE, single, reset, PEFT_ONE)
    for distinct in sizes.distinct:
        names = [f"a{i % distinct}" for i in range(sizes.rows)]
        warm, cold = f"hf_lora, route of {distinct}", f"hf_lora, route of {distinct}, first call"
        mixed = f"PEFT, adapter_names of {distinct}"
        run_warm, reset_warm = forward.on(mine)
        enter(warm, routes(names, run_warm), reset_warm, mixed)
        run_cold, reset_cold = forward.on(mine)
        enter(cold, _fresh(mine, names, run_cold), reset_cold, mixed)
        competitors[-1].run = _fresh(mine, None, run_cold, _drawn(shuffled, distinct, sizes.rows))
        run_mixed, reset_mixed = forward.on(peft, adapter_names=names)
        enter(mixed, run_mixed, reset_mixed, warm, every=sizes.peft_every)
    enter(PEFT_ONE, *forward.on(peft), ONE)
    enter(HAND, *forward.on(hand), f"PEFT, adapter_names of {sizes.distinct[-1]}")
    effect = difference(outputs[ONE], outputs[BASE])
    assert effect > 0.01, f"the adapter changes the logits by {effect:.1e} only: the comparison would mean nothing"
    checks = compare(outputs, against)
    goals = {f"hf_lora, route of {distinct}": _GOALS[kind] for distinct in sizes.distinct}
    rivals = {f"hf_lora, route of {distinct}": f"PEFT, adapter_names of {distinct}" for distinct in sizes.distinct}
    with frozen():
        case = in_turn(
            label, competitors, rounds=sizes.rounds, checks=checks, reference=BASE, goals=goals, rivals=rivals
        )
    if kind == "decode":
        case.notes.append(_note(sizes))
    return case


def _note(sizes: Sizes) -> str:
    return (
        f"{sizes.rows_shape['num_hidden_layers']} layers, hidden {sizes.rows_shape['hidden_size']}, "
        f"{sizes.rows_shape['num_hidden_layers'] * 7} targets, rank 8, {sizes.rows} adapters resident; "
        "a first call takes a route that was never taken before, and includes entering it."
    )


def _drawn(rng: random.Random, distinct: int, rows: int) -> Callable[[], list[str]]:
    """Routes in an order that was not there before."""

    def draw() -> list[str]:
        chosen = rng.sample(range(rows), distinct)
        names = [f"a{chosen[i % distinct]}" for i in range(rows)]
        rng.shuffle(names)
        return names

    return draw


def _fresh(
    model: Any, names: list[str] | None, forward: Callable[[], Any], draw: Callable[[], list[str]] | None = None
) -> Callable[[], Any]:
    """`forward` inside a route entered for this call alone."""

    def run() -> Any:
        route = names if names is not None else draw()  # type: ignore[misc]
        with model.route_lora(route):
            return forward()

    return run
