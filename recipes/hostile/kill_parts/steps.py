"""The places of an operation where something outside of the process changes, counted; death at one of them."""

from __future__ import annotations

import builtins
import io
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

# Raised by the interpreter before each of these calls, whoever makes it.
EVENTS = frozenset(
    {
        *("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
        *("socket.connect", "shutil.copyfile", "shutil.rmtree", "shutil.move"),
    }
)


class Steps:
    """Counts the steps of what this process does from `arm()` on, and kills the process before the `at`-th.

    A step is a rename, removal, new folder or file, fsync, a connection or a request on it, and each half of what
    Python code writes to a file. What native code writes is between two steps; the random delays are for that.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count = at, 0

    def step(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def arm(self) -> None:
        """From here on; this process does not go back."""
        sys.addaudithook(self._audit)
        os.fsync = self._before(os.fsync)
        builtins.open = io.open = self._opened(builtins.open)  # type: ignore[assignment]
        steps = self

        class Counted(socket.socket):
            def send(self, *args: Any) -> int:
                steps.step()
                return super().send(*args)

        socket.socket = Counted  # type: ignore[misc]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            self.step()

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return function(*args, **kwargs)

        return counted

    def _opened(self, open_: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = open_(path, mode, *args, **kwargs)
            return _Halved(file, self) if set(mode) & set("wax+") else file

        return opened


class _Halved:
    """A file whose writes come in two halves, each with the system at once."""

    def __init__(self, file: Any, steps: Steps) -> None:
        self._file, self._steps = file, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Halved:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        half = len(data) // 2
        for part in (data[:half], data[half:]):
            self._file.write(part)
            self._file.flush()
            self._steps.step()
        return len(data)
