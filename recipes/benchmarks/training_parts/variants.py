"""The variants that recipes/benchmarks/variants.py measures, and how long each start takes."""

from __future__ import annotations

import time

import torch
from serving_parts import subjects
from serving_parts.measure import TOLERANCE, Case, Check, Competitor, difference, in_turn

from hf_lora import LoRAConfig

from . import sections
from .steps import Setting, Sizes, Subjects, inputs

__all__ = ["SETTINGS", "STARTS", "TITLES", "measure_begin"]

TITLES = {
    "time": sections.TITLES["time"],
    "saved": sections.TITLES["saved"],
    "begin": "How long it takes to begin: add_lora on all linear layers, CPU time of one thread",
}


RANK = 16


def _setting(name: str, dropout: float = 0.0, **fields: object) -> Setting:
    return Setting(name, subjects.ALL, RANK, dropout, fields=tuple(fields.items()))


SETTINGS = (
    _setting("LoRA"),
    _setting("LoRA, dropout 0.05", 0.05),
    _setting("DoRA", use_dora=True),
    _setting("DoRA, dropout 0.05", 0.05, use_dora=True),
    _setting("LoRA-FA", freeze_a=True),
    _setting("PiSSA", init="pissa_niter_4"),
)
STARTS = ("kaiming", "orthogonal", "olora", "pissa_niter_4", "pissa", "mica")


def measure_begin(sizes: Sizes) -> list[Case]:
    """Each start once a round; beforehand, that it leaves the logits as they were."""
    base = Subjects(sizes, torch.float32).base.eval()
    ids = inputs(base, (1, 8))
    checks, competitors = {}, []
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        for init in STARTS:
            config = LoRAConfig(r=RANK, target_modules=list(subjects.ALL), init=init)
            base.add_lora(config)
            checks[init] = Check("the base", difference(base(input_ids=ids).logits, expected), TOLERANCE)
            base.remove_lora()
            competitors.append(Competitor(init, lambda c=config: base.add_lora(c), after=base.remove_lora))
    label = f"{sum(1 for n, _ in base.named_modules() if n.endswith(subjects.ALL))} matrices, r={RANK}"
    return [in_turn(label, competitors, rounds=1, checks=checks, unit="s", warmup=0, clock=time.process_time)]
