"""One batch in which every row goes through another adapter."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from ..problems import said
from ..session import Demo
from .blend import first_prompt
from .parts import figures, note, status, visitor_of

__all__ = ["BASE", "batch_tab"]

BASE = ("Base model alone", "")
_MOST = 6  # rows on the page
_PROMPT = "The capital of France is"  # of a row whose adapter has no examples


def batch_tab(demo: Demo) -> list[Any]:
    """Build it. Returns the controls that choose an adapter."""
    shipped = list(demo.library.shipped.values())
    choices = [BASE, *((each.title, each.name) for each in shipped)]
    start: list[Any] = [*shipped[: _MOST - 1], None]
    gr.Markdown("Every row of this batch goes through another adapter, in one `generate` of one base model.")
    pickers, prompts, answers = [], [], []
    for i, adapter in enumerate(start, 1):
        with gr.Row(elem_classes="batch-row"):
            pickers.append(
                gr.Dropdown(
                    choices,
                    value=adapter.name if adapter else "",
                    label=f"Row {i}",
                    scale=2,
                    min_width=180,
                    elem_id=f"batch-adapter-{i}",
                )
            )
            prompts.append(
                gr.Textbox(
                    first_prompt(adapter) or _PROMPT,
                    label=f"Row {i}: prompt",
                    lines=2,
                    max_lines=4,
                    scale=4,
                    min_width=240,
                    elem_id=f"batch-prompt-{i}",
                )
            )
            answers.append(
                gr.Textbox(
                    label=f"Row {i}: answer",
                    lines=2,
                    max_lines=4,
                    scale=4,
                    min_width=240,
                    interactive=False,
                    elem_id=f"batch-answer-{i}",
                )
            )
    with gr.Row():
        run = gr.Button("Run as one batch", variant="primary", elem_id="batch-run")
        stop = gr.Button("Stop", elem_id="batch-stop")
    state = gr.HTML(note("Nothing asked yet."), elem_id="batch-state")
    facts = gr.HTML("", elem_id="batch-facts")

    async def run_rows(request: gr.Request, *given: Any) -> AsyncIterator[list[Any]]:
        names, texts = given[: len(start)], given[len(start) :]
        try:
            asked = [(name or None, text or "") for name, text in zip(names, texts, strict=True)]
            async for progress in demo.rows(visitor_of(request), asked):
                shown = [
                    gr.update(value=answer.error or answer.text, label=f"Row {i}: {answer.label}")
                    for i, answer in enumerate(progress.answers, 1)
                ]
                yield [status(progress), figures(demo, progress, None), *shown]
        except Exception as error:  # noqa: BLE001  # the page says it in its own words
            yield [note(said(error), "bad"), "", *[gr.update(value="") for _ in start]]

    def prompt_of(request: gr.Request, name: str) -> Any:
        text = first_prompt(demo.library.of(visitor_of(request)).get(name))
        return gr.update(value=text) if text else gr.update()

    def end(request: gr.Request) -> None:
        demo.dispatcher.cancel_all(visitor_of(request), "batch")

    run.click(
        run_rows,
        [*pickers, *prompts],
        [state, facts, *answers],
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    stop.click(end, None, None, queue=False, api_visibility="private")
    for picker, prompt in zip(pickers, prompts, strict=True):
        picker.input(prompt_of, picker, prompt, show_progress="hidden", api_visibility="private")
    return pickers
