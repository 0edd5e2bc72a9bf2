"""The ASGI application: finds a request's handler, says who asks, records it, and words refusals as the Hub does."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .faults import Disconnect, Faults
from .storage import HubError, Repo, Store, User

Handler = Callable[..., Awaitable[Response]]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []

_PIECES = {
    "id": r"(?:[^/]+/)?[^/]+?",
    "rev": "[^/]+",
    "name": "[^/]+",
    "path": ".+",
    "oid": "[0-9a-f]{64}",
    "n": "[0-9]+",
}


def route(method: str, pattern: str) -> Callable[[Handler], Handler]:
    """Register a handler. `{rev}` is one quoted segment, so the still-quoted path is matched; pieces come unquoted."""
    named = re.sub(r"\{(\w+)\}", lambda match: f"(?P<{match[1]}>{_PIECES[match[1]]})", pattern.replace(".", r"\."))

    def register(handler: Handler) -> Handler:
        ROUTES.append((method, re.compile(named), handler))
        return handler

    return register


@dataclass
class Seen:
    """A request as it came. `user` is None for an anonymous one or a bad token."""

    method: str
    path: str  # decoded
    query: dict[str, str]
    user: str | None = None
    authorized: bool = False  # whether it carried an Authorization header
    status: int | None = None  # None: it was never answered
    range: str | None = None


@dataclass
class Call:
    """What a handler works with."""

    request: Request
    store: Store
    hub: HubApp
    viewer: User | None
    kind: str = "model"  # of the repos that the address names

    @property
    def base(self) -> str:
        """The hub's address as this client wrote it: the client compares hosts."""
        return f"http://{self.request.headers['host']}"

    def repo(self, repo_id: str) -> Repo:
        return self.store.find(repo_id, self.viewer, self.kind)

    def files_of(self, repo_id: str) -> Repo:
        """The repo, if this visitor may read its files."""
        repo = self.repo(repo_id)
        if not repo.open_to(self.viewer):
            say = f"Access to model {repo.id} is restricted"
            if self.viewer is None:
                login = "You must have access to it and be authenticated to access it. Please log in."
                raise HubError(401, f"{say}. {login}", "GatedRepo")
            ask = f"Visit {self.base}/{repo.id} to ask for access."
            raise HubError(403, f"{say} and you are not in the authorized list. {ask}", "GatedRepo")
        return repo

    def user(self) -> User:
        if self.viewer is None:
            raise HubError(401, "Invalid username or password.")
        return self.viewer

    def writes(self, namespace: str) -> User:
        """Who asks, if they may write there."""
        user = self.user()
        if user.role != "write":
            raise HubError(403, "You have read access but not the required permissions for this operation")
        if not user.owns(namespace):
            raise HubError(
                403, f'You don\'t have the rights to create or change a model under the namespace "{namespace}"'
            )
        return user

    def writable(self, repo_id: str) -> Repo:
        repo = self.repo(repo_id)
        self.writes(repo.namespace)
        return repo

    def flag(self, name: str) -> bool:
        return self.request.query_params.get(name, "").lower() in ("1", "true")


class HubApp:
    """One hub: `store`, `faults` and the `requests` it has seen can be replaced between tests."""

    def __init__(self) -> None:
        from . import routes_api, routes_files  # noqa: F401  # they register their handlers

        self.secret = secrets.token_hex(8)
        self.connections: dict[tuple[str, int], Any] = {}  # by the client's address; the server keeps it
        self.reset()

    def reset(self) -> None:
        if hasattr(self, "faults"):
            self.faults.clear()
        self.store, self.faults, self.requests = Store(), Faults(), list[Seen]()
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.part_size: int | None = None  # bytes; larger LFS files are uploaded in parts of this size
        self.page_size = 1000

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw = scope["raw_path"].decode("ascii").partition("?")[0]
        query = dict(parse_qsl(scope["query_string"].decode()))
        headers = {name.decode().lower(): value.decode() for name, value in scope["headers"]}
        token = headers.get("authorization", "").removeprefix("Bearer ") or None
        user = self.store.users.get(token or "")
        seen = Seen(
            scope["method"],
            unquote(raw),
            query,
            None if user is None else user.name,
            authorized=token is not None,
            range=headers.get("range"),
        )
        self.requests.append(seen)

        async def noting(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
            await send(message)

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            response = await self._respond(Request(scope, receive), raw, token)
            await response(scope, receive, send)

        try:
            await self.faults.run(answer, scope, receive, noting, seen.method, seen.path)
        except Disconnect:
            connection = self.connections.get(tuple(scope["client"]))
            if connection is not None:
                connection.close()

    async def _respond(self, request: Request, raw: str, token: str | None) -> Response:
        try:
            call = Call(request, self.store, self, None)
            if raw.startswith(("/api/spaces/", "/spaces/")):  # the same, but for the word
                raw, call.kind = raw.replace("/api/spaces/", "/api/models/").removeprefix("/spaces"), "space"
            for method, pattern, handler in ROUTES:
                match = pattern.fullmatch(raw)
                if match is not None and request.method in method.split("|"):
                    if not raw.startswith("/lfs/"):  # those addresses carry their own signature, as a storage's do
                        call.viewer = self.store.user_of(token)
                    return await handler(call, **{key: unquote(value) for key, value in match.groupdict().items()})
            raise HubError(404, f"Sorry, we can't find the page you are looking for: {request.method} {raw}")
        except HubError as error:
            return refusal(error, head=request.method == "HEAD")


def refusal(error: HubError, *, head: bool = False) -> Response:
    headers = {"X-Error-Message": error.message, **error.headers}
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    body = {"error": error.message, **error.body}
    if head:
        return Response(status_code=error.status, headers=headers)
    return JSONResponse(body, status_code=error.status, headers=headers)


async def json_of(request: Request) -> dict[str, Any]:
    return json.loads(await request.body() or b"{}")
