"""What a training run was, as plain numbers: for the model card, and for whoever asks a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from .errors import LoRAFileError

__all__ = ["TRAINER_STATE", "RunFacts"]

TRAINER_STATE = "trainer_state.json"
_LARGEST = 64 * 2**20  # bytes; a line of the log is about 200
# What Trainer logs beside measurements.
_NO_METRIC = ("_runtime", "_per_second", "_model_preparation_time")

Scalar = str | int | float | bool


@dataclass(frozen=True)
class RunFacts:
    """One training run, in numbers. Holds no path and no secret.

    Args:
        steps: optimizer steps done.
        epochs: passes over the training data; None if unknown.
        seconds: wall time of the training; None if unknown.
        trainable: parameters that trained; 0 if unknown.
        total: parameters of the base; 0 if unknown.
        settings: name → value of what was chosen (learning rate, batch size, seed, …).
        losses: (step, training loss), in order.
        evaluations: (step, {metric: value}), in order; names as Trainer's ("eval_loss").
        best: (metric, value, step) of the best evaluation by the run's own measure; None if there is none.
        datasets: ids of data sets on the Hub.
        versions: package → version.
    """

    steps: int
    epochs: float | None = None
    seconds: float | None = None
    trainable: int = 0
    total: int = 0
    settings: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    losses: tuple[tuple[int, float], ...] = ()
    evaluations: tuple[tuple[int, Mapping[str, float]], ...] = ()
    best: tuple[str, float, int] | None = None
    datasets: tuple[str, ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_log(cls, state: Mapping[str, Any], **known: Any) -> RunFacts:
        """The facts in what Trainer's state says, as `TrainerState` keeps it and trainer_state.json holds it.

        Args:
            state: global_step, epoch, log_history, best_metric, best_global_step, …
            known: further fields of `RunFacts`.
        """
        log = state.get("log_history")
        entries = [entry for entry in log if isinstance(entry, Mapping)] if isinstance(log, Sequence) else []
        losses, evaluations, seconds = [], [], None
        for entry in entries:
            step = entry.get("step")
            if not _whole(step):
                continue
            if _number(entry.get("loss")):
                losses.append((step, float(entry["loss"])))
            measured = {
                key: float(value)
                for key, value in entry.items()
                if isinstance(key, str) and key.startswith("eval_") and _number(value) and not key.endswith(_NO_METRIC)
            }
            if measured:
                evaluations.append((step, measured))
            if _number(entry.get("train_runtime")):
                seconds = float(entry["train_runtime"])
        facts = {
            "steps": steps if _whole(steps := state.get("global_step")) else 0,
            "epochs": float(state["epoch"]) if _number(state.get("epoch")) else None,
            "seconds": seconds,
            "losses": tuple(sorted(losses, key=lambda entry: entry[0])),
            "evaluations": tuple(sorted(evaluations, key=lambda entry: entry[0])),
            "best": _best(state, evaluations),
        }
        return cls(**{**facts, **known})

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> RunFacts | None:
        """The facts in a folder's trainer_state.json; None if there is no such file.

        Raises:
            LoRAFileError: the file is too large, or is no JSON object.
        """
        path = Path(directory) / TRAINER_STATE
        if not path.is_file():
            return None
        problem = ""
        state: Any = None
        try:
            if path.stat().st_size > _LARGEST:
                problem = f"has more than {_LARGEST >> 20} MiB"
            else:
                state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            problem = f"cannot be read: {error}"
        if not problem and not isinstance(state, dict):
            problem = "is no JSON object"
        if problem:
            raise LoRAFileError(
                f"{path} {problem}.",
                name=TRAINER_STATE,
                value=str(path),
                remedy="Delete it: an adapter is whole without it, and its card then says nothing of the training.",
            )
        return cls.from_log(state)


def _number(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _whole(value: Any) -> TypeGuard[int]:
    """Whether it can be a number of steps."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _best(
    state: Mapping[str, Any], evaluations: Sequence[tuple[int, Mapping[str, float]]]
) -> tuple[str, float, int] | None:
    """The metric whose value at the best step is the best metric: Trainer's state does not name it."""
    value, step = state.get("best_metric"), state.get("best_global_step")
    if not _number(value) or not _whole(step):
        return None
    named = [metric for at, metrics in evaluations if at == step for metric, found in metrics.items() if found == value]
    return (named[0], float(value), step) if named else None
