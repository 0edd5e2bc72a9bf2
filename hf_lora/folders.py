"""The adapters below a folder: what each is, from its config and the header of its weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import LoRAError, LoRAFileError
from .safefile import read_header, reading
from .store import CONFIG_NAME, WEIGHTS_NAME, read_config

__all__ = ["FolderAdapter", "adapters_below"]


@dataclass(frozen=True)
class FolderAdapter:
    """One adapter on disk.

    Args:
        path: its folder, relative to the one that was searched.
        base_model: as its config names it. rank: r of the config.
        parameters, nbytes: of its tensors; None if its weights are not safetensors.
        problem: why it cannot be read, in a sentence; the other fields then say what is known.
    """

    path: str
    base_model: str | None = None
    rank: int | None = None
    parameters: int | None = None
    nbytes: int | None = None
    problem: str | None = None


def adapters_below(folder: str | os.PathLike[str]) -> list[FolderAdapter]:
    """Every folder at or below `folder` with an adapter_config.json, in the order of their paths.

    No weights are read. Links to folders are not followed.

    Raises:
        LoRAFileError: there is no such folder.
    """
    root = Path(folder)
    if not os.path.isdir(root):
        raise LoRAFileError(f"{str(root)!r} is no folder.", name=str(root), value=str(root), remedy="Check the path.")
    return sorted((_look(root, found) for found in _folders(root)), key=lambda adapter: adapter.path)


def _folders(root: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if CONFIG_NAME in files:
            yield Path(path)


def _look(root: Path, folder: Path) -> FolderAdapter:
    path = folder.relative_to(root).as_posix()
    base, rank = None, None
    try:
        config = read_config(folder)
        base, rank = config.base_model, config.r
        file = folder / WEIGHTS_NAME
        with reading(file) as stream:
            entries = read_header(stream, file).entries.values()
    except LoRAError as error:
        return FolderAdapter(path, base, rank, problem=error.message)
    sizes = [(entry.stop - entry.start, entry.dtype.itemsize) for entry in entries]
    return FolderAdapter(path, base, rank, sum(n // size for n, size in sizes), sum(n for n, _ in sizes))
