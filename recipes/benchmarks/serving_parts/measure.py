"""Time competitors in turn, in one process, and keep what each took beside what it was compared with.

A round runs every competitor once; each round begins with the next one, so that none always follows the same. What is
divided was timed in the same round: a machine that slows down for a while slows both. The collector of garbage runs
between rounds and not within a timing; what a section has set up is frozen, out of its sight.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["TOLERANCE", "Case", "Check", "Competitor", "Goal", "Outcome", "compare", "difference", "frozen", "in_turn"]

TOLERANCE = 1e-4  # of max|logit|, in float32


def _nothing() -> None:
    return None


@dataclass
class Competitor:
    """Something to time. Only `run` is timed."""

    name: str
    run: Callable[[], Any]
    before: Callable[[], Any] = _nothing
    after: Callable[[], Any] = _nothing
    inner: int = 1  # calls in one timing
    every: int = 1  # take part in each n-th round only (the slow ones)


@dataclass(frozen=True)
class Goal:
    """What is to be reached by the median: of the value itself, or of its ratio to the reference."""

    limit: float
    of: str  # "value" or "ratio"
    origin: str  # who asks for it: "design" or "issue"
    least: bool = False  # at least, rather than at most

    def reached(self, number: float) -> bool:
        """Whether this median is good enough."""
        return number >= self.limit if self.least else number <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.least else "≤"
        return f"{sign} {self.limit:g}" + (" ×" if self.of == "ratio" else "")


@dataclass(frozen=True)
class Check:
    """That what is timed is right: its output against another's, before the timing."""

    against: str
    difference: float  # max|a − b| / max|b|
    tolerance: float

    @property
    def equal(self) -> bool:
        """Within the tolerance (false for NaN)."""
        return self.difference <= self.tolerance


@dataclass
class Outcome:
    """One competitor in one case."""

    name: str
    samples: dict[int, float]  # by round
    goal: Goal | None = None
    check: Check | None = None
    rival: str | None = None  # PEFT's way to do the same


@dataclass
class Case:
    """One comparison: several competitors, and the one they are divided by."""

    name: str
    unit: str
    reference: str | None
    outcomes: list[Outcome]
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Outcome:
        return next(outcome for outcome in self.outcomes if outcome.name == name)

    def ratios(self, name: str) -> list[float]:
        """This competitor's samples over the reference's of the same round."""
        if self.reference is None:
            return []
        below = self[self.reference].samples
        return [value / below[i] for i, value in self[name].samples.items() if i in below]

    def number(self, outcome: Outcome) -> float:
        """The median that the outcome's goal is about."""
        assert outcome.goal is not None
        ratio = outcome.goal.of == "ratio"
        return statistics.median(self.ratios(outcome.name) if ratio else outcome.samples.values())

    def seen(self, name: str, reference: str, names: Mapping[str, Goal | None]) -> Case:
        """The same timings divided by another competitor."""
        chosen = [Outcome(n, self[n].samples, goal, self[n].check) for n, goal in names.items()]
        return Case(name, self.unit, reference, chosen)


_UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6}


def in_turn(
    name: str,
    competitors: Sequence[Competitor],
    *,
    rounds: int,
    checks: Mapping[str, Check],
    unit: str = "ms",
    reference: str | None = None,
    goals: Mapping[str, Goal] | None = None,
    rivals: Mapping[str, str] | None = None,
    warmup: int = 2,
    per: Callable[[float], float] | None = None,
    clock: Callable[[], float] | None = None,
) -> Case:
    """Time the competitors round by round.

    Args:
        checks: every competitor's, by its name; one that is missing or not equal ends the benchmark.
        unit: "s", "ms" or "µs"; anything else goes with `per`.
        rivals: PEFT's competitor to each, by name.
        reference: whose time the others' are divided by.
        warmup: rounds that are not counted.
        per: what a sample is, of the seconds it took (tokens per second, say).
        clock: seconds; default `time.perf_counter`.
    """
    for competitor in competitors:
        check = checks.get(competitor.name)
        if check is None or not check.equal:
            raise SystemExit(f"{name}: {competitor.name} does not compute what it should: {check}")
    samples: dict[str, dict[int, float]] = {competitor.name: {} for competitor in competitors}
    for i in range(-warmup, rounds):
        gc.collect()
        start = i % len(competitors)
        for competitor in [*competitors[start:], *competitors[:start]]:
            if i >= 0 and i % competitor.every:
                continue
            if i < -1 and competitor.every > 1:  # the slow ones warm up once
                continue
            seconds = _timed(competitor, clock or time.perf_counter)
            if i >= 0:
                samples[competitor.name][i] = per(seconds) if per else seconds * _UNITS[unit]
    goals, rivals = goals or {}, rivals or {}
    outcomes = [
        Outcome(c.name, samples[c.name], goals.get(c.name), checks[c.name], rivals.get(c.name)) for c in competitors
    ]
    return Case(name, unit, reference, outcomes)


def _timed(competitor: Competitor, clock: Callable[[], float]) -> float:
    competitor.before()
    gc.disable()
    try:
        start = clock()
        for _ in range(competitor.inner):
            competitor.run()
        return (clock() - start) / competitor.inner
    finally:
        gc.enable()
        competitor.after()


@contextmanager
def frozen() -> Iterator[None]:
    """Within the block, what exists already is out of the collector's sight: a collection costs the same for all."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.collect()


def difference(a: Tensor, b: Tensor) -> float:
    """max|a − b| / max|b|, in float64."""
    wide = b.double()
    return float((a.double() - wide).abs().max() / wide.abs().max())


def compare(
    outputs: Mapping[str, Tensor], against: Mapping[str, str], *, tolerance: float = TOLERANCE
) -> dict[str, Check]:
    """Each output against another one, by names."""
    return {name: Check(other, difference(outputs[name], outputs[other]), tolerance) for name, other in against.items()}
