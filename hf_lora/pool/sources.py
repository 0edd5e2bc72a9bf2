"""Where a pool's adapters come from: an id → its value, within limits that are checked before tensors are read."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import hub, safefile, store
from ..errors import LoRAConfigError, LoRAFileError, LoRANameError
from ..loading import read_source
from ..values import AdapterValue
from .refusals import too_large

__all__ = ["Place", "Source", "SourceLike"]

_HEADERS = 2**20  # what a file may have beside its tensors; its own header says exactly, once it is here

Place = str | os.PathLike[str] | AdapterValue
"""A folder, a repo's id, or the adapter itself."""

SourceLike = str | os.PathLike[str] | Mapping[str, Place] | Callable[[str], Place] | None


class Source:
    """Reads adapters by id.

    Args:
        source: None: an id is a folder or a repo. A folder: an id is a folder in it. A mapping or a function: from an
            id to a folder, a repo or a value.
        max_rank, max_bytes: of one adapter; None is no limit.
        allow_pickle, options: as of `read_source`.
    """

    def __init__(
        self,
        source: SourceLike,
        *,
        max_rank: int | None,
        max_bytes: int | None,
        allow_pickle: bool,
        options: Mapping[str, Any],
    ) -> None:
        self.max_rank, self.max_bytes = max_rank, max_bytes
        self._allow_pickle, self._options = allow_pickle, options
        self._locate: Callable[[str], Place]
        if source is None:
            self._locate = lambda adapter_id: adapter_id
        elif isinstance(source, Mapping):
            self._locate = lambda adapter_id: _looked_up(source, adapter_id)
        elif isinstance(source, (str, os.PathLike)):
            root = Path(source)
            if not os.path.isdir(root):
                raise LoRAConfigError(
                    f"source={os.fspath(source)!r} is no folder.",
                    name="source",
                    value=os.fspath(source),
                    remedy="Give the folder that holds the adapters' folders, or leave source out for Hub ids.",
                )
            self._locate = lambda adapter_id: _inside(root, adapter_id)
        elif callable(source):
            self._locate = source
        else:
            raise LoRAConfigError(
                f"source={source!r} gives no adapters.",
                name="source",
                value=source,
                expected="None, a folder, a mapping or a function",
            )

    def read(self, adapter_id: str) -> tuple[AdapterValue, int]:
        """The adapter, and how many bytes of weights were read for it.

        Raises:
            LoRAPoolError: it is over a limit (`kind` "too large"). LoRAError: as `read_source`. Whatever the source
            itself raises.
        """
        place = self._locate(adapter_id)
        if isinstance(place, AdapterValue):
            self._check_value(adapter_id, place)
            return place.copy(), 0  # its owner may go on training it
        if not isinstance(place, (str, os.PathLike)):
            raise LoRAFileError(
                f"The source gave {place!r} for {adapter_id!r}.",
                name=adapter_id,
                value=place,
                expected="a path, a repo's id or an adapter",
            )
        folder = Path(place)
        if not os.path.exists(folder):
            if self.max_bytes is not None:
                self._refuse(adapter_id, 0, hub.weights_size(os.fspath(place), **self._options) or 0, _HEADERS)
            folder = hub.fetch(os.fspath(place), allow_pickle=self._allow_pickle, **self._options)
        nbytes = self._check_files(adapter_id, folder)
        value = read_source(folder, allow_pickle=self._allow_pickle)
        self._check_value(adapter_id, value)
        return value, nbytes

    def _check_files(self, adapter_id: str, folder: Path) -> int:
        """Refuse from the config and the weights' header what is too large; the bytes of the weights."""
        if not os.path.isdir(folder):
            return 0  # read_source says it better
        config = store.read_config(folder)
        ranks = [config.r, *config.rank_pattern.values()]
        path = folder / store.WEIGHTS_NAME
        if not path.is_file():
            self._refuse(adapter_id, max(ranks), 0)
            pickle = folder / store.PICKLE_NAME
            size = pickle.stat().st_size if pickle.is_file() else 0
            self._refuse(adapter_id, 0, size)
            return size
        with safefile.reading(path) as file:
            header = safefile.read_header(file, path)
        if config.target_parameters is None:  # else a pair holds every expert's: the value tells
            ranks = [
                entry.shape[0]
                for name, entry in header.entries.items()
                if entry.shape and name.endswith((".lora_A.weight", ".lora_embedding_A"))
            ]
        self._refuse(adapter_id, max(ranks, default=0), header.data_size)
        return header.data_size

    def _check_value(self, adapter_id: str, value: AdapterValue) -> None:
        self._refuse(adapter_id, max(factors.rank for factors in value.factors.values()), value.nbytes)

    def _refuse(self, adapter_id: str, rank: int, nbytes: int, spare: int = 0) -> None:
        if self.max_rank is not None and rank > self.max_rank:
            raise too_large(adapter_id, "max_rank", f"rank {rank}", rank, self.max_rank)
        if self.max_bytes is not None and nbytes > self.max_bytes + spare:
            raise too_large(adapter_id, "max_bytes", f"{nbytes:,} bytes", nbytes, self.max_bytes)


def _looked_up(source: Mapping[str, Place], adapter_id: str) -> Place:
    try:
        return source[adapter_id]
    except KeyError:
        near = difflib.get_close_matches(adapter_id, [*source][:10_000], n=3)
        hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
        raise LoRANameError(
            f"The pool's source has no adapter {adapter_id!r}.{hint}",
            name=adapter_id,
            value=adapter_id,
            remedy="Name one that the source has.",
        ) from None


def _inside(root: Path, adapter_id: str) -> Path:
    """The folder of this id below `root`, which it may not leave, by a link either."""
    parts = adapter_id.split("/")
    bad = any(part in ("", ".", "..") or "\\" in part or ":" in part or not part.isprintable() for part in parts)
    folder = root.joinpath(*parts) if not bad else root
    if bad or not folder.resolve().is_relative_to(root.resolve()):
        raise LoRANameError(
            f"The id {adapter_id!r} is no folder inside {str(root)!r}.",
            name=adapter_id,
            value=adapter_id,
            expected='such as "task" or "org/task"',
            remedy="Name a folder below the pool's source.",
        )
    if not os.path.isdir(folder):
        raise LoRANameError(
            f"The pool's source {str(root)!r} has no adapter {adapter_id!r}.",
            name=adapter_id,
            value=adapter_id,
            remedy="Name one that the source has.",
        )
    return folder
