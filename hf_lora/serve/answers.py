"""What a request is answered: a completion, or an error of ours with its HTTP status."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import LoRAError, LoRAHubError, LoRANameError, LoRAPoolError, LoRAStateError

__all__ = ["Completion", "Refusal", "bad_request", "refusal", "unavailable"]

# Class, kinds of it (none: any), HTTP status, type. The first row that an error meets counts.
_TABLE: tuple[tuple[type[LoRAError], tuple[str, ...], int, str], ...] = (
    (LoRAHubError, ("missing repo", "missing revision", "missing file", "invalid id"), 404, "adapter_not_found"),
    (LoRAHubError, ("gated", "no token", "wrong token", "forbidden", "disabled"), 403, "adapter_forbidden"),
    (LoRAHubError, (), 503, "source_unavailable"),
    (LoRANameError, (), 404, "adapter_not_found"),
    (LoRAPoolError, ("too large",), 422, "adapter_refused"),
    (LoRAPoolError, (), 503, "overloaded"),
    (LoRAStateError, (), 503, "unavailable"),
    (LoRAError, (), 422, "adapter_refused"),
)


@dataclass(frozen=True)
class Completion:
    """An answer.

    Args:
        finish_reason: "stop" at an end-of-sequence token, "length" at max_tokens.
        prompt_tokens, completion_tokens: an end-of-sequence token counts.
        rows, adapters: of the batch that it was computed in; the base alone counts as an adapter.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    rows: int
    adapters: int


@dataclass(frozen=True)
class Refusal:
    """Why a request gets no completion.

    Args:
        status: of the HTTP answer.
        kind: "adapter_not_found", "adapter_refused", "overloaded", …
        error: what is wrong.
    """

    status: int
    kind: str
    error: LoRAError

    @property
    def body(self) -> dict[str, Any]:
        """The answer, in the form of OpenAI's errors; `code` is the class of the error."""
        param = self.error.name if self.kind == "invalid_request" else "model" if "adapter" in self.kind else None
        error = {"message": str(self.error), "type": self.kind, "param": param, "code": type(self.error).__name__}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """When to ask again, where that is known."""
        after = getattr(self.error, "retry_after", None)
        return {} if after is None else {"retry-after": f"{after:.0f}"}


def refusal(error: LoRAError) -> Refusal:
    """An adapter's error as a refusal."""
    for cls, kinds, status, kind in _TABLE:
        if isinstance(error, cls) and (not kinds or getattr(error, "kind", "") in kinds):
            return Refusal(status, kind, error)
    raise AssertionError("the table's last row is of every LoRAError")


def bad_request(error: LoRAError, status: int = 400) -> Refusal:
    """A request that is itself wrong."""
    return Refusal(status, "invalid_request", error)


def unavailable(reason: str) -> Refusal:
    """More requests than the replicas may queue, or no replicas."""
    return Refusal(503, "overloaded", LoRAStateError(f"No replica takes the request: {reason}", remedy="Try again."))
