"""Pick a task, fill in its form, and read the adapter's answer beside the base's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from ..problems import said
from ..session import Demo
from ..tasks import FREE
from .forms import Forms
from .parts import figures, note, score, status, visitor_of

__all__ = ["ask_tab"]

_FEW = 8  # tasks that are shown as buttons; more make a list


def ask_tab(demo: Demo) -> Any:
    """Build it. Returns the control that chooses an adapter."""
    shipped = demo.library.shipped
    first = next(iter(shipped), "")
    adapter = shipped.get(first)
    choices = [(each.title, name) for name, each in shipped.items()]
    picker: Any = gr.Radio if len(choices) <= _FEW else gr.Dropdown
    task = picker(choices, value=first or None, label="Task", elem_id="ask-task", elem_classes="tasks")
    with gr.Row(elem_classes="sides"):
        with gr.Column(scale=5, min_width=320):
            about = gr.Textbox(
                _about(adapter), show_label=False, container=False, interactive=False, lines=2, elem_classes="about"
            )
            forms = Forms({name: each.task for name, each in shipped.items()}, first=first, prefix="ask")
            with gr.Row():
                run = gr.Button("Ask both", variant="primary", elem_id="ask-run")
                stop = gr.Button("Stop", elem_id="ask-stop")
        with gr.Column(scale=5, min_width=320):
            state = gr.HTML(note("Nothing asked yet."), elem_id="ask-state")
            with_it = gr.Textbox(label="With the adapter", lines=3, interactive=False, elem_id="ask-adapter")
            without = gr.Textbox(label="Base model alone", lines=3, interactive=False, elem_id="ask-base")
            facts = gr.HTML("", elem_id="ask-facts")
            with gr.Accordion("How good is it?", open=False, visible=bool(adapter and adapter.task.score)) as measured:
                found = gr.HTML(score(adapter.task.score if adapter else None), elem_id="ask-score")

    async def ask(request: gr.Request, name: str, *given: Any) -> AsyncIterator[tuple[str, str, str, str]]:
        visitor = visitor_of(request)
        try:
            values = forms.values(name, given)
            chosen = demo.library.get(visitor, name)
            async for progress in demo.ask(visitor, name, values):
                mine, base = progress.answers
                yield status(progress), mine.text, base.text, figures(demo, progress, chosen)
        except Exception as error:  # noqa: BLE001  # whatever it is, the page says so in its own words
            yield note(said(error, name), "bad"), "", "", ""

    def choose(request: gr.Request, name: str | None) -> list[Any]:
        chosen = demo.library.of(visitor_of(request)).get(name or "")
        rating = chosen.task.score if chosen else None
        return [
            gr.update(value=_about(chosen)),
            gr.update(visible=rating is not None),
            score(rating),
            *forms.shown(name or ""),
            note("Nothing asked yet."),
            "",
            "",
            "",
        ]

    def end(request: gr.Request) -> None:
        demo.dispatcher.cancel_all(visitor_of(request), "ask")

    outputs = [state, with_it, without, facts]
    fields = [control for control in forms.controls if isinstance(control, gr.Textbox) and control.lines == 1]
    gr.on(
        [run.click, *(control.submit for control in fields)],
        ask,
        [task, *forms.controls],
        outputs,
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    stop.click(end, None, None, queue=False, api_visibility="private")
    changed = [about, measured, found, *forms.groups, *outputs]
    gr.on(task.change, choose, task, changed, show_progress="hidden", api_visibility="private")
    return task


def _about(adapter: Any) -> str:
    if adapter is None:
        return "Load an adapter of this base from the Hub (tab Adapters), or choose one."
    return str(adapter.task.about or (FREE.about if adapter.task is FREE else ""))
