"""Is an adapter fit to be used and published: finite, trained, not degenerate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import LoRAMismatchError
from .spectrum import effective_rank, singular_values
from .values import AdapterValue

__all__ = ["Finding", "examine", "require_publishable"]


@dataclass(frozen=True)
class Finding:
    """One thing that is odd about an adapter.

    Args:
        kind: "non-finite", "untouched", "partly untouched" or "collapsed".
        where: module paths or tensor names.
        message: one sentence.
        fatal: the adapter is useless as it is.
    """

    kind: str
    where: tuple[str, ...]
    message: str
    fatal: bool


def examine(value: AdapterValue) -> tuple[Finding, ...]:
    """What is odd about an adapter; empty if it is healthy.

    non-finite: a tensor holds NaN or infinity. untouched: every B is zero, and nothing else was trained, so that the
    model computes what its base does. partly untouched: some layers' B is zero. collapsed: in some layers ΔW has an
    effective rank below 1.05 while the rank is 4 or more.
    """
    findings = []
    broken = tuple(name for name, tensor in _named(value) if not torch.isfinite(tensor).all())
    if broken:
        findings.append(
            Finding("non-finite", broken, f"{len(broken)} of the tensors hold NaN or infinity: {_some(broken)}.", True)
        )
        return tuple(findings)
    zero = tuple(path for path, factors in value.factors.items() if not factors.B.count_nonzero())
    if len(zero) == len(value.factors):
        if not value.biases and not value.modules:
            message = (
                "Every B is zero: the adapter was never trained, and the model with it computes what its base does."
            )
            findings.append(Finding("untouched", zero, message, True))
        else:
            message = "Every B is zero: only the biases or modules that it holds whole can differ from the base."
            findings.append(Finding("partly untouched", zero, message, False))
        return tuple(findings)
    if zero:
        message = f"In {len(zero)} of {len(value.factors)} layers B is zero, so they do nothing: {_some(zero)}."
        findings.append(Finding("partly untouched", zero, message, False))
    flat = tuple(
        path
        for path, factors in value.factors.items()
        if path not in zero and factors.rank >= 4 and effective_rank(singular_values(factors)) < 1.05
    )
    if flat:
        message = f"In {len(flat)} of {len(value.factors)} layers ΔW has one direction only: {_some(flat)}."
        findings.append(Finding("collapsed", flat, message, False))
    return tuple(findings)


def require_publishable(value: AdapterValue) -> None:
    """Raise `LoRAMismatchError` for an adapter that is not finite or was never trained."""
    fatal = [finding for finding in examine(value) if finding.fatal]
    if fatal:
        raise LoRAMismatchError(
            "This adapter is not fit to be published.",
            name=fatal[0].kind,
            value=fatal[0].where,
            facts=[finding.message for finding in fatal],
            remedy="Train it (or load the checkpoint that you mean); force=True publishes it all the same.",
        )


def _named(value: AdapterValue) -> list[tuple[str, torch.Tensor]]:
    pairs = [(f"{path}.{side}", getattr(f, side)) for path, f in value.factors.items() for side in ("A", "B")]
    pairs += value.biases.items()
    pairs += [(f"{path}.{key}", t) for path, state in value.modules.items() for key, t in state.items()]
    return [(name, tensor) for name, tensor in pairs if tensor.is_floating_point()]


def _some(names: tuple[str, ...], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
