"""The named endpoints, for `gradio_client`: the same actions, with plain data in and out."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..library import Adapter
from ..problems import DemoError, said
from ..session import Demo, Progress
from .adapters import details
from .parts import SLOW, visitor_of

__all__ = ["add_api"]


def add_api(demo: Demo) -> None:
    """Add them to the page that is being built."""

    def tasks(request: gr.Request) -> list[dict[str, Any]]:
        """The adapters that you may name, each with its form."""
        return [_told(adapter) for adapter in demo.library.of(visitor_of(request)).values()]

    async def ask(adapter: str, fields: dict[str, Any], beside: bool, request: gr.Request) -> dict[str, Any]:
        """One adapter's answer to its form's fields (or {"prompt": …} for any); `beside`: the base's too."""
        return await _last(
            lambda: demo.ask(visitor_of(request), adapter, _given(demo, request, adapter, fields), beside=beside)
        )

    async def blend(first: str, second: str, weight: float, prompt: str, request: gr.Request) -> dict[str, Any]:
        """`weight` of the first adapter and the rest of the second, on one prompt; `weight` is between 0 and 1."""
        return await _last(lambda: demo.blend(visitor_of(request), first, second, weight, prompt))

    async def rows(rows: list[dict[str, Any]], request: gr.Request) -> dict[str, Any]:
        """One batch: rows of {"adapter": name or null, "prompt": text} or {"adapter": name, "fields": {…}}."""
        return await _last(lambda: demo.rows(visitor_of(request), _asked(rows)))

    def load(repo_id: str, request: gr.Request) -> dict[str, Any]:
        """Load a public adapter of this base from the Hub, for your session."""
        with _told_errors(repo_id):
            return _told(demo.library.load(visitor_of(request), repo_id))

    def remove(adapter: str, request: gr.Request) -> str:
        """Remove an adapter that your session loaded."""
        with _told_errors(adapter):
            demo.library.remove(visitor_of(request), adapter)
        return adapter

    def describe(adapter: str, request: gr.Request) -> dict[str, Any]:
        """An adapter's card, ranks, singular values by role, and what is odd about it."""
        with _told_errors(adapter):
            found = demo.library.get(visitor_of(request), adapter)
            return {**_told(found), **details(demo.library.info(found)), "card": found.card()}

    def stop(request: gr.Request) -> str:
        """End what your session has under way; what is written comes as it is, in state "cancelled"."""
        with _told_errors():
            demo.dispatcher.cancel_all(visitor_of(request))
        return "stopped"

    def stats() -> dict[str, int]:
        """Batches so far, their rows, and how many had rows of different adapters."""
        return {"batches": demo.dispatcher.batches, "rows": demo.dispatcher.rows, "mixed": demo.dispatcher.mixed}

    few = {"load", "describe"}  # wait for the Hub, or for a decomposition, each on a thread
    for function in (tasks, ask, blend, rows, load, remove, describe, stop, stats):
        limits: dict[str, Any] = SLOW if function.__name__ in few else {"concurrency_limit": None}
        gr.api(function, api_name=function.__name__, **limits)  # type: ignore[attr-defined]


class _told_errors:
    """Raise every failure as gradio's own error, in words for a visitor."""

    def __init__(self, what: str = "") -> None:
        self.what = str(what)[:100]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, gr.Error):
            raise gr.Error(said(error, self.what), print_exception=False) from None


async def _last(begin: Any) -> dict[str, Any]:
    last: Progress | None = None
    with _told_errors():
        async for progress in begin():
            last = progress
    assert last is not None
    return {
        "state": last.state,
        "answers": [{"label": a.label, "text": a.text, "error": a.error, "tokens": a.tokens} for a in last.answers],
        "switch_ms": last.switch_ms,
        "load_ms": last.load_ms,
        "batch_rows": last.batch_rows,
        "batch_adapters": last.batch_adapters,
        "waited_s": last.waited,
        "seconds": last.seconds,
    }


def _asked(rows: Any) -> list[tuple[str | None, Any]]:
    found: list[tuple[str | None, Any]] = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        if not isinstance(row, dict):
            raise DemoError(f'Row {number} is no object such as {{"adapter": "name", "prompt": "text"}}.')
        for key in row:
            if key not in ("adapter", "prompt", "fields"):
                raise DemoError(f"Row {number} has the key {str(key)[:40]!r}; it may have adapter, prompt and fields.")
        if ("prompt" in row) == ("fields" in row):
            raise DemoError(f"Row {number} needs a prompt or fields, one of the two.")
        found.append((row.get("adapter"), row["fields"] if "fields" in row else row["prompt"]))
    return found


def _given(demo: Demo, request: Any, adapter: str, fields: dict[str, Any]) -> Any:
    if not isinstance(fields, dict):
        raise DemoError('`fields` is an object such as {"name": "text"}, or {"prompt": "text"}.')
    names = {item.name for item in demo.library.get(visitor_of(request), adapter).task.fields}
    return fields["prompt"] if set(fields) == {"prompt"} and "prompt" not in names else fields


def _told(adapter: Adapter) -> dict[str, Any]:
    task = adapter.task
    return {
        "name": adapter.name,
        "title": adapter.title,
        "about": task.about,
        "rank": adapter.rank,
        "parameters": adapter.parameters,
        "nbytes": adapter.nbytes,
        "commit": adapter.commit,
        "fields": [
            {"name": f.name, "label": f.label, "kind": f.kind, "choices": list(f.choices), "optional": f.may_be_empty}
            for f in task.fields
        ],
        "examples": [dict(example) for example in task.examples],
        "max_new_tokens": task.max_new_tokens,
    }
