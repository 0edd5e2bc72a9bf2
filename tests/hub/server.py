"""The application behind a real socket, in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading

import uvicorn

from .app import HubApp


class Server:
    """Serves one `HubApp` on 127.0.0.1 at a free port until `stop`."""

    def __init__(self) -> None:
        self.app = HubApp()
        # The protocol is named because asyncio sets TCP_NODELAY only on sockets that say TCP: about 40 ms a request.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(128)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            self.app, lifespan="off", log_config=None, log_level="critical", access_log=False, timeout_keep_alive=60
        )
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
