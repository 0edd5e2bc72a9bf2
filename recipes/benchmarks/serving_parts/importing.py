"""`import hf_lora` in fresh interpreters: recipes/benchmarks/import_time.py, as a section of the table."""

from __future__ import annotations

from pathlib import Path

import import_time

from .measure import Case, Check, Goal, Outcome
from .sizes import Sizes

__all__ = ["measure_import"]

_GOAL = Goal(0.15, "value", "design")


def measure_import(root: Path, sizes: Sizes) -> list[Case]:
    """What the import adds to that of transformers' PreTrainedModel."""
    times = import_time.measure(sizes.import_runs, warmup=int(sizes.real))  # exits if more is imported than may be
    check = Check("the modules that it must leave alone", 0.0, 0.0)
    names = {import_time.BASE: (None, "transformers"), import_time.OURS: (_GOAL, "hf_lora")}
    outcomes = [Outcome(who, dict(enumerate(times[name])), goal, check) for name, (goal, who) in names.items()]
    case = Case("from transformers import PreTrainedModel; import hf_lora after it", "s", "transformers", outcomes)
    case.notes.append("Fresh interpreters, so neither garbage collection nor threads are as in the other sections.")
    return [case]
