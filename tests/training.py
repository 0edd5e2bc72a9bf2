"""Helpers of the Trainer's tests: small runs that can be told apart bit by bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROWS = 20  # an epoch of 5 batches of 4


def rows(n: int = ROWS, vocabulary: int = 64) -> list[dict[str, torch.Tensor]]:
    """Token sequences, each its own label."""
    ids = torch.randint(3, vocabulary, (n, 9), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row} for row in ids]


def classified(n: int = ROWS) -> list[dict[str, torch.Tensor]]:
    """Token sequences with one of three classes."""
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"].sum() % 3} for row in rows(n)]


def options(**given: Any) -> dict[str, Any]:
    """TrainingArguments for a run of six steps, with `given` over them."""
    fixed: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    return {**fixed, **given}


def trainer(model: Any, folder: Path, **given: Any) -> Any:
    """The stock Trainer on `rows()`."""
    from transformers import Trainer, TrainingArguments

    train_dataset = given.pop("train_dataset", None) or rows()
    extra = {name: given.pop(name) for name in ("optimizers", "callbacks", "compute_metrics") if name in given}
    arguments = TrainingArguments(str(folder), **options(**given))
    return Trainer(model, arguments, train_dataset=train_dataset, eval_dataset=train_dataset[:8], **extra)


def logged(run: Any, *names: str) -> list[Any]:
    """What was logged at each step: the loss, the gradient's norm and the rate, unless `names` says otherwise."""
    names = names or ("loss", "grad_norm", "learning_rate")
    return [tuple(entry.get(n) for n in names) for entry in run.state.log_history if names[0] in entry]


def same(mine: Any, other: Any) -> bool:
    """Nested containers of tensors and numbers: equal in every bit."""
    if isinstance(mine, torch.Tensor):
        return mine.dtype == other.dtype and torch.equal(mine, other)
    if isinstance(mine, Mapping):
        return mine.keys() == other.keys() and all(same(mine[key], other[key]) for key in mine)
    if isinstance(mine, Sequence) and not isinstance(mine, str):
        return len(mine) == len(other) and all(map(same, mine, other))
    return bool(mine == other)
