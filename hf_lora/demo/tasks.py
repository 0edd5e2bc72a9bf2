"""A task's form: the fields that a visitor fills in, and the prompt they make. Read from an adapter's task.yaml."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..recipe import document, shapes
from ..recipe.problems import RecipeError, near, wrong
from ..recipe.template import Template

__all__ = ["FREE", "TASK_FILE", "Attributes", "Field", "Score", "Task", "read_task"]

TASK_FILE = "task.yaml"
_MOST_TOKENS = 512
_MOST_FIELDS = 16


class _Checked:
    """A frozen dataclass whose fields have the types of their annotations."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, item.name)
            if not shapes.fits(value, hints[item.name]):
                raise wrong(item.name, value, shapes.described(hints[item.name]))
            object.__setattr__(self, item.name, shapes.normal(value, hints[item.name]))
        self._check()

    def _check(self) -> None:
        """What the types do not say."""


@dataclass(frozen=True, kw_only=True)
class Field(_Checked):
    """One control of a form.

    Args:
        name: in `prompt`. label: on the page. kind: one line, several, code, or one of `choices`.
        choices: "" is "not given".
        optional: may be left empty. A choice with "" is.
        hint: shown in an empty field.
    """

    name: str
    label: str
    kind: Literal["text", "long", "code", "choice"] = "text"
    choices: tuple[str, ...] = ()
    optional: bool = False
    hint: str = ""

    def _check(self) -> None:
        if not self.name.isidentifier():
            raise wrong("name", self.name, "a word of letters, digits and _")
        if (self.kind == "choice") != bool(self.choices) or len(set(self.choices)) < len(self.choices):
            raise wrong("choices", list(self.choices), f"different texts, and only for a choice ({self.kind} here)")

    @property
    def may_be_empty(self) -> bool:
        """Whether a form without it can be sent."""
        return self.optional or "" in self.choices


@dataclass(frozen=True, kw_only=True)
class Attributes(_Checked):
    """Joins the fields that have a value into one text, {attributes} in the prompt.

    Args:
        pair: of {key} and {value}. joint: between two. keys: what a field's name is in the data, where it differs.
    """

    pair: str = "{key}[{value}]"
    joint: str = ", "
    keys: Mapping[str, str] = field(default_factory=dict)

    def _check(self) -> None:
        if set(Template.parse("pair", self.pair).columns) != {"key", "value"}:
            raise wrong("pair", self.pair, "a template of {key} and {value}")

    def text(self, values: Mapping[str, str]) -> str:
        """The fields that have a value, in order."""
        pair = Template.parse("pair", self.pair)
        pairs = [(self.keys.get(name, name), value) for name, value in values.items() if value]
        return self.joint.join(pair.render({"key": key, "value": value}) for key, value in pairs)


@dataclass(frozen=True, kw_only=True)
class Score(_Checked):
    """What was measured on held-out data.

    Args:
        base, best_trivial, adapter: the metric's values. error: of the gain over the better of the other two, 95 %.
        on: what it was measured on. better: which way.
    """

    metric: str
    base: float
    best_trivial: float
    adapter: float
    error: float
    on: str
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True, kw_only=True)
class Task(_Checked):
    """What an adapter is for, as a form.

    Args:
        title, about: for the reader.
        fields: in order.
        prompt: a template of their names, or of {attributes}.
        attributes: how {attributes} is made.
        chat: write the prompt in the tokenizer's chat format, with what `system` says first.
        max_new_tokens: of an answer. stop: an answer ends before the first of these.
        examples: values of the fields.
        score: on held-out data. license: of the data.
    """

    title: str
    about: str = ""
    fields: tuple[Field, ...]
    prompt: str
    attributes: Attributes | None = None
    chat: bool = False
    system: str | None = None
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    examples: tuple[Mapping[str, str], ...] = ()
    score: Score | None = None
    license: str = ""

    def _check(self) -> None:
        names = [item.name for item in self.fields]
        if not names or len(names) > _MOST_FIELDS or len(set(names)) < len(names):
            raise wrong("fields", names, f"1 to {_MOST_FIELDS} fields with different names")
        if not 1 <= self.max_new_tokens <= _MOST_TOKENS:
            raise wrong("max_new_tokens", self.max_new_tokens, f"1 to {_MOST_TOKENS}")
        if not all(self.stop):
            raise wrong("stop", list(self.stop), "texts that are not empty")
        known = {*names, *(["attributes"] if self.attributes is not None else [])}
        used = set(Template.parse("prompt", self.prompt).columns)
        if not used <= known:
            unknown = sorted(used - known)[0]
            raise RecipeError(
                f"prompt: {{{unknown}}} is no field.", name="prompt", value=self.prompt, remedy=near(unknown, known)
            )
        if self.attributes is not None and not set(self.attributes.keys) <= set(names):
            raise wrong("attributes.keys", dict(self.attributes.keys), "a mapping from fields")
        for at, example in enumerate(self.examples):
            for name, value in example.items():
                if name not in names:
                    raise RecipeError(f"examples[{at}]: {name!r} is no field.", name="examples", value=name)
                choices = next(item.choices for item in self.fields if item.name == name)
                if choices and value not in choices:
                    raise wrong(f"examples[{at}].{name}", value, f"one of {', '.join(map(repr, choices))}")

    def text(self, values: Mapping[str, str]) -> str:
        """The prompt that the fields make, before the chat format."""
        own = {item.name: values.get(item.name, "") for item in self.fields}
        joined = {} if self.attributes is None else {"attributes": self.attributes.text(own)}
        return Template.parse("prompt", self.prompt).render({**own, **joined})

    def written(self, tokenizer: Any, text: str) -> str:
        """A prompt as the model reads it."""
        if not self.chat or not tokenizer.chat_template:
            return text
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns.append({"role": "user", "content": text})
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


FREE = Task(
    title="Free prompt",
    about="This adapter says nothing of its input: write the prompt that it was trained on.",
    fields=(Field(name="prompt", label="Prompt", kind="long"),),
    prompt="{prompt}",
    chat=True,
)
"""The form of an adapter without a task.yaml."""

_SECTIONS: dict[str, type] = {"attributes": Attributes, "score": Score}


def read_task(folder: Path) -> Task | None:
    """The task of an adapter's folder; None if it says none. Raises `RecipeError` naming the file and line."""
    path = folder / TASK_FILE
    if not path.is_file():
        return None
    read = document.read(path)
    given = dict(read.content)
    for name, kind in _SECTIONS.items():
        if given.get(name) is not None:
            given[name] = _made(kind, given[name], (name,), read)
    if isinstance(given.get("fields"), list):
        given["fields"] = [_made(Field, item, ("fields",), read) for item in given["fields"]]
    if isinstance(given.get("examples"), list):
        given["examples"] = [
            {name: "" if value is None else value for name, value in item.items()} if isinstance(item, dict) else item
            for item in given["examples"]
        ]
    task: Task = _made(Task, given, (), read)
    return task


def _made(kind: type, value: Any, keys: tuple[str, ...], read: document.Document) -> Any:
    place = read.place(keys)
    if not isinstance(value, Mapping):
        raise RecipeError(f"{place}: {'.'.join(keys)} is no mapping.", name=".".join(keys), value=value)
    items = dataclasses.fields(kind)
    names = [item.name for item in items]
    for name in value:
        if name not in names:
            what = ".".join(keys) or "a task"
            raise RecipeError(f"{place}: {what} has no key {name!r}.", name=name, remedy=near(name, names))
    for item in items:
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if needed and item.name not in value:
            raise RecipeError(f"{place}: {item.name} is missing.", name=item.name, remedy=f"Add {item.name}.")
    try:
        return kind(**value)
    except RecipeError as error:
        where = read.place((*keys, (error.name or "").split(".")[0])) or place
        raise RecipeError(
            f"{where}: {error.message}", name=error.name, value=error.value, remedy=error.remedy
        ) from None
