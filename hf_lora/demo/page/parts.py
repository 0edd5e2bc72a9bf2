"""Small pieces of the page: numbers as tiles, an action's state in words. All text in HTML is escaped here."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from ..library import Adapter
from ..problems import DemoError
from ..session import Demo, Progress
from ..tasks import Score

__all__ = ["LEAST_SHOWN", "SLOW", "figures", "megabytes", "note", "score", "status", "tiles", "visitor_of"]

SLOW: dict[str, Any] = {"concurrency_limit": 4, "concurrency_id": "slow"}
"""Of what waits for the Hub or computes on a thread: gradio has 40 of them for everything, its own pages included."""

LEAST_SHOWN = 0.001  # milliseconds; less is within the clock's own grain


def visitor_of(request: Any) -> str:
    """Who asks: a page's session. Each tab and each client has its own. Raises `DemoError` for a call without one."""
    found = getattr(request, "session_hash", None)
    if not found:
        raise DemoError("A call needs a session: open the page, or use gradio_client.")
    return str(found)


def megabytes(nbytes: int) -> str:
    """9 kB, 1.84 MB, 538 MB."""
    if nbytes < 1e5:
        return f"{nbytes / 1e3:,.1f} kB"
    size = nbytes / 1e6
    return f"{size:,.2f} MB" if size < 10 else f"{size:,.0f} MB"


def tiles(pairs: Sequence[tuple[str, str, str]]) -> str:
    """(name, value, remark) as tiles."""
    cells = "".join(
        f'<div class="tile"><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>'
        f"<span>{html.escape(remark)}</span></div>"
        for name, value, remark in pairs
    )
    return f'<dl class="tiles">{cells}</dl>'


def note(text: str, kind: str = "") -> str:
    """A line that a screen reader speaks when it changes. kind: "", "good" or "bad"."""
    role = "alert" if kind == "bad" else "status"
    return f'<p class="note {kind}" role="{role}" aria-live="polite">{html.escape(text)}</p>'


def status(progress: Progress) -> str:
    """The state in words."""
    if progress.state == "waiting":
        before = f"; {progress.ahead} before you" if progress.ahead else ""
        return note(f"Waiting{before}…")
    if progress.state == "running":
        return note("Writing…")
    failed = next((answer.error for answer in progress.answers if answer.error), None)
    if progress.state == "failed" or (failed and len(progress.answers) == 1):
        return note(failed or "It failed.", "bad")
    if progress.state == "cancelled":
        return note("Stopped.")
    if progress.state == "late":
        return note("The time was over; this is what was written until then.", "bad")
    return note(f"Done in {progress.seconds:.1f} s." + (f" {failed}" if failed else ""), "bad" if failed else "good")


def figures(demo: Demo, progress: Progress, adapter: Adapter | None) -> str:
    """What the switch took, how large the adapter is beside its base, and who shared the batch."""
    pairs: list[tuple[str, str, str]] = []
    if progress.switch_ms is not None:
        took = f"{progress.switch_ms:.3f} ms" if progress.switch_ms >= LEAST_SHOWN else f"< {LEAST_SHOWN} ms"
        was = "it was on the device" if (progress.load_ms or 0) < 1 else f"loaded in {progress.load_ms:.0f} ms"
        pairs.append(("Switch", took, was))
    if adapter is not None:
        share = adapter.nbytes / demo.base_bytes
        remark = f"base {megabytes(demo.base_bytes)}, so {share:.2%}"
        pairs.append(("Adapter", megabytes(adapter.nbytes), remark))
    if progress.batch_rows is not None:
        remark = f"{progress.batch_adapters} adapter{'s' * (progress.batch_adapters != 1)} in one batch"
        pairs.append(("Batch", f"{progress.batch_rows} row{'s' * (progress.batch_rows != 1)}", remark))
    tokens = sum(answer.tokens for answer in progress.answers)
    if progress.seconds and tokens:
        remark = f"{tokens} tokens in {progress.seconds:.1f} s, waited {progress.waited:.1f} s"
        pairs.append(("Speed", f"{tokens / progress.seconds:.0f} tokens/s", remark))
    return tiles(pairs) if pairs else ""


def score(found: Score | None) -> str:
    """What was measured of an adapter, beside its base."""
    if found is None:
        return ""
    pairs = [
        ("Base alone", f"{found.base:g}", found.metric),
        ("Best without training", f"{found.best_trivial:g}", found.metric),
        ("With the adapter", f"{found.adapter:g}", f"{found.metric} on {found.on}; gain ± {found.error:g}"),
    ]
    return tiles(pairs)
