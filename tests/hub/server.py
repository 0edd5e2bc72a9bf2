"""The application behind a real socket, in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import HubApp


class _Protocol(H11Protocol):
    """HTTP whose connections a fault can close: an application that ends without an answer gets a 500 otherwise."""

    open: dict[tuple[str, int], Any]

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.open[transport.get_extra_info("peername")[:2]] = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.open.pop(self.client, None)
        super().connection_lost(exc)


class Server:
    """Serves one `HubApp` on 127.0.0.1 at a free port until `stop`."""

    def __init__(self) -> None:
        self.app = HubApp()
        protocol = type("Protocol", (_Protocol,), {"open": self.app.connections})
        # The protocol is named because asyncio sets TCP_NODELAY only on sockets that say TCP: about 40 ms a request.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(128)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        quiet: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False}
        config = uvicorn.Config(self.app, lifespan="off", http=protocol, timeout_keep_alive=60, **quiet)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="local hub", daemon=True)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    def start(self) -> Server:
        self._thread.start()
        return self

    def stop(self) -> None:
        self.app.faults.clear()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=10)
        self._socket.close()
        assert not self._thread.is_alive(), "the local hub did not stop"
