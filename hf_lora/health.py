"""Is an adapter fit to be used and published: finite, trained, not degenerate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import LoRAMismatchError
from .spectrum import effective_rank, parts, singular_values
from .values import AdapterValue, Factors

__all__ = ["Finding", "examine", "parts_of", "require_publishable"]

_ONE_DIRECTION = 1.05  # an effective rank below this, where the rank is _ENOUGH or more
_ENOUGH = 4


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


def parts_of(value: AdapterValue) -> dict[tuple[str, str], Factors]:
    """(module path, role) → factors: each role's of a fused layer, or ("path", "") → those of the whole layer."""
    return {(path, role): part for path, factors in value.factors.items() for role, part in parts(factors)}


def examine(value: AdapterValue, spectra: Mapping[tuple[str, str], Tensor] | None = None) -> tuple[Finding, ...]:
    """What is odd about an adapter; empty if it is healthy.

    non-finite: a tensor holds NaN or infinity. untouched: ΔW is zero everywhere, and nothing else was trained, so that
    the model computes what its base does. partly untouched: ΔW is zero in some layers. collapsed: in some layers ΔW has
    an effective rank below 1.05 while the rank is 4 or more. In a fused layer each role's rows are looked at.

    Args:
        value: the adapter.
        spectra: the singular values of `parts_of(value)`, where they are known already.
    """
    broken = tuple(name for name, tensor in _named(value) if not torch.isfinite(tensor).all())
    if broken:
        return (
            Finding("non-finite", broken, f"{len(broken)} of the tensors hold NaN or infinity: {_some(broken)}.", True),
        )
    found = parts_of(value)
    names = {key: f"{key[0]} ({key[1]})" if key[1] else key[0] for key in found}
    zero = {key for key, part in found.items() if not part.A.any() or not part.B.any()}
    still = tuple(names[key] for key in found if key in zero)
    if len(zero) == len(found):
        if not value.biases and not value.modules:
            message = "ΔW is zero everywhere: it was never trained, and the model with it computes what its base does."
            return (Finding("untouched", still, message, True),)
        message = "ΔW is zero everywhere: only the biases or modules that it holds whole can differ from the base."
        return (Finding("partly untouched", still, message, False),)
    findings = []
    if zero:
        message = f"In {len(zero)} of {len(found)} places ΔW is zero, so they do nothing: {_some(still)}."
        findings.append(Finding("partly untouched", still, message, False))
    flat = tuple(
        names[key]
        for key, part in found.items()
        if key not in zero
        and part.rank >= _ENOUGH
        and effective_rank(singular_values(part) if spectra is None else spectra[key]) < _ONE_DIRECTION
    )
    if flat:
        message = f"In {len(flat)} of {len(found)} places ΔW has one direction only: {_some(flat)}."
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
    pairs += [(f"{path}.{name}", t) for path, f in value.factors.items() for name, t in f.extras.items()]
    pairs += [*value.biases.items(), *value.embeddings.items()]
    pairs += [(f"{path}.{key}", t) for path, state in value.modules.items() for key, t in state.items()]
    return [(name, tensor) for name, tensor in pairs if tensor.is_floating_point()]


def _some(names: tuple[str, ...], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
