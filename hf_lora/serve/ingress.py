"""The front: takes HTTP and handles' calls, checks them, and asks a replica that has the adapter."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from ..errors import LoRAConfigError, LoRAError
from .answers import Completion, Refusal, bad_request, unavailable
from .requests import read_ask
from .settings import Limits

__all__ = ["Ingress"]

_ROUTES = {"/v1/completions": "POST", "/stats": "GET"}


class Ingress:
    """Routes requests by the adapter that they name.

    Args:
        replicas: Ray's handle of them.
        limits: of a request.
    """

    def __init__(self, replicas: Any, limits: Limits) -> None:
        self.replicas, self.limits = replicas, limits

    async def __call__(self, request: Any) -> Any:
        """An HTTP request (starlette's)."""
        from starlette.responses import JSONResponse

        path = request.scope["path"].removeprefix(request.scope.get("root_path", "")).rstrip("/")
        method = _ROUTES.get(path)
        if method is None:
            answer: Any = bad_request(_no_route(path), 404)
        elif method != request.method:
            answer = bad_request(_no_route(f"{request.method} {path}"), 405)
        elif path == "/stats":
            answer = await self.stats()
        else:
            answer = await self._read(request)
        if isinstance(answer, Refusal):
            return JSONResponse(answer.body, answer.status, answer.headers)
        return JSONResponse(answer)

    async def complete(self, prompt: str, adapter: str | None = None, max_tokens: int | None = None) -> dict[str, Any]:
        """For a handle: `handle.complete.remote(prompt, adapter=..., max_tokens=...)`; the same answer as over HTTP.

        Raises:
            LoRAError: of the adapter, or of the request.
        """
        answer = await self._answer({"prompt": prompt, "model": adapter, "max_tokens": max_tokens})
        if isinstance(answer, Refusal):
            raise answer.error
        return answer

    async def stats(self) -> dict[str, Any]:
        """What one replica has done and holds; it says which."""
        found: dict[str, Any] = await self.replicas.stats.remote()
        return found

    async def _read(self, request: Any) -> dict[str, Any] | Refusal:
        data, most = b"", self.limits.max_body_bytes
        async for chunk in request.stream():
            data += chunk
            if len(data) > most:
                return bad_request(_invalid(f"The body is larger than {most:,} bytes.", "Send less."), 413)
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            return bad_request(_invalid(f"The body is no JSON: {error}", "Send a JSON object."))
        return await self._answer(body)

    async def _answer(self, body: object) -> dict[str, Any] | Refusal:
        from ray import serve
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        try:
            ask = read_ask(body, self.limits, serve.get_multiplexed_model_id())
        except LoRAError as error:
            return bad_request(error)
        replicas = self.replicas.options(multiplexed_model_id=ask.adapter or "")
        try:
            answer, replica = await replicas.complete.remote(ask)
        except (BackPressureError, DeploymentUnavailableError) as error:
            return unavailable(str(error))
        if isinstance(answer, Refusal):
            return answer
        return _completion(answer, ask.adapter or self.limits.base_name, replica)


def _completion(answer: Completion, model: str | None, replica: str) -> dict[str, Any]:
    """In the form of OpenAI's completions; `batch` is ours."""
    used = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "text": answer.text, "finish_reason": answer.finish_reason, "logprobs": None}],
        "usage": {**used, "total_tokens": sum(used.values())},
        "batch": {"rows": answer.rows, "adapters": answer.adapters, "replica": replica},
    }


def _invalid(message: str, remedy: str) -> LoRAConfigError:
    return LoRAConfigError(message, name="body", remedy=remedy)


def _no_route(what: str) -> LoRAConfigError:
    routes = ", ".join(f"{method} {path}" for path, method in _ROUTES.items())
    return LoRAConfigError(f"There is no {what}.", name="path", value=what, expected=routes, remedy=f"Use {routes}.")
