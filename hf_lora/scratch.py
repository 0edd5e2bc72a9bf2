"""Temporary files and folders that go even if their process is killed: the next one that makes such removes them.

Each is locked while its process lives; the system takes the lock away with the process. What cannot be locked (Windows,
some network file systems) is left alone.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import LoRAFileError

__all__ = ["beside", "folder"]

_PREFIX = "hf_lora-"


@contextlib.contextmanager
def _held(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock a file or folder while the block runs; gives whether it is ours. Raises `OSError` if it is not there."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing can be told of others
        yield False
        return
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _clear(parent: Path, pattern: str) -> None:
    """Remove the user's own files and folders in `parent` with such names (a glob) that no process holds."""
    for path in parent.glob(pattern):
        with contextlib.suppress(OSError):
            if path.is_symlink() or (hasattr(os, "getuid") and path.stat().st_uid != os.getuid()):
                continue
            with _held(path) as free:
                if free and path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif free:
                    path.unlink()


@contextlib.contextmanager
def _made(make: Callable[[], Path]) -> Iterator[Path]:
    """What `make` made, locked while the block runs, and removed after it if it still has its name."""
    with contextlib.ExitStack() as stack:
        while True:
            path = make()
            with contextlib.suppress(FileNotFoundError):  # another may just have cleared it away
                stack.enter_context(_held(path, wait=True))
                if path.exists():
                    break
        try:
            yield path
        finally:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def folder(what: str) -> Iterator[Path]:
    """A new folder among the system's temporary ones. Raises `LoRAFileError` if there can be none."""
    prefix = f"{_PREFIX}{what}-"
    with contextlib.ExitStack() as stack:
        try:
            _clear(Path(tempfile.gettempdir()), f"{prefix}*")
            path = stack.enter_context(_made(lambda: Path(tempfile.mkdtemp(prefix=prefix))))
        except OSError as error:
            raise LoRAFileError(
                f"No temporary folder can be made: {error}.",
                name="TMPDIR",
                value=tempfile.tempdir,
                remedy="Free some space, or let TMPDIR name a folder that you may write to.",
            ) from error
        yield path


@contextlib.contextmanager
def beside(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new, empty, hidden file (or folder) beside `target`, to be written and renamed to it. Raises `OSError`."""
    prefix = f".{target.name}.{_PREFIX}"
    _clear(target.parent, f"{glob.escape(prefix)}*")

    def make() -> Path:
        path = target.parent / f"{prefix}{secrets.token_hex(4)}"
        path.mkdir() if folder else path.touch(exist_ok=False)
        return path

    with _made(make) as path:
        yield path
