"""`generate` runs vision towers by themselves, before the model's forward: row maps are read from its arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ..rowmaps import told
from .importing import when_imported
from .patching import Registry

__all__ = ["install"]

_PREPARE = "_maybe_prepare_encoder_kwargs_for_generation"  # older releases run towers in the forward alone


def install(registry: Registry) -> None:
    """Wrap what runs the towers once it is imported."""
    when_imported("transformers.generation.utils", lambda module: _wrap(registry, module.GenerationMixin))


def _wrap(registry: Registry, mixin: type) -> None:
    stock = vars(mixin).get(_PREPARE)
    if stock is not None:
        registry.set(mixin, _PREPARE, _prepare(stock))


def _prepare(stock: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        name = given.get("model_input_name") or self.main_input_name
        with told(self, {**given["model_kwargs"], name: given["inputs_tensor"]}):
            return stock(self, *args, **kwargs)

    return prepare
