"""Is the adapter better than everything that needs no training, by more than the paired error?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .evaluate import paired_difference

__all__ = ["METRICS", "OURS", "Comparison", "Metric", "compare"]

OURS = "LoRA"


@dataclass(frozen=True)
class Metric:
    """How a number is named and printed; `sign` is +1 where more is better."""

    label: str
    sign: int
    digits: int


METRICS: dict[str, Metric] = {"rouge": Metric("ROUGE-L", +1, 1), "loss": Metric("loss", -1, 3)}


@dataclass(frozen=True)
class Comparison:
    """How much better than contestant `name` the adapter is; `better`: by more than the 95 % error."""

    name: str
    metric: str
    mean: float
    error: float

    @property
    def better(self) -> bool:
        """Whether the difference exceeds its error."""
        return self.mean > self.error


def compare(record: Mapping[str, Any]) -> list[Comparison]:
    """The adapter against every other contestant, in every number that both have."""
    groups = [example["group"] for example in record["examples"]]
    contestants = {c["name"]: c for c in record["contestants"]}
    ours = contestants[OURS]
    found = []
    for name, other in contestants.items():
        for key, metric in METRICS.items():
            if name == OURS or not other.get(key):
                continue
            signed = [[metric.sign * value for value in side[key]] for side in (ours, other)]
            difference = paired_difference(signed[0], signed[1], groups)
            found.append(Comparison(name, key, difference.mean, difference.error))
    return found
