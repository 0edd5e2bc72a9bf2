"""Replace attributes of other packages' objects and give back exactly what stood there."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

__all__ = ["Registry"]

_ABSENT: Any = type("_Absent", (), {"__repr__": lambda self: "<absent>"})()


@dataclass
class _Patch:
    owner: Any
    name: str
    original: Any  # _ABSENT: the owner itself had no such attribute (it may have inherited one)
    current: Any


class Registry:
    """Records the original of every attribute that it replaces.

    What counts is the owner's own namespace (`vars(owner)`): an attribute that a class only inherited is deleted on
    restore, not copied down, and staticmethod or classmethod objects come back as the same objects.
    """

    def __init__(self) -> None:
        self._patches: dict[tuple[int, str], _Patch] = {}
        self._lock = threading.RLock()

    def set(self, owner: Any, name: str, new: Any) -> None:
        """Set `owner.name = new`, keeping the first original however often it is called.

        Args:
            owner: a class, module or instance with a `__dict__`.
            name: the attribute.
            new: its new value; a class takes functions, staticmethods, properties as in its body.
        """
        with self._lock:
            key = (id(owner), name)
            patch = self._patches.get(key)
            if patch is None:
                patch = _Patch(owner, name, vars(owner).get(name, _ABSENT), new)
                self._patches[key] = patch
            patch.current = new
            setattr(owner, name, new)

    def original(self, owner: Any, name: str) -> Any:
        """What `owner.name` was before the first `set` (looked up as an attribute, so bound and inherited as usual).

        Raises:
            KeyError: nothing was set there.
            AttributeError: nothing stood there, not even by inheritance.
        """
        patch = self._patches[(id(owner), name)]
        if patch.original is not _ABSENT:
            original = patch.original
            return original.__func__ if isinstance(original, (staticmethod, classmethod)) else original
        if isinstance(owner, type):
            return getattr(super(owner, owner), name)
        return getattr(type(owner), name)

    def is_set(self, owner: Any, name: str) -> bool:
        """Whether `owner.name` is ours at this moment."""
        patch = self._patches.get((id(owner), name))
        return patch is not None and vars(owner).get(name, _ABSENT) is patch.current

    def __len__(self) -> int:
        return len(self._patches)

    def restore(self) -> tuple[str, ...]:
        """Give back every original, last replaced first; a second call does nothing.

        An attribute that somebody else replaced after us is left alone: putting our original there would undo their
        work. Since ours may be what theirs calls, ours has to keep working as a call-through.

        Returns:
            The attributes left alone, as `owner.name`.
        """
        left: list[str] = []
        with self._lock:
            while self._patches:
                _, patch = self._patches.popitem()
                if vars(patch.owner).get(patch.name, _ABSENT) is not patch.current:
                    left.append(f"{getattr(patch.owner, '__name__', patch.owner)}.{patch.name}")
                elif patch.original is _ABSENT:
                    delattr(patch.owner, patch.name)
                else:
                    setattr(patch.owner, patch.name, patch.original)
        return tuple(left)
