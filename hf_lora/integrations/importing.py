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
    """Finds a module with the other finders, and calls back once it has run.

    It looks at every module of a package that is watched at all: a callback may be asked for while its module already
    runs (transformers.trainer imports transformers.modeling_utils, whose callback then asks for transformers.trainer).
    """

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callable[[ModuleType], None]]] = {}
        self.packages: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.packages:
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
            while callbacks := self.callbacks.pop(name, []):  # one may ask for another of the same module
                for callback in callbacks:
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
    _WATCHER.packages.add(name.partition(".")[0])
    if _WATCHER not in sys.meta_path:
        sys.meta_path.insert(0, _WATCHER)


def forget() -> None:
    """Wait for no module any more."""
    _WATCHER.callbacks.clear()
    _WATCHER.packages.clear()
    if _WATCHER in sys.meta_path:
        sys.meta_path.remove(_WATCHER)
