"""Serve a hub by hand: prints the environment to use it with, until it is interrupted."""

import time
from pathlib import Path

from . import client
from .server import Server
from .storage import User

if __name__ == "__main__":
    server = Server().start()
    server.app.store.users["hf_me"] = User("me", "hf_me", frozenset({"lab"}))
    for name, value in client.environment(server.url, Path.home() / ".cache" / "local_hub", "hf_me").items():
        print(f"export {name}={value}")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        server.stop()
