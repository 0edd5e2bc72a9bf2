"""A small model of a model_type and what it eats: the first way of shrinking, and class, that runs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .classes import classes
from .feed import VARIANTS, Given, inputs
from .shrink import WAYS, small_config
from .table import EXCEPTIONS

__all__ = ["Built", "CannotBuild", "build", "run", "tensors"]

MOST = 30_000_000  # parameters


class CannotBuild(Exception):
    """No small model; says what each attempt said."""


@dataclass
class Built:
    """A model that runs.

    Attributes:
        model: in eval mode, with random weights.
        given: of its forward.
        way: of shrinking (see `shrink`), and of feeding where it is another than the first (see `feed`).
    """

    model: Any
    given: Given
    way: str


def build(model_type: str, say: Any = None) -> Built:
    """A small model, fed once. Raises CannotBuild."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if skip := EXCEPTIONS.get(model_type, {}).get("skip"):
        raise CannotBuild(skip)
    found, first = classes(model_type), EXCEPTIONS.get(model_type, {}).get("class")
    found.sort(key=lambda of: of.__name__ != first)
    if not found:
        raise CannotBuild("no model class takes this config by itself: it is a part of another model's")
    said: dict[str, None] = {}
    for of in found[:3]:
        for variants in (VARIANTS, ("text",)):
            for way in WAYS:
                for line, one in _tries(of, CONFIG_MAPPING[model_type], model_type, way, variants):
                    if isinstance(one, Built):
                        return one
                    said[line] = None
                    if say is not None:
                        say(line, one)
    raise CannotBuild(next(iter(said)), list(said))


def _tries(of: Any, config_class: Any, model_type: str, way: str, variants: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """What each try came to: a Built, or an error and a line about it."""

    def line(error: Exception, variant: str = "") -> str:
        kind = f"{way}, {variant}" if variant else way
        return f"{of.__name__} ({kind}): {type(error).__name__}: {' '.join(str(error).split())[:160]}"

    try:
        model = _small(of, config_class, model_type, way)
    except Exception as error:  # noqa: BLE001  # another way may do
        yield line(error), error
        return
    for variant in variants:
        try:
            given = inputs(model, model_type, variant)
            _check(run(model, given), run(model, given))
        except LookupError as error:
            if not variant:
                yield line(error), error
        except Exception as error:  # noqa: BLE001  # another variant may do
            yield line(error, variant), error
        else:
            yield "", Built(model, given, f"{way}, {variant}" if variant else way)


def _small(of: Any, config_class: Any, model_type: str, way: str) -> Any:
    config = small_config(config_class, model_type, way)
    with torch.device("meta"), contextlib.suppress(NotImplementedError, RuntimeError):
        count = sum(p.numel() for p in of._from_config(copy.deepcopy(config)).parameters())
        if count > MOST:
            raise ValueError(f"{count / 1e6:.0f} million parameters are too many")
    torch.manual_seed(EXCEPTIONS.get(model_type, {}).get("seed", 0))
    # Frozen first: torch chooses how it multiplies by requires_grad, and freezing alone may change a last bit.
    model = of._from_config(config).float().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():  # biases, positions, scales of layers that begin at (nearly) nothing
            if parameter.is_floating_point() and parameter.numel() and float(parameter.abs().max()) < 1e-2:
                parameter.normal_(std=0.05)
    return model


def _check(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    if not first:
        raise ValueError("its output holds no numbers")
    if not any(bool(t.isfinite().any()) for t in first.values()):
        raise ValueError("its output is not finite")
    if any(not torch.equal(t.nan_to_num(), second[k].nan_to_num()) for k, t in first.items()):
        raise ValueError("two equal forwards differ")


def run(model: Any, given: Given, grad: bool = False) -> dict[str, Tensor]:
    """Every tensor of numbers that the forward gives, by its place."""
    torch.manual_seed(1)
    with contextlib.nullcontext() if grad else torch.no_grad():
        return tensors(model(**copy.deepcopy(given)))


def tensors(found: Any, path: str = "") -> dict[str, Tensor]:
    """The floating-point tensors in an output, however deep."""
    if isinstance(found, Tensor):
        return {path: found} if found.is_floating_point() and found.numel() else {}
    if hasattr(found, "items"):
        parts = list(found.items())
    elif isinstance(found, (list, tuple)):
        parts = list(enumerate(found))
    else:
        return {}
    return {k: t for name, one in parts for k, t in tensors(one, f"{path}.{name}" if path else str(name)).items()}
