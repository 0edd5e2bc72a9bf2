"""Mean and deviation over seeds, and the paired error of a difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

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
    metric: Callable[[Any, Any], float],
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
    right = np.arange(n) if isinstance(references[0], list) else np.asarray(references[:n])  # of texts: not needed
    both = [[np.asarray(run[:n]) for run in runs] for runs in (ours, theirs)]
    whole = fmean(metric(run, right) for run in both[0]) - fmean(metric(run, right) for run in both[1])
    rng, found = np.random.default_rng(0), []
    for _ in range(resamples):
        chosen = rng.integers(n, size=n)
        means = []
        for runs in both:
            drawn = rng.integers(len(runs), size=len(runs)).tolist()
            values = {k: metric(runs[k][chosen], right[chosen]) for k in set(drawn)}
            means.append(fmean(values[k] for k in drawn))
        found.append(means[0] - means[1])
    found.sort()
    return Difference(whole, found[int(0.025 * resamples)], found[int(0.975 * resamples) - 1])
