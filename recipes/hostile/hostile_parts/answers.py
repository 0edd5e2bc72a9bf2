"""The Hub's answers: status, headers, redirects and bodies, through the whole of huggingface_hub, without a network."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import types
from collections.abc import Mapping
from typing import Any

from hf_lora import hub, store
from hf_lora.demo import library
from hf_lora.errors import LoRAError, LoRAHubError

from . import good
from .core import Folder, SilentChange, Target, same

_COMMIT = "c" * 40
_CONFIG = json.dumps(good.CONFIG)
_SHA = hashlib.sha256(_CONFIG.encode()).hexdigest()
_HEADERS = {
    "X-Repo-Commit": _COMMIT,
    "ETag": f'"{_SHA}"',
    "X-Linked-Etag": f'"{_SHA}"',
    "X-Linked-Size": str(len(_CONFIG)),
    "Content-Length": str(len(_CONFIG)),
}
_MODEL = {
    "_id": "1",
    "id": "me/task",
    "sha": _COMMIT,
    "private": False,
    "gated": False,
    "downloads": 3,
    "likes": 1,
    "tags": ["lora", "base_model:adapter:org/base"],
    "lastModified": "2024-01-02T03:04:05.000Z",
    "siblings": [
        {"rfilename": "adapter_config.json", "size": 9},
        {"rfilename": "adapter_model.safetensors", "size": 99},
    ],
}


class Answers(Target):
    """What the Hub answers, or who stands in its place: an error says so, files are whole and inside of the cache."""

    name, title, entry = "hub", "the Hub's answers: status, headers, redirects, JSON", "hub.fetch, list_adapters, …"
    kinds = ("json",)
    inputs = 15_000

    def __init__(self) -> None:
        from huggingface_hub import constants, set_client_factory
        from huggingface_hub.utils import _http

        http = next(
            m for name in ("httpx2", "httpx") if (m := vars(_http).get(name)) is not None
        )  # whichever this client is made with
        self._http, self._constants = http, constants
        kept = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "ENDPOINT")
        self._before = {name: getattr(constants, name) for name in kept}
        constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
        constants.HF_HUB_DISABLE_TELEMETRY = True
        self._modules = _http
        self._time = _http.time
        waits = {"sleep": lambda seconds: None}  # the client's, between its retries
        _http.time = types.SimpleNamespace(**{**vars(self._time), **waits})
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        self.folder = Folder()
        self.said: dict[str, Any] = {}
        self.asked = 0
        set_client_factory(lambda: http.Client(transport=http.MockTransport(self._answer), follow_redirects=True))

    def _answer(self, request: Any) -> Any:
        self.asked += 1
        if self.asked > 60:
            raise self._http.ConnectError("the fuzzing ends a loop")
        kind = "api" if "/api/" in request.url.path else request.method.lower()
        found = self.said.get(kind)
        found = found if isinstance(found, dict) else {}
        status, headers, body = found.get("status", 200), found.get("headers"), found.get("body", "")
        status = status if type(status) is int and 100 <= status < 600 else 500
        headers = headers if isinstance(headers, dict) else {}
        lines = [
            (re.sub(r"[^!-~]", "", name) or "x", re.sub(r"[\r\n\0]", " ", str(value)))  # as a server can send it
            for name, value in headers.items()
        ]
        content = (body if isinstance(body, str) else json.dumps(body)).encode("utf-8", "surrogatepass")
        raw = [(name.encode(), value.encode("utf-8", "replace")) for name, value in lines]
        answer = self._http.Response(status, stream=self._http.ByteStream(content), request=request)
        answer.headers = self._http.Headers(raw)
        return answer

    def seeds(self) -> list[bytes]:
        file = {"status": 200, "headers": _HEADERS, "body": _CONFIG}
        moved = {"status": 302, "headers": {**_HEADERS, "Location": "https://cdn.example/x"}, "body": ""}
        said = [
            {"verb": "fetch", "head": {**file, "body": ""}, "get": file},
            {"verb": "size", "head": {**file, "body": ""}},
            {"verb": "list", "api": {"status": 200, "headers": {}, "body": [_MODEL, {**_MODEL, "id": "a/b"}]}},
            {"verb": "info", "api": {"status": 200, "headers": {}, "body": _MODEL}},
            {"verb": "fetch", "head": moved, "get": file},
            {"verb": "size", "head": moved, "get": file},
        ]
        refusals = [
            (401, {"X-Error-Code": "GatedRepo"}),
            (404, {"X-Error-Code": "EntryNotFound"}),
            (404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such"}),
            (429, {"Retry-After": "3"}),
            (503, {"X-Request-Id": "x"}),
            (403, {"X-Error-Message": "no"}),
        ]
        self.refused = [
            {"verb": verb, kind: {"status": status, "headers": headers, "body": {"error": "x"}}}
            for verb, kind in (("fetch", "head"), ("list", "api"), ("info", "api"))
            for status, headers in refusals
        ]
        return good.texts(said + self.refused)

    def check(self, data: bytes) -> None:
        try:
            said = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise LoRAError("no answers") from error
        if not isinstance(said, dict) or said.get("verb") not in ("fetch", "size", "list", "info"):
            raise LoRAError("no verb")
        self.said, self.asked = said, 0
        cache = self.folder.path / "cache"
        try:
            getattr(self, f"_{said['verb']}")(cache)
        except LoRAHubError as error:
            if error.kind == "" and "corrupted" not in str(error):
                raise SilentChange("an error of the Hub without a kind") from error
            raise
        finally:
            here = sorted(path.name for path in self.folder.path.iterdir())
            shutil.rmtree(cache, ignore_errors=True)
            same(set(here) <= {"cache"}, True, f"what lies outside of the cache: {here}")

    def _body(self, kind: str) -> str:
        found = self.said.get(kind)
        body = found.get("body", "") if isinstance(found, Mapping) else ""
        return body if isinstance(body, str) else json.dumps(body)

    def _fetch(self, cache: Any) -> None:
        folder = hub.fetch("me/task", cache_dir=cache, token=False)
        same(cache in folder.resolve().parents, True, "inside of the cache")
        promised = str((self.said.get("head") or {}).get("headers", {}).get("X-Linked-Etag", ""))
        for name in (store.CONFIG_NAME, store.WEIGHTS_NAME):
            held = (folder / name).read_bytes()
            same(held, self._body("get").encode("utf-8", "surrogatepass"), name)
            sha = promised.strip('"')
            if re.fullmatch(r"[0-9a-f]{64}", sha):
                same(hashlib.sha256(held).hexdigest(), sha, "the hash that the Hub promised")

    def _size(self, cache: Any) -> None:
        size = hub.weights_size("me/task", token=False)
        same(size is None or (type(size) is int and size >= 0), True, f"a size of {size!r}")

    def _list(self, cache: Any) -> None:
        found = hub.list_adapters("org/base", token=False, limit=5)
        body = json.loads(self._body("api"))
        same([item.repo_id for item in found], [item["id"] for item in body][:5], "the ids")
        for item in found:
            kinds = (isinstance(item.repo_id, str), type(item.downloads) is int, type(item.likes) is int)
            same(all(kinds) and all(isinstance(tag, str) for tag in item.tags), True, f"the types of {item}")

    def _info(self, cache: Any) -> None:
        commit, sizes = library._at("me/task")
        same(isinstance(commit, str) and bool(re.fullmatch(r"[0-9a-f]{40}", commit)), True, f"a commit, {commit!r}")
        same(all(isinstance(n, str) and type(size) is int for n, size in sizes.items()), True, "sizes")

    def close(self) -> None:
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils import _http

        for name, value in self._before.items():
            setattr(self._constants, name, value)
        self._modules.time = self._time
        set_client_factory(getattr(_http, "default_client_factory", self._http.Client))
        self.folder.close()


TARGETS: dict[str, Any] = {Answers.name: Answers}
