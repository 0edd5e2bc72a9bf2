"""Run something when a module is imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = ["forget", "when_imported"]


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds a watched module with the other finders, and calls back once it has run."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.callbacks:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._call_after(spec.loader, name)
                return spec
        return None

    def _call_after(self, loader: Any, name: str) -> None:
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            for callback in self.callbacks.pop(name, []):
                callback(module)

        loader.exec_module = exec_module  # this loader is of this module alone


_WATCHER = _Watcher()


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback` with the module `name`: now if it is imported, else once it has been."""
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        callback(module)
        return
    _WATCHER.callbacks.setdefault(name, []).append(callback)
    if _WATCHER not in sys.meta_path:
        sys.meta_path.insert(0, _WATCHER)


def forget() -> None:
    """Wait for no module any more."""
    _WATCHER.callbacks.clear()
    if _WATCHER in sys.meta_path:
        sys.meta_path.remove(_WATCHER)
