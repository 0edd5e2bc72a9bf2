"""A folder that appears when everything in it is written, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .. import safefile, scratch
from ..errors import LoRAFileError

__all__ = ["appearing", "refuse_out"]


def refuse_out(out: Path) -> None:
    """Raise `LoRAFileError` unless a folder can appear there: nothing there yet, or an empty one."""
    if os.path.islink(out) or (os.path.exists(out) and not os.path.isdir(out)):
        raise LoRAFileError(f"{out} is not a folder.", name=str(out), value=str(out), remedy="Give another folder.")
    if os.path.isdir(out) and any(out.iterdir()):
        raise LoRAFileError(
            f"{out} is not empty.",
            name=str(out),
            value=sorted(path.name for path in out.iterdir())[:20],
            remedy="Give a new folder, or empty it first.",
        )


@contextlib.contextmanager
def appearing(out: Path, needed: int) -> Iterator[Path]:
    """A folder beside `out` that gets its name at the end; on an error nothing of it is left."""
    with contextlib.ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(scratch.beside(out, folder=True))  # what killed merges left goes first
            free = shutil.disk_usage(out.parent).free
            if free < needed:
                raise OSError(f"it needs {needed:,} bytes, {free:,} are free")
        except OSError as error:
            raise _unwritable(out, error) from error
        try:
            yield folder
            for path in folder.rglob("*"):
                if path.is_dir():
                    safefile.fsync_directory(path)
            safefile.fsync_directory(folder)
            if out.is_dir():
                out.rmdir()  # empty, or it has to stay
            os.rename(folder, out)
        except BaseException as error:
            if isinstance(error, OSError) and not isinstance(error, LoRAFileError):
                raise _unwritable(out, error) from error
            raise
    safefile.fsync_directory(out.parent)


def _unwritable(out: Path, error: OSError) -> LoRAFileError:
    return LoRAFileError(
        f"The merged model cannot be written to {out}: {error}.",
        name=str(out),
        value=str(out),
        remedy="Free some space or choose a folder that you may write to; nothing was left there.",
    )
