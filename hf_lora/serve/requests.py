"""A request's body, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LoRAConfigError
from .settings import Limits

__all__ = ["Ask", "read_ask"]

_DEFAULT_TOKENS = 16  # as of OpenAI's completions
# Fields of OpenAI's completions that may be given, with the one value that is served.
_ONLY: dict[str, Any] = {"stream": False, "n": 1, "temperature": 0}
_FIELDS = ("model", "prompt", "max_tokens", *_ONLY)


@dataclass(frozen=True)
class Ask:
    """What a client wants.

    Args:
        prompt: text, as it is; no chat template is applied.
        adapter: its id; None is the base alone.
        max_tokens: at most so many new ones.
    """

    prompt: str
    adapter: str | None
    max_tokens: int


def read_ask(body: object, limits: Limits, routed: str = "") -> Ask:
    """Check a body in the form of OpenAI's completions.

    Args:
        body: decoded JSON.
        routed: the multiplexed model id that Ray was given with the request, which may stand in for `model`.

    Raises:
        LoRAConfigError: whose `name` is the field.
    """
    if not isinstance(body, Mapping):
        raise _wrong("body", body, "a JSON object", "The body is no JSON object.")
    for name in body:
        if name not in _FIELDS:
            raise _wrong(str(name), body[name], f"one of {', '.join(_FIELDS)}", f"There is no field {name!r}.")
    for name, only in _ONLY.items():
        value = body.get(name, only)
        if value is not None and (isinstance(value, bool) is not isinstance(only, bool) or value != only):
            raise _wrong(name, value, only)
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise _wrong("prompt", prompt, "a string that is not empty")
    count = body.get("max_tokens")
    count = min(_DEFAULT_TOKENS, limits.max_new_tokens) if count is None else count
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= limits.max_new_tokens:
        raise _wrong("max_tokens", count, f"an integer from 1 to {limits.max_new_tokens}")
    return Ask(prompt, _adapter(body.get("model"), limits.base_name, routed), count)


def _adapter(model: object, base_name: str | None, routed: str) -> str | None:
    if model is not None and (not isinstance(model, str) or not model):
        raise _wrong("model", model, "the id of an adapter")
    if model is not None and routed and model != routed:
        raise _wrong("model", model, f"{routed!r}, as in the header serve_multiplexed_model_id")
    named = model or routed or None
    return None if named == base_name else named


def _wrong(name: str, value: object, expected: object, message: str | None = None) -> LoRAConfigError:
    shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}…"
    return LoRAConfigError(
        message or f"{name}={shown} cannot be served.",
        name=name,
        value=shown,
        expected=expected,
        remedy=f"Expected: {expected}.",
    )
