"""Numbers of ours in what `Trainer.log` is given, before it reaches log_history and the integrations of `report_to`.

A callback's `on_log` is too late: callbacks that a user gives run after the reporting ones.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from .importing import when_imported
from .patching import Registry

__all__ = ["Reports", "install"]


class Reports:
    """What a callback inherits to add numbers to Trainer's logs."""

    def numbers(self, logs: Mapping[str, float]) -> Mapping[str, float]:
        """What to add to these logs."""
        raise NotImplementedError


def install(registry: Registry) -> None:
    """Wrap `Trainer.log` once `transformers.trainer` is imported; it is not imported here."""
    when_imported("transformers.trainer", lambda module: _wrap(registry, module))


def _wrap(registry: Registry, module: ModuleType) -> None:
    trainer: Any = module.Trainer
    original = trainer.log

    @functools.wraps(original)
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Reports):
                logs.update(callback.numbers(logs))
        return original(self, logs, *args, **kwargs)

    registry.set(trainer, "log", log)
