"""Faults to inject: which requests they meet, how often, and what they do to the answer."""

from __future__ import annotations

import asyncio
import fnmatch
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
App = Callable[..., Any]


@dataclass
class Fault:
    """Meets requests whose method and decoded path match, `times` times (None: for ever).

    `method` is one, or several as "GET|HEAD", or "*". `path` is a shell pattern: `*/resolve/*.safetensors`.
    """

    kind: str
    path: str
    method: str
    times: int | None
    value: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = ""
    hits: int = 0

    def meets(self, method: str, path: str) -> bool:
        if self.times is not None and self.hits >= self.times:
            return False
        return (self.method == "*" or method in self.method.split("|")) and fnmatch.fnmatchcase(path, self.path)


class Faults:
    """The faults of one hub, in the order they were added. Each method returns its fault, which counts its `hits`."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._released = threading.Event()

    def _add(self, kind: str, path: str, method: str, times: int | None, **facts: Any) -> Fault:
        fault = Fault(kind, path, method, times, **facts)
        with self._lock:
            self._faults.append(fault)
        return fault

    def status(
        self,
        status: int,
        path: str = "*",
        method: str = "*",
        times: int | None = 1,
        *,
        headers: Mapping[str, str] | None = None,
        message: str = "injected",
    ) -> Fault:
        """Answer with this status instead, for example 429 with {"Retry-After": "1"}."""
        return self._add("status", path, method, times, value=status, headers=headers or {}, message=message)

    def delay(self, seconds: float, path: str = "*", method: str = "*", times: int | None = 1) -> Fault:
        """Wait before the request is handled."""
        return self._add("delay", path, method, times, value=seconds)

    def stall(self, path: str = "*", method: str = "GET", times: int | None = 1, *, after: int = 0) -> Fault:
        """Send the headers and `after` bytes of the body, then nothing, and keep the connection open."""
        return self._add("stall", path, method, times, value=after)

    def hang(self, path: str = "*", method: str = "*", times: int | None = 1) -> Fault:
        """Take the request and never answer."""
        return self._add("hang", path, method, times)

    def cut(self, path: str = "*", method: str = "GET", times: int | None = 1, *, after: int = 0) -> Fault:
        """Close the connection after `after` bytes of the body."""
        return self._add("cut", path, method, times, value=after)

    def drop(self, path: str = "*", method: str = "*", times: int | None = 1) -> Fault:
        """Handle the request, then close the connection without an answer: the client cannot know."""
        return self._add("drop", path, method, times)

    def wrong_etag(
        self, path: str = "*", method: str = "HEAD|GET", times: int | None = 1, *, etag: str = "0" * 40
    ) -> Fault:
        """Give another ETag than the file's."""
        return self._add("etag", path, method, times, value=etag)

    def corrupt(self, path: str = "*", method: str = "GET", times: int | None = 1, *, at: int = 0) -> Fault:
        """Flip the bits of the body's byte `at` (from the end if negative); the length stays."""
        return self._add("corrupt", path, method, times, value=at)

    def without_header(self, name: str, path: str = "*", method: str = "*", times: int | None = 1) -> Fault:
        """Leave a header out of the answer."""
        return self._add("no header", path, method, times, value=name.lower().encode())

    def call(self, function: Callable[[], Any], path: str = "*", method: str = "*", times: int | None = 1) -> Fault:
        """Call a function before the request is handled, in a thread: to commit in between, or to wait for the test."""
        return self._add("call", path, method, times, value=function)

    def clear(self) -> None:
        """Forget every fault, and let go of what stalls."""
        with self._lock:
            self._faults.clear()
        self._released.set()
        self._released = threading.Event()

    # ---- the server's side

    def take(self, method: str, path: str) -> list[Fault]:
        """The faults that this request meets; each counts it."""
        with self._lock:
            met = [fault for fault in self._faults if fault.meets(method, path)]
            for fault in met:
                fault.hits += 1
            return met

    async def run(self, app: App, scope: Message, receive: App, send: App, method: str, path: str) -> None:
        """The answer of `app`, with the faults that this request meets."""
        released = self._released
        for fault in self.take(method, path):
            if fault.kind == "delay":
                await asyncio.sleep(fault.value)
            elif fault.kind == "call":
                await asyncio.to_thread(fault.value)
            elif fault.kind == "hang":
                await _until(released, receive)
            elif fault.kind == "status":
                await _refuse(send, fault)
                return
            else:
                send = _Altered(send, receive, fault, released)
        await app(scope, receive, send)


class Disconnect(Exception):
    """Ends a request without finishing its answer: uvicorn then closes the connection."""


async def _until(released: threading.Event, receive: App) -> None:
    """Do nothing until the client has gone or the hub is reset."""
    gone = asyncio.ensure_future(_gone(receive))
    while not released.is_set() and not gone.done():
        await asyncio.sleep(0.02)
    gone.cancel()
    raise Disconnect


async def _gone(receive: App) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(send: App, fault: Fault) -> None:
    body = json.dumps({"error": fault.message}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "x-error-message": fault.message}
    headers |= {name.lower(): value for name, value in fault.headers.items()}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": fault.value, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class _Altered:
    """A `send` that changes the answer on its way."""

    def __init__(self, send: App, receive: App, fault: Fault, released: threading.Event) -> None:
        self.send, self.receive, self.fault, self.released = send, receive, fault, released

    async def __call__(self, message: Message) -> None:
        kind, value = self.fault.kind, self.fault.value
        if kind == "drop":
            raise Disconnect
        if message["type"] == "http.response.start":
            headers = list(message["headers"])
            if kind == "etag":
                headers = [pair for pair in headers if pair[0].lower() not in (b"etag", b"x-linked-etag")]
                headers.append((b"etag", f'"{value}"'.encode()))
            if kind == "no header":
                headers = [pair for pair in headers if pair[0].lower() != value]
            return await self.send({**message, "headers": headers})
        body = message.get("body", b"")
        if kind == "corrupt" and body:
            at = value % len(body)
            body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
        if kind in ("cut", "stall") and len(body) > value:
            await self.send({**message, "body": body[:value], "more_body": True})
            if kind == "stall":
                await _until(self.released, self.receive)
            raise Disconnect
        return await self.send({**message, "body": body})
