"""Run something in a forked process: to its end, or until it is killed at a step or after a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

from .steps import Steps


class Going(Exception):
    """Raised by an operation whose rest is run by whoever called: that ends the process by `over`."""


def over(answer: Any = None) -> None:
    """End a forked process well."""
    if _ANSWER:
        os.write(_ANSWER[0], json.dumps({"returned": answer}).encode())
    os._exit(0)


_ANSWER: list[int] = []


def forked(work: Callable[[], Any], *, after: float | None = None, timeout: float = 120) -> tuple[bool, Any]:
    """Run `work` in a process of its own, with what it imported here already.

    Args:
        work: what it returns has to be JSON.
        after: kill it so many seconds after it began.
        timeout: kill it then, and raise.

    Returns:
        whether it was killed; what it returned.

    Raises:
        AssertionError: it raised; with its traceback.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _ANSWER[:] = [write]
        try:
            over(work())
        except Going:
            raise
        except BaseException:  # noqa: BLE001  # whatever it was, this process must not go on as the parent
            os.write(write, json.dumps({"raised": traceback.format_exc()[-20_000:]}).encode())
            os._exit(1)
    os.close(write)
    until = time.monotonic() + (timeout if after is None else after)
    try:
        died, text = _waited(child, read, until, after is None)
    finally:
        os.close(read)
    answer = json.loads(text) if text and not died else {}
    assert "raised" not in answer, answer["raised"]
    assert died or answer, "the process ended without an answer"
    return died, answer.get("returned")


def _waited(child: int, read: int, until: float, is_timeout: bool) -> tuple[bool, bytes]:
    import select

    text = b""
    while True:
        ready, _, _ = select.select([read], [], [], max(until - time.monotonic(), 0))
        if ready:
            part = os.read(read, 65536)
            text += part
            if part:
                continue
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            assert not is_timeout or os.waitpid(child, 0) is None, "it did not end: a deadlock?"
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, text


def counted(work: Callable[[], Any]) -> tuple[int, float]:
    """Run `work` undisturbed: how many steps it has, and how long it takes."""
    begun = time.monotonic()

    def counting() -> int:
        steps = Steps()
        steps.arm()
        _ON_END.append(lambda: steps.count)
        work()
        return steps.count

    _, steps = forked(counting)
    return steps, time.monotonic() - begun


_ON_END: list[Callable[[], Any]] = []


def ended() -> None:
    """`over`, for an operation that raised `Going`: with its number of steps, if they are counted."""
    over(_ON_END[0]() if _ON_END else None)


def killed_at(work: Callable[[], Any], step: int) -> bool:
    """Kill `work` before its `step`-th step; False: it had fewer."""

    def armed() -> None:
        Steps(step).arm()
        work()

    return forked(armed)[0]


def killed_after(work: Callable[[], Any], seconds: float) -> bool:
    """Kill `work` so many seconds after it began; False: it had ended."""
    return forked(work, after=seconds)[0]
