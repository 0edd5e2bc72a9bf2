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
            self.call(module, name)

        loader.exec_module = exec_module  # this loader is of this module alone

    def call(self, module: ModuleType, name: str) -> None:
        """Call back whoever waits for the module."""
        while callbacks := self.callbacks.pop(name, []):  # one may ask for another of the same module
            for callback in callbacks:
                callback(module)


_WATCHER = _Watcher()


class _BeingImported(importlib.machinery.ModuleSpec):
    """The spec of a module whose import began (in another thread, say) before the watcher could see it."""

    @property
    def _initializing(self) -> bool:  # importlib's own name, which it sets to False at the end
        return bool(vars(self)["_initializing"])

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        vars(self)["_initializing"] = value
        module = sys.modules.get(self.name)  # absent: its import failed
        if not value and module is not None:
            _WATCHER.call(module, self.name)


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback` with the module `name`: now if it is imported, else once it has been."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is not None and not getattr(spec, "_initializing", False):
        callback(module)
        return
    _WATCHER.callbacks.setdefault(name, []).append(callback)
    _WATCHER.packages.add(name.partition(".")[0])
    if _WATCHER not in sys.meta_path:
        sys.meta_path.insert(0, _WATCHER)
    if module is not None and type(spec) is importlib.machinery.ModuleSpec:
        spec.__class__ = _BeingImported
        if not vars(spec)["_initializing"]:  # it ended meanwhile
            _WATCHER.call(module, name)


def forget() -> None:
    """Wait for no module any more."""
    _WATCHER.callbacks.clear()
    _WATCHER.packages.clear()
    if _WATCHER in sys.meta_path:
        sys.meta_path.remove(_WATCHER)
