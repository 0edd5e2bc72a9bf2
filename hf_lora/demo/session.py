"""What one click does: the rows it becomes, what the page is told while they run, and the answer. Knows no gradio."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LoRANameError
from .dispatch import Dispatcher, Ticket
from .engine import Engine, Mixture, Row
from .library import Library
from .problems import DemoError, said
from .settings import Settings
from .tasks import FREE, Task

__all__ = ["Answer", "Demo", "Progress"]

_EVERY = 0.04  # seconds between two looks at what has come
_WAITING = 0.2  # while it waits for longer than a second
_LARGEST = 1e15  # of a number in a text's place
_LONE = re.compile("[\ud800-\udfff]")
_LEAST_ANSWER = 16  # tokens that a prompt must leave room for

Given = Mapping[str, str] | str


@dataclass(frozen=True)
class Answer:
    """One row so far.

    Args:
        label: the adapter's name, "base", or a mixture in words.
        text: what it wrote. ended: nothing more comes. error: why it could not run, for the page.
        tokens: how many it wrote.
    """

    label: str
    text: str
    ended: bool
    error: str | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Progress:
    """An action so far: its answers, and its state as of `Ticket`."""

    answers: tuple[Answer, ...]
    state: str
    ahead: int
    waited: float
    seconds: float
    switch_ms: float | None = None
    load_ms: float | None = None
    batch_rows: int | None = None
    batch_adapters: int | None = None

    @property
    def over(self) -> bool:
        """Nothing more comes."""
        return self.state not in ("waiting", "running")


@dataclass(frozen=True)
class _Wanted:
    """A row as asked for; `given` is the form's fields, or the prompt's text itself."""

    label: str
    which: str | Mixture | None
    task: Task
    given: Given


class Demo:
    """A base with its adapters, as visitors see it.

    Args:
        base_name: for the page. base_bytes: of the base's weights.
    """

    def __init__(
        self, engine: Engine, library: Library, dispatcher: Dispatcher, settings: Settings, *, base_name: str
    ) -> None:
        self.engine, self.library, self.dispatcher, self.settings = engine, library, dispatcher, settings
        self.base_name = base_name
        weights = {p.data_ptr(): p.numel() * p.element_size() for p in engine.model.parameters()}
        self.base_bytes = sum(weights.values())
        library.forgotten = engine.forget
        for adapter in library.shipped.values():  # a form that cannot be sent shows now, and not to a visitor
            for example in adapter.task.examples:
                try:
                    self._row(_Wanted(adapter.name, adapter.key, adapter.task, example))
                except Exception as error:
                    raise DemoError(
                        f"{adapter.name}: an example of its task cannot be asked: {error}",
                        name=adapter.name,
                        remedy="Change the example, or the task's prompt, system or chat.",
                    ) from error

    # ---- actions -----------------------------------------------------------------------------------------------------

    def ask(self, visitor: str, name: str, given: Given, *, beside: bool = True) -> AsyncIterator[Progress]:
        """One adapter's answer, and the base's beside it, in one batch."""
        adapter = self.library.get(visitor, name)
        wanted = [_Wanted(adapter.name, adapter.key, adapter.task, given)]
        if beside:
            wanted.append(_Wanted("base", None, adapter.task, given))
        return self._follow(visitor, wanted, "ask")

    def blend(
        self, visitor: str, first: str, second: str, weight: float, given: Given, *, form: str | None = None
    ) -> AsyncIterator[Progress]:
        """`weight` of the first and 1 − weight of the second, on the prompt of `form`'s task (the first's)."""
        one, other = self.library.get(visitor, first), self.library.get(visitor, second)
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 <= weight <= 1:
            raise DemoError(f"A blend's weight is between 0 and 1, and this is {str(weight)[:20]}.")
        if one.key == other.key:
            raise DemoError("Choose two different adapters to blend.")
        share = round(float(weight), 4)
        which: str | Mixture = ((one.key, share), (other.key, round(1 - share, 4)))
        which = one.key if share == 1 else other.key if share == 0 else which
        label = f"{share:.0%} {one.name} + {1 - share:.0%} {other.name}"
        task = self.library.get(visitor, form or first).task
        return self._follow(visitor, [_Wanted(label, which, task, given)], "blend")

    def rows(self, visitor: str, asked: Sequence[tuple[str | None, Given]]) -> AsyncIterator[Progress]:
        """One batch: row by row an adapter (None: the base), and its fields or its prompt."""
        if not asked:
            raise DemoError("Give at least one row.")
        if len(asked) > self.settings.batch_rows:
            raise DemoError(f"One batch has at most {self.settings.batch_rows} rows here, and this has {len(asked)}.")
        wanted = []
        for name, given in asked:
            adapter = None if name is None else self.library.get(visitor, name)
            label, key, task = ("base", None, FREE) if adapter is None else (adapter.name, adapter.key, adapter.task)
            wanted.append(_Wanted(label, key, task, given))
        return self._follow(visitor, wanted, "batch", numbered=True)

    def close(self) -> None:
        """Stop what runs, and take the adapters off the base."""
        self.dispatcher.close()
        self.engine.close()
        self.library.close()

    # ---- one action --------------------------------------------------------------------------------------------------

    def check(self, task: Task, values: Mapping[str, Any]) -> dict[str, str]:
        """The fields' values as texts of bounded length. Raises `DemoError`."""
        fields = {item.name: item for item in task.fields}
        for name in values:
            if name not in fields:
                raise DemoError(f"The form has no field {str(name)[:60]!r}. Its fields are: {', '.join(fields)}.")
        found: dict[str, str] = {}
        for name, item in fields.items():
            text = self._bounded(item.label, values.get(name), code=item.kind == "code")
            if item.choices and text not in item.choices:
                raise DemoError(f"{item.label}: {text[:60]!r} is none of {', '.join(filter(None, item.choices))}.")
            if not text and not item.may_be_empty:
                raise DemoError(f"{item.label} is empty.")
            found[name] = text
        if not any(found.values()):
            raise DemoError("The form is empty. Fill in a field, or take an example.")
        return found

    def _bounded(self, label: str, value: Any, *, code: bool = False) -> str:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
        if not (value is None or isinstance(value, str) or number):
            raise DemoError(f"{label}: a text is needed.")
        if isinstance(value, str) and _LONE.search(value):
            raise DemoError(f"{label} holds half of a character, which is no text.")
        text = "" if value is None else str(value).replace("\x00", "")
        text = text.strip("\n") if code else text.strip()
        most = self.settings.prompt_chars
        if len(text) > most:
            raise DemoError(f"{label} has {len(text):,} characters; at most {most:,} are taken here.")
        return text

    def _row(self, wanted: _Wanted) -> Row:
        """Raises `DemoError`: a field is wrong, or the prompt is too long."""
        task, tokenizer, settings = wanted.task, self.engine.tokenizer, self.settings
        if isinstance(wanted.given, Mapping):
            text = task.text(self.check(task, wanted.given))
        else:
            text = self._bounded("The prompt", wanted.given, code=True)
            if not text.strip():
                raise DemoError("The prompt is empty.")
        chat = task.chat and bool(tokenizer.chat_template)
        ids = self.engine.encode(task.written(tokenizer, text), special=not chat)
        new = min(settings.new_tokens, task.max_new_tokens)
        context = self.engine.context
        room = settings.prompt_tokens if context is None else context - min(new, _LEAST_ANSWER)
        most = min(settings.prompt_tokens, room)
        if not 0 < len(ids) <= most:
            raise DemoError(f"The prompt has {len(ids):,} tokens; at most {most:,} are taken here.")
        return Row(ids, wanted.which, new if context is None else min(new, context - len(ids)))

    def _follow(
        self, visitor: str, wanted: Sequence[_Wanted], place: str, *, numbered: bool = False
    ) -> AsyncIterator[Progress]:
        rows = []
        for number, each in enumerate(wanted, 1):  # before anything waits
            try:
                rows.append(self._row(each))
            except DemoError as error:
                raise (DemoError(f"Row {number}: {error.message}") if numbered else error) from None

        async def follow() -> AsyncIterator[Progress]:
            ticket = self.dispatcher.submit(visitor, rows, place)
            try:
                seen: tuple[Any, ...] = ()
                while True:
                    # Before it is looked at closely, so that what comes meanwhile is seen the next time.
                    ahead = self.dispatcher.ahead(ticket) if ticket.state == "waiting" else 0
                    now = (ticket.state, ahead, ticket.facts, [len(tokens) for tokens in ticket.tokens])
                    if now != seen:
                        seen, progress = now, self._progress(ticket, wanted)
                        yield progress
                        if progress.over:
                            return
                    await asyncio.sleep(_EVERY if ticket.state == "running" or ticket.waited < 1 else _WAITING)
                    self.dispatcher.expire(ticket)
            finally:  # also when the page is closed, or the button to stop was pressed
                self.dispatcher.cancel(ticket)

        return follow()

    def _progress(self, ticket: Ticket, wanted: Sequence[_Wanted]) -> Progress:
        state, facts = ticket.state, ticket.facts  # before the tokens: what is over is complete
        answers = tuple(self._answer(ticket, i, each, state) for i, each in enumerate(wanted))
        return Progress(
            answers,
            state,
            self.dispatcher.ahead(ticket) if state == "waiting" else 0,
            ticket.waited,
            ticket.seconds,
            *((facts.switch_ms, facts.load_ms, facts.rows, facts.adapters) if facts is not None else ()),
        )

    def _answer(self, ticket: Ticket, i: int, wanted: _Wanted, state: str) -> Answer:
        over = state not in ("waiting", "running")
        error = ticket.errors[i]
        if error is not None:
            removed = isinstance(error, LoRANameError)
            words = f"{wanted.label} was removed." if removed else said(error, wanted.label)
            return Answer(wanted.label, "", True, words)
        tokens = list(ticket.tokens[i])
        if not tokens:  # as long as it waits there is nothing to decode
            return Answer(wanted.label, "", over)
        text, ended = self.engine.decode(tokens, ticket.rows[i].max_tokens)
        text = text.lstrip()
        stop = min((at for at in (text.find(end) for end in wanted.task.stop) if at >= 0), default=None)
        if stop is not None:
            text, ended = text[:stop], True
            ticket.stopped[i] = True
        ended = ended or over or len(tokens) >= ticket.rows[i].max_tokens
        if not ended:
            text = text.rstrip("\ufffd")  # a character whose other bytes are still to come
        return Answer(wanted.label, text.strip(), ended, None, len(tokens))
