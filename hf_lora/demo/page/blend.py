"""Two adapters at once: w·ΔW of one and (1 − w)·ΔW of the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from ..problems import said
from ..session import Demo
from .parts import figures, note, status, visitor_of

__all__ = ["blend_tab", "first_prompt"]


def first_prompt(adapter: Any) -> str:
    """The prompt of a task's first example."""
    if adapter is None or not adapter.task.examples:
        return ""
    return str(adapter.task.text(adapter.task.examples[0]))


def blend_tab(demo: Demo) -> list[Any]:
    """Build it. Returns the controls that choose an adapter."""
    shipped = list(demo.library.shipped.values())
    one, other = [*shipped, None, None][:2]
    choices = [(each.title, each.name) for each in shipped]
    with gr.Row(elem_classes="sides"):
        with gr.Column(scale=5, min_width=320):
            with gr.Row():
                first = gr.Dropdown(
                    choices, value=one.name if one else None, label="First adapter", elem_id="blend-first"
                )
                second = gr.Dropdown(
                    choices, value=other.name if other else None, label="Second adapter", elem_id="blend-second"
                )
            share = gr.Slider(
                0, 100, 50, step=5, label="Share of the first, in percent", elem_id="blend-share", buttons=[]
            )
            prompt = gr.Textbox(
                first_prompt(one), label="Prompt (in the form of the first)", lines=5, elem_id="blend-prompt"
            )
            with gr.Row():
                run = gr.Button("Blend", variant="primary", elem_id="blend-run")
                stop = gr.Button("Stop", elem_id="blend-stop")
        with gr.Column(scale=5, min_width=320):
            state = gr.HTML(note("Move the slider, or press Blend."), elem_id="blend-state")
            answer = gr.Textbox(label="The blend", lines=5, interactive=False, elem_id="blend-answer")
            facts = gr.HTML("", elem_id="blend-facts")

    async def blend(
        request: gr.Request, a: str, b: str, percent: float, text: str
    ) -> AsyncIterator[tuple[str, Any, str]]:
        try:
            async for progress in demo.blend(visitor_of(request), a, b, percent / 100, text):
                (mixed,) = progress.answers
                yield (
                    status(progress),
                    gr.update(value=mixed.text, label=mixed.label),
                    figures(demo, progress, None),
                )
        except Exception as error:  # noqa: BLE001  # the page says it in its own words
            yield note(said(error), "bad"), gr.update(value=""), ""

    def prompt_of(request: gr.Request, name: str) -> str:
        return first_prompt(demo.library.of(visitor_of(request)).get(name))

    def end(request: gr.Request) -> None:
        demo.dispatcher.cancel_all(visitor_of(request), "blend")

    gr.on(
        [run.click, share.release],
        blend,
        [first, second, share, prompt],
        [state, answer, facts],
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="always_last",
        api_visibility="private",
    )
    stop.click(end, None, None, queue=False, api_visibility="private")
    first.input(prompt_of, first, prompt, show_progress="hidden", api_visibility="private")
    return [first, second]
