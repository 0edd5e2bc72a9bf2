"""A task's form as controls, and its examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..tasks import FREE, Field, Task

__all__ = ["Form", "Forms"]

_LINES = {"text": 1, "long": 4, "code": 10}
_NAMED = 42  # characters of an example's name


@dataclass
class Form:
    """One task's controls, in a group that is shown for its adapters alone."""

    task: Task
    group: Any
    controls: list[Any]

    def values(self, given: Sequence[Any]) -> dict[str, Any]:
        """Field → what its control holds."""
        return dict(zip((item.name for item in self.task.fields), given, strict=True))


class Forms:
    """The forms of all tasks; adapters without one share a free prompt.

    Args:
        tasks: adapter's name → its task. first: whose form is shown. prefix: of the controls' ids.
    """

    def __init__(self, tasks: Mapping[str, Task], *, first: str, prefix: str) -> None:
        self.prefix = prefix
        own = {name: task for name, task in tasks.items() if task is not FREE}
        shown = first if first in own else ""
        self.forms = {name: self._form(name, task, visible=name == shown) for name, task in own.items()}
        self.forms[""] = self._form("", FREE, visible=not shown)

    def _form(self, name: str, task: Task, *, visible: bool) -> Form:
        with gr.Column(visible=visible, elem_classes="form") as group:
            start = task.examples[0] if task.examples else {}
            place = f"{self.prefix}-{name or 'free'}"
            controls = []
            with gr.Row(elem_classes="fields"):
                controls = [self._control(item, start.get(item.name, ""), place) for item in task.fields]
            if len(task.examples) > 1:
                gr.Examples(
                    [[example.get(item.name, "") for item in task.fields] for example in task.examples],
                    controls,
                    label="Examples nobody trained on",
                    example_labels=[_named(example) for example in task.examples],
                    elem_id=f"{place}-examples",
                    api_visibility="private",
                )
        return Form(task, group, controls)

    def _control(self, item: Field, value: str, place: str) -> Any:
        where: dict[str, Any] = {"elem_id": f"{place}-{item.name}", "label": item.label, "value": value}
        if item.kind == "choice":
            return gr.Dropdown([(choice or "not given", choice) for choice in item.choices], min_width=150, **where)
        lines = _LINES[item.kind]
        return gr.Textbox(
            lines=lines,
            max_lines=max(lines, 14 if lines > 1 else 1),
            placeholder=item.hint or ("optional" if item.optional else None),
            min_width=150 if lines == 1 else 300,
            elem_classes="code" if item.kind == "code" else None,
            **where,
        )

    @property
    def controls(self) -> list[Any]:
        """Of all forms, one after the other."""
        return [control for form in self.forms.values() for control in form.controls]

    @property
    def groups(self) -> list[Any]:
        """In the same order."""
        return [form.group for form in self.forms.values()]

    def key(self, name: str) -> str:
        """The form of an adapter."""
        return name if name in self.forms else ""

    def shown(self, name: str) -> list[Any]:
        """Updates of the groups, so that this adapter's is seen."""
        return [gr.update(visible=key == self.key(name)) for key in self.forms]

    def values(self, name: str, given: Sequence[Any]) -> dict[str, Any]:
        """Field → value of this adapter's form, out of the values of all controls."""
        at = 0
        for key, form in self.forms.items():
            if key == self.key(name):
                return form.values(given[at : at + len(form.controls)])
            at += len(form.controls)
        raise KeyError(name)


def _named(example: Mapping[str, str]) -> str:
    text = " · ".join(" ".join(value.split()) for value in example.values() if value)
    return text if len(text) <= _NAMED else text[: _NAMED - 1] + "…"
