"""The fixture `hub`: an empty hub of one's own, which this process's client uses while the test runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from . import client

if TYPE_CHECKING:
    from .app import HubApp, Seen
    from .faults import Faults
    from .server import Server
    from .storage import Commit, Repo, Store


class Hub:
    """A test's view of its hub.

    There are two users: `me` (the client's token is theirs), in the organisation `lab`, and `you`. Everything is in
    memory and gone after the test. `env` is the same for child processes.
    """

    def __init__(self, server: Server, home: Path, patch: pytest.MonkeyPatch) -> None:
        self._server, self._patch, self.home = server, patch, home
        self.app: HubApp = server.app
        self.app.reset()
        self.url = server.url
        self.token = self.add_user("me", orgs=("lab",))
        self.other_token = self.add_user("you")
        self.waits = client.redirect(patch, self.url, home, self.token)  # seconds that the client would have waited
        self.env = client.environment(self.url, home, self.token)
        self.cache = home / "hub"

    # ---- the hub's state

    @property
    def store(self) -> Store:
        return self.app.store

    @property
    def faults(self) -> Faults:
        """Add faults here: `hub.faults.status(503, "*/resolve/*")`."""
        return self.app.faults

    def add_user(self, name: str, *, orgs: tuple[str, ...] = (), role: str = "write") -> str:
        """Returns the token of a new user."""
        from .storage import User

        user = User(name, f"hf_{name}", frozenset(orgs), role)  # type: ignore[arg-type]
        self.store.users[user.token] = user
        return user.token

    def create(self, repo_id: str, *, private: bool = False, gated: Any = False) -> Repo:
        """A new repo, made on the server's side."""
        repo = self.store.create(repo_id, private=private)
        repo.gated = gated
        return repo

    def repo(self, repo_id: str) -> Repo:
        return self.store.repos[repo_id]

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str],
        *,
        message: str = "a commit",
        branch: str = "main",
        delete: tuple[str, ...] = (),
    ) -> Commit:
        """Commit files on the server's side, in a repo that is made if it is missing."""
        repo = self.store.repos.get(repo_id) or self.create(repo_id)
        put = {}
        for path, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            put[path] = self.store.put(data, lfs=self.store.is_lfs(path, len(data)))
        return self.store.commit(repo, branch, put=put, delete=delete, title=message)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What lies in the repo at a revision, without the .gitattributes that every repo begins with."""
        found = self.store.read(self.repo(repo_id), revision)
        return {path: content for path, content in found.items() if path != ".gitattributes"}

    def history(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits, the newest first, without the initial one."""
        return self.repo(repo_id).history(revision)[:-1]

    def download(self, repo_id: str, folder: Path, revision: str = "main") -> Path:
        """Write what lies in the repo into a folder, without HTTP."""
        for path, content in self.files(repo_id, revision).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder

    # ---- what was asked

    @property
    def requests(self) -> list[Seen]:
        """Every request so far, in order; `.clear()` forgets them."""
        return self.app.requests

    def asked(self, method: str = "*", path: str = ".*") -> list[Seen]:
        """The requests of a method whose decoded path matches a regular expression."""
        return [r for r in list(self.requests) if method in ("*", r.method) and re.fullmatch(path, r.path)]

    def fetched(self, repo_id: str) -> list[str]:
        """The files of a repo whose content was asked for, in order."""
        pattern = re.compile(re.escape(f"/{repo_id}/resolve/") + r"(?:refs/[a-z]+/)?[^/]+/(.+)")
        matches = (pattern.fullmatch(request.path) for request in self.asked("GET"))
        return [match[1] for match in matches if match]

    # ---- the client's state

    def login(self, token: str | None) -> None:
        """Let this process and `env` use another token; None is an anonymous visitor."""
        if token is None:
            self._patch.delenv("HF_TOKEN", raising=False)
        else:
            self._patch.setenv("HF_TOKEN", token)
        self.env["HF_TOKEN"] = token or ""

    def offline(self) -> None:
        """The client behaves as with HF_HUB_OFFLINE=1 from here on."""
        from huggingface_hub import constants

        self._patch.setattr(constants, "HF_HUB_OFFLINE", True)
        self._patch.setenv("HF_HUB_OFFLINE", "1")
        self.env["HF_HUB_OFFLINE"] = "1"

    def unreachable(self) -> None:
        """From here on nobody listens where the client looks for the hub."""
        import socket

        from huggingface_hub import constants, hf_api

        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        self._patch.setattr(constants, "ENDPOINT", url)
        self._patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        self._patch.setattr(hf_api.api, "endpoint", url)
        self.env["HF_ENDPOINT"] = url

    def patience(self, seconds: float) -> None:
        """How long the client waits for an answer before it gives a request up (10 s unless told).

        In a child process its second try, when nothing is cached, waits 60 s all the same: no variable changes that.
        """
        from huggingface_hub import constants, file_download

        self._patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", seconds)
        self._patch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", seconds)
        self._patch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", seconds, raising=False)
        self.env |= {"HF_HUB_DOWNLOAD_TIMEOUT": str(int(seconds) or 1), "HF_HUB_ETAG_TIMEOUT": str(int(seconds) or 1)}


@pytest.fixture(scope="session")
def _hub_server() -> Iterator[Server]:
    from .server import Server

    server = Server().start()
    yield server
    server.stop()


@pytest.fixture
def hub(_hub_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """An empty local hub; the unmodified client, transformers, Trainer and peft of this process talk to it."""
    with pytest.MonkeyPatch.context() as patch:
        yield Hub(_hub_server, tmp_path_factory.mktemp("hf_home"), patch)
        client.release()
        _hub_server.app.reset()
