"""Put the tabs together, wire what they share, and add the API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..problems import said
from ..session import Demo
from .adapters import adapters_tab
from .api import add_api
from .ask import ask_tab
from .batch import BASE, batch_tab
from .blend import blend_tab
from .parts import SLOW, megabytes, note, tiles, visitor_of

__all__ = ["CSS", "build", "theme"]

CSS = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


def theme() -> Any:
    """Colours and fonts; none is fetched from elsewhere."""
    return gr.themes.Soft(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=["Inter", "system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )


def build(demo: Demo, *, title: str = "One base model, tasks switched live") -> Any:
    """The page. The queue of gradio only passes on; the demo's own is the limit."""
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        add_api(demo)  # first, so that the names are the endpoints'
        gr.HTML(_head(demo, title), elem_id="head")
        with gr.Tabs():
            with gr.Tab("Ask", id="ask"):
                task = ask_tab(demo)
            with gr.Tab("Blend", id="blend"):
                pair = blend_tab(demo)
            with gr.Tab("One batch", id="batch"):
                rows = batch_tab(demo)
            with gr.Tab("Adapters", id="adapters"):
                own, shown = adapters_tab(demo)
        pickers = [own["chosen"], task, *pair, *rows]

        def choices(visitor: str, select: str | None, current: Sequence[Any]) -> list[Any]:
            """For every picker what there is now; one whose choice is gone gets another."""
            there = demo.library.of(visitor)
            named = [(adapter.title, name) for name, adapter in there.items()]
            first = next(iter(there), None)
            updates = [gr.update(choices=named, value=select or first) for _ in (own["chosen"], task)]
            for value in current[2 : 2 + len(pair)]:
                updates.append(gr.update(choices=named, value=value if value in there else first))
            for value in current[2 + len(pair) :]:
                updates.append(gr.update(choices=[BASE, *named], value=value if value in there else BASE[1]))
            return updates

        def load(request: gr.Request, repo: str, *current: Any) -> list[Any]:
            visitor = visitor_of(request)
            try:
                adapter = demo.library.load(visitor, repo)
            except Exception as error:  # noqa: BLE001  # the page says it in its own words
                return [note(said(error, repo.strip()[:100]), "bad"), gr.update(), *[gr.update() for _ in pickers]]
            told = note(f"{adapter.name} is loaded: {megabytes(adapter.nbytes)}, rank {adapter.rank}.", "good")
            return [told, gr.update(value=""), *choices(visitor, adapter.name, current)]

        def remove(request: gr.Request, *current: Any) -> list[Any]:
            name = current[0]
            visitor = visitor_of(request)
            try:
                demo.library.remove(visitor, name)
            except Exception as error:  # noqa: BLE001
                return [note(said(error, name), "bad"), *[gr.update() for _ in pickers]]
            return [note(f"{name} is removed.", "good"), *choices(visitor, None, current)]

        def leave(request: gr.Request) -> None:
            visitor = visitor_of(request)
            demo.dispatcher.cancel_all(visitor)
            demo.library.leave(visitor)

        quiet: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}
        loaded = [own["state"], own["repo"], *pickers]
        gr.on([own["load"].click, own["repo"].submit], load, [own["repo"], *pickers], loaded, **quiet, **SLOW)
        own["remove"].click(remove, pickers, [own["state"], *pickers], **quiet)
        page.load(own["look"], own["chosen"], shown, show_progress="hidden", api_visibility="private", **SLOW)
        page.unload(leave)
    page.queue(default_concurrency_limit=None, max_size=None, api_open=False)
    return page


def _head(demo: Demo, title: str) -> str:
    import html

    shipped = demo.library.shipped.values()
    small = sum(adapter.nbytes for adapter in shipped)
    told = tiles(
        [
            ("One base", demo.base_name.rpartition("/")[2], megabytes(demo.base_bytes)),
            ("Adapters", str(len(shipped)), f"{megabytes(small)} together" if small else "load one from the Hub"),
            ("Device", str(demo.engine.model.device), str(demo.engine.model.dtype).removeprefix("torch.")),
        ]
    )
    return f"<header><h1>{html.escape(title)}</h1>{told}</header>"
