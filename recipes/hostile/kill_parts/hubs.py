"""A push to the tests' local hub, by the unmodified client, and what a stranger can then pull."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from .operations import Operation, values_of

TESTS = Path(__file__).resolve().parents[3] / "tests"
USER, TOKEN = "me", "hf_me"


def serve() -> tuple[str, int]:
    """A hub in a process of its own: its address, and the process."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        with os.fdopen(read) as pipe:
            return pipe.readline().strip(), child
    try:
        from hub.server import Server
        from hub.storage import User

        server = Server().start()
        server.app.store.users[TOKEN] = User(USER, TOKEN)
        os.write(write, f"{server.url}\n".encode())
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(0.5)
    finally:
        os._exit(0)


class Push(Operation):
    """`push_adapter_to_hub`: config, weights and card in one commit."""

    name = "push"
    reads_forked = True
    chained = False
    share = 2

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from hf_lora import LoRAAdapter

        sys.path.insert(0, str(TESTS))
        self.url, self.process = serve()
        self.values = [LoRAAdapter.of(value) for value in values_of(range(4))]
        self.scratch, self.repos, self.repo = folder / "tmp", 0, ""
        self.scratch.mkdir()
        self.old: int | None = None
        self.new = 0

    def _client(self) -> None:
        """In a forked process: let the client talk to the hub."""
        import tempfile

        import pytest
        from hub import client

        os.environ["TMPDIR"] = tempfile.tempdir = str(self.scratch)
        client.redirect(pytest.MonkeyPatch(), self.url, self.folder / "home", TOKEN)

    def before(self, chance: random.Random) -> str:
        kind = chance.choice(["nothing", "ours", "ours", "ours"])
        if kind == "nothing" or not self.repos:
            self.repos += 1
            self.repo, self.old, kind = f"{USER}/task-{self.repos}", None, "nothing"
        self.new = chance.choice([i for i in range(len(self.values)) if i != self.old])
        return kind

    def act(self) -> None:
        self._client()
        self.values[self.new].push(self.repo)

    def judge(self) -> str:
        self._client()
        import tempfile

        from huggingface_hub import HfApi, ModelCard

        from hf_lora import LoRAAdapter, LoRAHubError

        with tempfile.TemporaryDirectory() as cache:
            try:
                value = LoRAAdapter.pull(self.repo, cache_dir=cache)
            except LoRAHubError:
                assert self.old is None, "what was pushed before is lost"
                return "refused"
            same = [i for i, known in enumerate(self.values) if self._equal(value, known)]
            assert len(same) == 1, "half-written and read as good"
            assert same[0] in (self.old, self.new), "another adapter"
            files = set(HfApi().list_repo_files(self.repo)) - {".gitattributes"}
            assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}, files
            card = ModelCard.load(HfApi().hf_hub_download(self.repo, "README.md", cache_dir=cache))
            assert f"{value.config.alpha:g}" in card.text, "the card is another adapter's"
        return "new" if same[0] == self.new else "old"

    @staticmethod
    def _equal(value: Any, known: Any) -> bool:
        return value.config.alpha == known.config.alpha and all(
            value.factors[path].equal(factors) for path, factors in known.factors.items()
        )

    def settle(self) -> None:
        self.act()
        assert self.judge() == "new"
        left = sorted(path.name for path in self.scratch.iterdir())
        assert not left, f"left over: {left}"

    def settled(self) -> None:
        self.old = self.new
