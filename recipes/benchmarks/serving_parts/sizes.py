"""How much is measured: what is published, and a size that a test can run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from . import subjects

__all__ = ["FULL", "SMOKE", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """The sizes of every section."""

    rounds: int = 40
    peft_every: int = 2  # PEFT's mixed batches, and its loads onto many, take part in each n-th round
    # rows
    rows: int = 32
    distinct: tuple[int, ...] = (1, 8, 32)
    past: int = 32
    rows_shape: dict[str, Any] = field(default_factory=lambda: dict(subjects.ROWS))
    # load
    load_shape: dict[str, Any] = field(default_factory=lambda: dict(subjects.SMOLLM2))
    load_rank: int = 16
    load_residents: tuple[int, ...] = (0, 9, 99)
    load_rounds: int = 12
    # growth, switch
    deep_shape: dict[str, Any] = field(default_factory=lambda: dict(subjects.DEEP))
    residents: tuple[int, ...] = (1, 10, 100, 1000)
    peft_residents: tuple[int, ...] = (1, 10, 100)
    # merge, generate, bytes: SmolLM2-135M itself
    real: bool = True
    merge_rounds: int = 9
    generate_rounds: int = 5
    new_tokens: int = 32
    import_runs: int = 11
    profiles: int = 5

    def repeated(self, rounds: int) -> Sizes:
        """With so many rounds of the short timings, and of the others in proportion."""
        fields = ("rounds", "load_rounds", "merge_rounds", "generate_rounds", "import_runs")
        return replace(self, **{name: max(round(getattr(self, name) * rounds / self.rounds), 1) for name in fields})


FULL = Sizes()
SMOKE = Sizes(
    rounds=2,
    peft_every=1,
    rows=4,
    distinct=(1, 2, 4),
    past=4,
    rows_shape=dict(subjects.TINY),
    load_shape=dict(subjects.TINY),
    load_rank=4,
    load_residents=(0, 1, 2),
    load_rounds=2,
    deep_shape=dict(subjects.TINY),
    residents=(1, 4, 8),
    peft_residents=(1, 4),
    real=False,
    merge_rounds=1,
    generate_rounds=1,
    new_tokens=3,
    import_runs=1,
    profiles=1,
)
