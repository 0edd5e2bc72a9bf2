"""Mean and deviation over seeds, and the paired error of a difference."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

__all__ = ["Difference", "Summary", "paired", "summary"]


@dataclass(frozen=True)
class Summary:
    """Of several seeds. `deviation` is the sample's; None of one seed."""

    mean: float
    deviation: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


def summary(values: Sequence[float]) -> Summary:
    """Mean ± deviation."""
    return Summary(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Difference:
    """ours − theirs, with the interval that holds 95 % of the resampled differences."""

    mean: float
    low: float
    high: float

    @property
    def noise(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def paired(
    metric: Callable[[Sequence[Any], Sequence[Any]], float],
    ours: Sequence[Sequence[Any]],
    theirs: Sequence[Sequence[Any]],
    references: Sequence[Any],
    *,
    resamples: int = 1000,
) -> Difference:
    """The difference of two systems' means over seeds, by a paired bootstrap.

    Each resample draws the examples (the same for both systems) and, for each system, the seeds. So the interval holds
    both what other examples and what other seeds would have given.

    Args:
        ours, theirs: the predictions of each seed. Of systems measured on fewer examples, the first ones are compared.
    """
    n = min(len(references), *(len(run) for run in (*ours, *theirs)))
    references = list(references[:n])
    whole = fmean(metric(run[:n], references) for run in ours) - fmean(metric(run[:n], references) for run in theirs)
    rng, found = random.Random(0), []
    for _ in range(resamples):
        chosen = rng.choices(range(n), k=n)
        right = [references[i] for i in chosen]
        means = []
        for runs in (ours, theirs):
            drawn = rng.choices(range(len(runs)), k=len(runs))
            values = {k: metric([runs[k][i] for i in chosen], right) for k in set(drawn)}
            means.append(fmean(values[k] for k in drawn))
        found.append(means[0] - means[1])
    found.sort()
    return Difference(whole, found[int(0.025 * resamples)], found[int(0.975 * resamples) - 1])
