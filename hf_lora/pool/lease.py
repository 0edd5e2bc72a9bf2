"""A lease: adapters that stay in their device slots until it is released."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from ..errors import LoRAError, LoRANameError, LoRAStateError
from ..model import state_of
from ..switching import Which, route_lora, use_lora

__all__ = ["Lease", "ids_of"]


class Lease:
    """Adapters that stay on the device until `release`; also a context manager, which releases at its end.

    Args:
        ids: the adapters that it holds.
        failures: id → why, of those asked for that could not be loaded (`acquire(strict=False)`).
    """

    def __init__(
        self, model: nn.Module, ids: Sequence[str], failures: Mapping[str, LoRAError], release: Callable[[], None]
    ) -> None:
        self.ids = tuple(ids)
        self.failures: Mapping[str, LoRAError] = MappingProxyType(dict(failures))
        self._model, self._release = model, release
        self._open = threading.Lock()

    def __contains__(self, adapter_id: object) -> bool:
        return adapter_id in self.ids

    @contextlib.contextmanager
    def route(self, rows: Sequence[str | None]) -> Iterator[nn.Module]:
        """Within the block, row i of every batch goes through adapter `rows[i]`; None is the base. As `route_lora`.

        Raises:
            LoRANameError: a row names an adapter that the lease does not hold. LoRAStateError: it was released.
        """
        if not isinstance(rows, str):
            self._require(row for row in rows if row is not None)
        if state_of(self._model) is None and all(row is None for row in rows):
            yield self._model  # no adapter has ever been on this model
            return
        with route_lora(self._model, rows):
            yield self._model

    @contextlib.contextmanager
    def use(self, which: Which) -> Iterator[nn.Module]:
        """Within the block, `which` is active for all rows: a name, names, {name: weight}, or None. As `use_lora`.

        Raises:
            LoRANameError: it names an adapter that the lease does not hold. LoRAStateError: it was released.
        """
        self._require(ids_of(which))
        if state_of(self._model) is None:
            yield self._model
            return
        with use_lora(self._model, which):
            yield self._model

    def _require(self, ids: Any) -> None:
        if self._open.locked():
            raise LoRAStateError("This lease was released.", remedy="Acquire the adapters again.")
        for adapter_id in ids:
            if adapter_id not in self.ids:
                if adapter_id in self.failures:
                    raise self.failures[adapter_id]
                raise LoRANameError(
                    f"The lease does not hold {adapter_id!r}.",
                    name=str(adapter_id),
                    value=adapter_id,
                    expected=self.ids,
                    remedy="Acquire every adapter of the batch together.",
                )

    def release(self) -> None:
        """Let the adapters go; again is harmless."""
        if self._open.acquire(blocking=False):
            self._release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def ids_of(which: Which) -> tuple[str, ...]:
    """The adapters that `which` names."""
    if which is None:
        return ()
    return (which,) if isinstance(which, str) else tuple(which)
