"""The demo without its page: forms, batches of many visitors, their limits, adapters from the Hub, and the Space."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from demos import NAMES, TASKS, folder_of_adapters, small_demo
from oracles import merged
from pools import MLP, QV, merged_base, random_value, write_folder
from smallbase import tokenizer

from hf_lora import LoRAConfig, LoRAConfigError, LoRAError, LoRAFileError, LoRAMismatchError
from hf_lora import hub as hub_files
from hf_lora.demo import Demo, DemoError, Settings
from hf_lora.demo.dispatch import Dispatcher, Ticket
from hf_lora.demo.engine import BatchFacts, Row
from hf_lora.demo.page.adapters import plain
from hf_lora.demo.problems import clean, said
from hf_lora.demo.session import Progress
from hf_lora.demo.tasks import FREE, Field, Score, Task, read_task
from hf_lora.recipe import RecipeError
from hf_lora.store import read_adapter, write_adapter

WORDS = tokenizer(chat=True)


@pytest.fixture
def demo(tiny, tmp_path) -> Iterator[Demo]:
    made = small_demo(tiny("llama"), tmp_path)
    yield made
    made.close()


@torch.no_grad()
def written(model: Any, ids: Sequence[int], count: int) -> str:
    """Greedy tokens, one at a time, no cache, no batch."""
    found = torch.tensor([list(ids)])
    for _ in range(count):
        found = torch.cat([found, model(found).logits[:, -1:].argmax(-1)], dim=1)
        if int(found[0, -1]) == WORDS.eos_token_id:
            break
    return str(WORDS.decode(found[0, len(ids) :], skip_special_tokens=True)).strip()


def prompt_ids(text: str, *, chat: bool) -> list[int]:
    if chat:
        text = WORDS.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    return list(WORDS(text, add_special_tokens=False)["input_ids"])


async def _last(progress: Any) -> Progress:
    found: Progress | None = None
    async for now in progress:
        found = now
    assert found is not None
    return found


def last(progress: Any) -> Progress:
    return asyncio.run(_last(progress))


def texts(progress: Any) -> list[str]:
    found = last(progress)
    assert found.state == "done", found
    return [answer.text for answer in found.answers]


# ---- forms -----------------------------------------------------------------------------------------------------------


def task_of(text: str, folder: Path) -> Task | None:
    (folder / "task.yaml").write_text(text)
    return read_task(folder)


def test_a_form_makes_its_prompt(tmp_path):
    task = task_of(TASKS["places"], tmp_path)
    assert task is not None
    assert task.text({"name": "w7 w8", "food": "", "near_by": "w30"}) == "name w7 w8 w5 w20 w30 w6"
    assert task.written(WORDS, "w6") == "<bos> user w6 <eos> assistant "
    assert [item.may_be_empty for item in task.fields] == [False, True, True]
    assert task.score == Score(
        metric="ROUGE-L", base=16.1, best_trivial=19.1, adapter=30.6, error=4.7, on="64 held-out places"
    )
    assert read_task(tmp_path / "nowhere") is None


def test_a_prompt_never_looks_inside_a_value():
    task = Task(title="t", fields=(Field(name="a", label="A"),), prompt="{a}!")
    assert task.text({"a": "{b} {0.__class__} {{"}) == "{b} {0.__class__} {{!"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("title: Describe a place", "titel: x"), "titel"),
        (("title: Describe a place\n", ""), "title is missing"),
        (("kind: text", "kind: html"), "kind"),
        (("name: name,", "name: a-b,"), "a-b"),
        (('choices: ["", w10, w11]', "choices: []"), "choices"),
        (("{attributes} w6", "{attribute} w6"), "Did you mean attributes"),
        (("{key} {value}", "{key}"), "pair"),
        (("keys: {near_by: w20}", "keys: {nearby: w20}"), "nearby"),
        (("{name: w7 w8, food: w10}", "{name: w7 w8, food: w12}"), "w12"),
        (("{name: w7 w8, food: w10}", "{place: w7}"), "place"),
        (("max_new_tokens: 12", "max_new_tokens: 100000"), "100000"),
        (("adapter: 30.6", "adapter: good"), "good"),
        (("chat: true", "chat: &a true"), "anchors"),
        (("chat: true", "chat: 1"), "chat"),
    ],
    ids=lambda value: value[1][:20] if isinstance(value, tuple) else None,
)
def test_a_mistake_in_a_task_is_named(change, words, tmp_path):
    assert change[0] in TASKS["places"]
    with pytest.raises(RecipeError, match=words) as caught:
        task_of(TASKS["places"].replace(*change), tmp_path)
    assert "task.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"batch_rows": 0}, {"timeout": "1"}, {"queue": True}, {"gather": -1.0}, {"device_slots": 4, "batch_rows": 5}],
    ids=str,
)
def test_impossible_settings(options):
    with pytest.raises(LoRAConfigError, match=next(iter(options))):
        Settings(**options)


# ---- what is computed ------------------------------------------------------------------------------------------------


def test_each_row_of_a_batch_is_its_adapter_alone(demo, tiny, tmp_path):
    """Against W + s B A by hand in float64, token by token, no batch and no cache."""
    base = tiny("llama")
    asked = [("places", "w3 w4 w5 w6 w7 w8 w9", 12), ("tone", "w9 w10", 3), ("ben", "w11", 20), (None, "w12 w13", 20)]
    found = texts(demo.rows("v", [(name, text) for name, text, _ in asked]))
    for (name, text, count), answer in zip(asked, found, strict=True):
        alone = merged_base(base) if name is None else merged(base, tmp_path / "adapters" / name)
        want = written(alone, prompt_ids(text, chat=name != "tone"), count)
        assert answer[: len(want)] == want, name
        assert answer
    assert demo.dispatcher.batches == 1
    assert demo.dispatcher.mixed == 1


def test_the_base_stands_beside(demo, tiny, tmp_path):
    ids = prompt_ids("name w7 w8 w5 food w10 w6", chat=True)
    found = last(demo.ask("v", "places", {"name": "w7 w8", "food": "w10"}))
    assert [answer.label for answer in found.answers] == ["places", "base"]
    assert found.answers[0].text == written(merged(tiny("llama"), tmp_path / "adapters" / "places"), ids, 12)
    assert found.answers[1].text == written(merged_base(tiny("llama")), ids, 12)
    assert (found.batch_rows, found.batch_adapters) == (2, 1)
    assert found.switch_ms is not None
    assert found.switch_ms >= 0


def test_a_blend_is_the_mixture(demo, tiny, tmp_path):
    base, share = tiny("llama"), 0.3
    one, other = (merged(base, tmp_path / "adapters" / name) for name in ("places", "ben"))
    mixed, plain = merged_base(base), dict(merged_base(base).named_parameters())
    with torch.no_grad():
        for name, weight in mixed.named_parameters():
            weight += share * (one.get_parameter(name) - plain[name]) + (1 - share) * (
                other.get_parameter(name) - plain[name]
            )
    assert texts(demo.blend("v", "places", "ben", share, "w3 w4")) == [
        written(mixed, prompt_ids("w3 w4", chat=True), 12)
    ]
    assert texts(demo.blend("v", "places", "ben", 1.0, "w3 w4")) == [written(one, prompt_ids("w3 w4", chat=True), 12)]
    for bad in (-0.1, 1.1, float("nan"), True):
        with pytest.raises(DemoError):
            demo.blend("v", "places", "ben", bad, "w3")
    with pytest.raises(DemoError, match="two different"):
        demo.blend("v", "ben", "ben", 0.5, "w3")


def test_many_visitors_at_once_share_batches_and_get_their_own(demo, tiny, tmp_path):
    base = tiny("llama")
    want = {
        name: written(
            merged(base, tmp_path / "adapters" / name),
            prompt_ids(f"w{at + 3}", chat=name != "tone"),
            {"places": 12, "tone": 3}.get(name, 59),
        )
        for at, name in enumerate(NAMES)
    }

    async def one(visitor: int, at: int) -> None:
        name = NAMES[at]
        async for now in demo.rows(f"visitor {visitor}", [(name, f"w{at + 3}")]):
            found = now
        assert found.answers[0].label == name
        assert found.answers[0].text == want[name].partition(" w63")[0]

    async def everybody() -> None:
        await asyncio.gather(*(one(i, i % 4) for i in range(24)))

    asyncio.run(everybody())
    assert demo.dispatcher.rows == 24
    assert demo.dispatcher.batches < 12
    assert demo.dispatcher.mixed > 0


def test_a_row_beside_a_longer_one_is_itself_where_positions_are_a_table(tiny, tmp_path):
    """GPT-2: a short row goes on being computed past its end, and there is no position past the context."""
    from smallbase import save_base

    model = tiny("gpt2")
    made = small_demo_of(model, save_base(model, tmp_path / "base", chat=True), tmp_path)
    asked = [("w3 " * 40).strip(), "w5"]
    try:
        found = texts(made.rows("v", [("gpt", text) for text in asked]))
        base = merged(tiny("gpt2"), tmp_path / "adapters" / "gpt")
        assert found == [written(base, ids := prompt_ids(text, chat=True), min(64, 64 - len(ids))) for text in asked]
    finally:
        made.close()


def small_demo_of(model: Any, base: Path, root: Path) -> Demo:
    from hf_lora.demo import make_demo
    from hf_lora.values import AdapterValue, Factors

    generator = torch.Generator().manual_seed(0)
    factors = {
        path: Factors(
            "linear", torch.randn(2, 32, generator=generator), torch.randn(96, 2, generator=generator), alpha=2.0
        )
        for path, _ in model.named_modules()
        if path.endswith("c_attn")
    }
    config = LoRAConfig(r=2, alpha=2.0, target_modules=["c_attn"], base_model="org/tiny")
    write_adapter(AdapterValue(config, factors), root / "adapters" / "gpt")
    return make_demo(str(base), root / "adapters", base_id="org/tiny")


def test_a_short_answer_does_not_wait_for_a_longer_neighbour(demo, monkeypatch):
    """It is over when its own last row is."""
    forward, go = demo.engine.model.forward, threading.Event()
    steps: list[int] = []

    def step(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) > 6:
            assert go.wait(20)
        return forward(*args, **kwargs)

    monkeypatch.setattr(demo.engine.model, "forward", step)

    async def both() -> None:
        long = asyncio.ensure_future(_last(demo.rows("a", [("ben", "w3")])))
        short = await _last(demo.rows("b", [("tone", "w3")]))
        assert (short.state, short.batch_rows, long.done()) == ("done", 2, False)
        go.set()
        assert (await long).state == "done"

    asyncio.run(both())


def test_an_answer_ends_before_its_stop(demo):
    text = texts(demo.rows("v", [("tone", "w3")]))[0]
    assert "w63" not in text
    task = demo.library.get("v", "ben").task
    assert task is FREE
    whole = texts(demo.rows("v", [("ben", "w3")]))[0].split()
    ending = next(word for word in whole[2:] if word not in whole[:2])
    object.__setattr__(
        demo.library.shipped["ben"],
        "task",
        Task(title="t", fields=FREE.fields, prompt="{prompt}", chat=True, stop=(ending,)),
    )
    assert texts(demo.rows("v", [("ben", "w3")]))[0].split() == whole[: whole.index(ending)]


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "Name is empty"),
        ({"name": "   "}, "Name is empty"),
        ({"name": "w3", "drink": "w4"}, "no field 'drink'"),
        ({"name": "w3", "food": "w99"}, "none of w10, w11"),
        ({"name": "w3 " * 2000}, "6,000 characters|5,999 characters"),
        ({"name": "w3 " * 60}, "tokens; at most"),
        ({"name": ["w3"]}, "a text is needed"),
        ({"name": True}, "a text is needed"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_wrong_form_is_refused_before_anything_waits(demo, values, words):
    with pytest.raises(DemoError, match=words):
        demo.ask("v", "places", values)
    assert demo.dispatcher.batches == 0


def test_wrong_rows(demo):
    for rows, words in (
        ([], "at least one"),
        ([("places", "w3"), ("ben", "")], "Row 2: The prompt is empty"),
        ([("nobody", "w3")], "no adapter 'nobody'"),
    ):
        with pytest.raises(DemoError, match=words):
            demo.rows("v", rows)
    with pytest.raises(DemoError, match="at most 32 rows"):
        demo.rows("v", [("ben", "w3" * 100_000)] * 33)  # before any of them is looked at
    for name in ({}, ["ben"], 3):
        with pytest.raises(DemoError, match="no adapter"):
            demo.rows("v", [(name, "w3")])
    for value in (10**5000, "\ud800", float("inf")):
        with pytest.raises(DemoError):
            demo.ask("v", "places", {"name": value})


def test_an_adapter_that_breaks_fails_for_those_who_asked_for_it(demo, tmp_path):
    weights = tmp_path / "adapters" / "ben" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    found = last(demo.rows("v", [("ben", "w3"), ("dora", "w3"), (None, "w3")]))
    assert found.state == "done"
    assert [bool(answer.error) for answer in found.answers] == [True, False, False]
    assert all(answer.text for answer in found.answers[1:])
    assert str(tmp_path) not in str(found.answers[0].error)
    alone = last(demo.ask("v", "ben", {"prompt": "w3"}, beside=False))
    assert (alone.state, bool(alone.answers[0].error)) == ("failed", True)


# ---- many visitors ---------------------------------------------------------------------------------------------------


class Held:
    """A dispatcher whose batches go token by token, when the test says so."""

    def __init__(self, **settings: Any) -> None:
        self.batches: list[list[Row]] = []
        self.go = threading.Semaphore(0)
        self.fail: Callable[[Sequence[Row]], bool] = lambda rows: False
        settings = {"gather": 0, **settings}
        self.dispatcher = Dispatcher(None, Settings(**settings), self.stream)  # type: ignore[arg-type]

    def stream(self, rows: Sequence[Row], ended: Any) -> Iterator[Any]:
        self.batches.append(list(rows))
        yield BatchFacts(len(rows), 1, 0.0, 0.0)
        for token in range(3):
            assert self.go.acquire(timeout=20)
            if self.fail(rows):
                raise ZeroDivisionError("/secret/path")
            for i in range(len(rows)):
                if not ended(i):
                    yield i, token

    def submit(self, visitor: str, rows: int = 1, which: Any = None) -> Ticket:
        return self.dispatcher.submit(visitor, [Row((1,), which, 3) for _ in range(rows)])

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, "it never came"
            time.sleep(0.002)

    def run_all(self, *tickets: Ticket) -> None:
        self.go.release(1000)
        self.until(lambda: all(ticket.over for ticket in tickets))


@pytest.fixture
def held() -> Iterator[Callable[..., Held]]:
    made: list[Held] = []

    def make(**settings: Any) -> Held:
        made.append(Held(**settings))
        return made[-1]

    yield make
    for each in made:
        each.go.release(1000)
        each.dispatcher.close()


def test_visitors_take_turns(held):
    here = held(batch_rows=4, device_slots=4)
    first = here.submit("greedy")
    here.until(lambda: first.state == "running")
    many = [here.submit("greedy") for _ in range(8)]
    few = [here.submit("modest"), here.submit("shy")]
    assert here.dispatcher.ahead(few[0]) == 9
    here.go.release(3)
    here.until(lambda: len(here.batches) == 2)
    here.until(lambda: all(ticket.state == "running" for ticket in (*few, *many[:2])))
    assert [ticket.state for ticket in many[2:]] == ["waiting"] * 6
    here.run_all(*many, *few)
    assert {ticket.state for ticket in (*many, *few)} == {"done"}
    assert first.tokens == [[0, 1, 2]]


def test_one_mixture_a_batch_and_an_action_is_never_split(held):
    here = held(batch_rows=4, device_slots=4)
    first = here.submit("a")
    here.until(lambda: first.state == "running")
    tickets = [
        here.submit("b", 3),
        here.submit("c", 2),
        here.submit("d", 1, (("x", 0.5), ("y", 0.5))),
        here.submit("e", 1, (("x", 0.5), ("y", 0.5))),
    ]
    here.run_all(*tickets)
    assert [len(batch) for batch in here.batches] == [1, 3, 2, 2]
    assert all(len({isinstance(row.which, tuple) for row in batch}) == 1 for batch in here.batches)


def test_limits_are_said(held):
    here = held(batch_rows=2, device_slots=2, queue=3, per_visitor=2)
    first = here.submit("a")
    here.until(lambda: first.state == "running")
    here.submit("a")
    with pytest.raises(DemoError, match="You have 2 requests"):
        here.submit("a")
    here.submit("b")
    here.submit("b")
    with pytest.raises(DemoError, match="Too many people"):
        here.submit("c")
    with pytest.raises(DemoError, match="at most 2 rows"):
        here.submit("d", 3)
    here.go.release(1000)
    here.until(lambda: not here.dispatcher._waiting and not here.dispatcher._running)
    here.submit("a")


def test_a_stop_is_of_one_action(held):
    here = held(batch_rows=4, device_slots=4)
    first = here.submit("a")
    here.until(lambda: first.state == "running")
    mine, other, waiting = here.submit("a"), here.submit("b"), here.submit("c", 4)
    here.go.release(3)
    here.until(lambda: mine.state == other.state == "running")
    here.go.release(1)
    here.until(lambda: len(mine.tokens[0]) == len(other.tokens[0]) == 1)
    here.dispatcher.cancel(mine)
    here.dispatcher.cancel(waiting)
    here.run_all(other)
    assert (mine.state, other.state, waiting.state) == ("cancelled", "done", "cancelled")
    assert (mine.tokens, other.tokens) == ([[0]], [[0, 1, 2]])
    assert len(here.batches) == 2  # what was stopped while it waited never ran


def test_a_visitor_who_leaves_stops_all_of_theirs(held):
    here = held(batch_rows=1, device_slots=1)
    running, waiting, other = here.submit("a"), here.submit("a"), here.submit("b")
    here.until(lambda: running.state == "running")
    here.dispatcher.cancel_all("a")
    here.run_all(other)
    assert (running.state, waiting.state, other.state) == ("cancelled", "cancelled", "done")


def test_time_is_over_for_one_action(held):
    here = held(batch_rows=2, device_slots=2, timeout=0.3)
    late = here.submit("a")
    here.until(lambda: late.state == "running")
    too_late = here.submit("b")
    here.go.release(1)
    here.until(lambda: len(late.tokens[0]) == 1)
    time.sleep(0.35)
    here.run_all(late, too_late)
    assert (late.state, too_late.state) == ("late", "late")
    assert late.tokens == [[0]]
    assert len(here.batches) == 1


def test_time_is_over_while_another_batch_is_stuck(held, demo):
    here = held(batch_rows=1, device_slots=1, timeout=0.3)
    stuck, waiting = here.submit("a"), here.submit("b")
    here.until(lambda: stuck.state == "running")
    time.sleep(0.35)
    for ticket in (stuck, waiting):
        here.dispatcher.expire(ticket)
        assert ticket.state == "late"


def test_a_batch_that_breaks_breaks_for_one_action(held):
    here = held(batch_rows=4, device_slots=4)
    first = here.submit("a")
    here.until(lambda: first.state == "running")
    here.fail = lambda rows: any(row.which == "poison" for row in rows)
    good, bad = here.submit("b"), here.submit("c", 1, "poison")
    here.run_all(good, bad)
    assert (good.state, bad.state) == ("done", "failed")
    assert good.tokens == [[0, 1, 2]]
    assert "secret" not in said(bad.errors[0])  # type: ignore[arg-type]
    here.run_all(again := here.submit("d"))
    assert again.state == "done"


def test_what_runs_again_alone_can_be_stopped(held):
    here = held(batch_rows=4, device_slots=4)
    first = here.submit("a")
    here.until(lambda: first.state == "running")
    here.fail = lambda rows: len(rows) > 1
    one, two, three = (here.submit(visitor) for visitor in "bcd")
    here.go.release(4)
    here.until(lambda: len(here.batches) == 3)  # first; the three, which break; one of them alone
    here.dispatcher.cancel_all("d")
    here.run_all(one, two)
    assert [ticket.state for ticket in (one, two, three)] == ["done", "done", "cancelled"]
    assert len(here.batches) == 4


def test_a_stop_is_of_one_place(held):
    here = held()
    ticket, other = (here.dispatcher.submit("a", [Row((1,), None, 3)], place) for place in ("ask", "blend"))
    here.dispatcher.cancel_all("a", "blend")
    here.run_all(ticket)
    assert (ticket.state, other.state) == ("done", "cancelled")


def test_closing_ends_what_runs(held):
    here = held()
    ticket = here.submit("a")
    here.until(lambda: ticket.state == "running")
    here.go.release(1000)
    here.dispatcher.close()
    with pytest.raises(DemoError, match="shutting down"):
        here.submit("a")


def test_a_page_that_closes_stops_its_action(demo):
    async def leave() -> None:
        progress = demo.rows("v", [("ben", "w3")])
        await anext(progress)
        await progress.aclose()

    asyncio.run(leave())
    end = time.monotonic() + 20
    while demo.dispatcher._running or demo.dispatcher._waiting:
        assert time.monotonic() < end
        time.sleep(0.005)


# ---- adapters --------------------------------------------------------------------------------------------------------


def hub_adapter(hub: Any, repo_id: str, model: Any, folder: Path, *, base: str = "org/tiny", rank: int = 2) -> Any:
    value = random_value(model, 7, rank=rank, targets=QV, scale=0.6, base_model=base)
    write_adapter(value, folder)
    return hub.commit(repo_id, {path.name: path.read_bytes() for path in folder.iterdir()})


def test_a_visitor_loads_an_adapter_for_themselves(demo, hub, tiny, tmp_path):
    model = tiny("llama")
    commit = hub_adapter(hub, "me/fresh", model, tmp_path / "fresh")
    adapter = demo.library.load("v", " me/fresh ")
    assert (adapter.name, adapter.commit, adapter.rank, adapter.task) == ("me/fresh", commit.oid, 2, FREE)
    want = written(merged(model, tmp_path / "fresh"), prompt_ids("w3 w4", chat=True), 20)
    assert texts(demo.rows("v", [("me/fresh", "w3 w4")]))[0].startswith(want)
    with pytest.raises(DemoError, match="no adapter 'me/fresh'"):
        demo.rows("another", [("me/fresh", "w3 w4")])
    with pytest.raises(DemoError, match="is not loaded"):
        demo.library.remove("another", "me/fresh")
    with pytest.raises(DemoError, match="comes with this demo"):
        demo.library.remove("v", "ben")
    demo.library.load("another", "me/fresh")
    demo.library.remove("v", "me/fresh")
    assert demo.library.places.keys() == {*NAMES, adapter.key}  # the other visitor has it still
    demo.library.leave("another")
    assert demo.library.places.keys() == set(NAMES)
    assert not any(request.authorized for request in hub.requests)  # never with the demo owner's token
    assert list(demo.library.cache.glob("models--*")) == []  # and its files are gone


def test_what_the_owner_may_see_is_not_for_visitors(demo, hub, tiny, tmp_path):
    """Not even if it lies in the owner's cache."""
    hub_adapter(hub, "me/secret", tiny("llama"), tmp_path / "a")
    hub.repo("me/secret").private = True
    assert (hub_files.fetch("me/secret") / "adapter_config.json").is_file()
    for name in ("me/secret",):
        with pytest.raises(LoRAError) as caught:
            demo.library.load("stranger", name)
        assert said(caught.value, name) == "There is no public repo me/secret on the Hub."
    hub.repo("me/secret").private, hub.repo("me/secret").gated = False, "manual"
    with pytest.raises(DemoError, match="gated"):
        demo.library.load("stranger", "me/secret")


def test_everything_is_of_the_commit_whose_sizes_were_looked_at(demo, hub, tiny, tmp_path):
    commit = hub_adapter(hub, "me/fresh", tiny("llama"), tmp_path / "a")
    demo.library.load("v", "me/fresh")
    asked = [request.path for request in hub.asked("GET|HEAD") if "/resolve/" in request.path] or [
        request.path for request in hub.requests if "/resolve/" in request.path
    ]
    assert asked
    assert all(f"/resolve/{commit.oid}/" in path for path in asked)
    hub.commit("me/large", {"adapter_config.json": b" " * 3_000_000, "adapter_model.safetensors": b"x"})
    hub.requests.clear()
    with pytest.raises(DemoError, match=r"adapter_config\.json of me/large has 3 MB"):
        demo.library.load("v", "me/large")
    assert hub.fetched("me/large") == []


def test_who_leaves_while_loading_leaves_nothing(demo, hub, tiny, tmp_path, monkeypatch):
    hub_adapter(hub, "me/fresh", tiny("llama"), tmp_path / "a")
    begun, go, failures = threading.Event(), threading.Event(), []
    plain = hub_files.fetch

    def slow_fetch(*args: Any, **options: Any) -> Path:
        begun.set()
        assert go.wait(20)
        return plain(*args, **options)

    def load() -> None:
        try:
            demo.library.load("v", "me/fresh")
        except DemoError as error:
            failures.append(error.message)

    monkeypatch.setattr("hf_lora.demo.library.hub.fetch", slow_fetch)
    thread = threading.Thread(target=load)
    thread.start()
    assert begun.wait(20)
    with pytest.raises(DemoError, match="loading an adapter already"):
        demo.library.load("v", "me/fresh")
    demo.library.leave("v")
    go.set()
    thread.join(20)
    assert failures == ["The page was closed meanwhile."]
    assert (demo.library.places.keys(), dict(demo.library._visitors)) == (set(NAMES), {})
    assert list(demo.library.cache.glob("models--*")) == []


def test_of_too_many_visitors_the_first_loses_theirs(tiny, hub, tmp_path):
    hub_adapter(hub, "me/fresh", tiny("llama"), tmp_path / "a")
    made = small_demo(tiny("llama"), tmp_path / "demo", visitors=2)
    try:
        for visitor in ("a", "b", "c"):
            made.library.load(visitor, "me/fresh")
        assert ["me/fresh" in made.library.of(visitor) for visitor in "abc"] == [False, True, True]
    finally:
        made.close()


def test_a_removed_adapter_frees_its_slot(demo, hub, tiny, tmp_path):
    hub_adapter(hub, "me/fresh", tiny("llama"), tmp_path / "a")
    adapter = demo.library.load("v", "me/fresh")
    assert texts(demo.rows("v", [("me/fresh", "w3")]))
    assert adapter.key in demo.engine.pool.resident
    demo.library.remove("v", "me/fresh")
    assert adapter.key not in demo.engine.pool.resident + demo.engine.pool.cached


def test_what_is_not_loaded_from_the_hub(demo, hub, tiny, tmp_path, monkeypatch):
    model = tiny("llama")
    hub_adapter(hub, "me/other-base", model, tmp_path / "a", base="org/another")
    hub_adapter(hub, "me/wide", model, tmp_path / "b", rank=6)
    hub_adapter(hub, "me/private", model, tmp_path / "c")
    hub.repo("me/private").private = True
    hub_adapter(hub, "me/pickle", model, tmp_path / "d")
    hub.commit("me/pickle", {"adapter_model.bin": b"pickle"}, delete=("adapter_model.safetensors",))
    hub_adapter(hub, "me/broken", model, tmp_path / "e")
    hub.commit("me/broken", {"adapter_model.safetensors": b"\x00" * 100})
    hub_adapter(hub, "me/large", model, tmp_path / "f")
    folder_of_adapters(model, tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    limited = small_demo(
        tiny("llama"), tmp_path / "limited", adapter_rank=5, adapter_bytes=2_000, adapters_per_visitor=1
    )
    try:
        for made, name, words in (
            (demo, "me/other-base", "another base"),
            (demo, "me/private", "no public repo me/private"),
            (demo, "me/none", "no public repo me/none"),
            (demo, "me/pickle", "no LoRA as safetensors"),
            (demo, "me/broken", "not JSON"),
            (demo, "here/ben", "no public repo here/ben"),  # a folder of this machine is no repo
            (demo, "../adapters/ben", "not the id of a repo"),
            (demo, "/etc/passwd", "not the id of a repo"),
            (demo, "ben", "not the id of a repo"),
            (demo, "", "not the id of a repo"),
            (demo, "https://huggingface.co/me/fresh", "not the id of a repo"),
            (limited, "me/wide", "rank 6"),
        ):
            with pytest.raises(LoRAError) as caught:
                made.library.load("v", name)
            shown = said(caught.value, name)
            assert words in shown, (name, shown)
            assert str(tmp_path) not in shown
            assert hub.token not in shown
            assert made.library.of("v").keys() == set(NAMES)
        large = random_value(model, 1, rank=5, targets=(*QV, *MLP), base_model="org/tiny")
        write_adapter(large, tmp_path / "g")
        hub.commit("me/large", {path.name: path.read_bytes() for path in (tmp_path / "g").iterdir()})
        with pytest.raises(LoRAError) as caught:
            limited.library.load("v", "me/large")
        assert "bytes" in said(caught.value)
        hub.commit("me/large", {"adapter_model.safetensors": b"\x00" * 3_000_000})
        hub.requests.clear()
        with pytest.raises(DemoError, match="3 MB; at most 1 MB"):
            limited.library.load("v", "me/large")
        assert hub.fetched("me/large") == []  # refused by what the Hub says of its size
        hub.offline()
        with pytest.raises(LoRAError) as caught:
            demo.library.load("v", "me/none")
        assert "without a connection" in said(caught.value, "me/none")
    finally:
        limited.close()


def test_a_visitor_has_a_few_adapters(demo, hub, tiny, tmp_path):
    for i in range(5):
        hub_adapter(hub, f"me/a{i}", tiny("llama"), tmp_path / f"a{i}")
    for i in range(4):
        demo.library.load("v", f"me/a{i}")
    with pytest.raises(DemoError, match="Remove one"):
        demo.library.load("v", "me/a4")
    demo.library.load("v", "me/a0")  # again is no other
    demo.library.remove("v", "me/a0")
    demo.library.load("v", "me/a4")


def test_shipped_adapters_are_looked_at_before_anybody_comes(tiny, tmp_path):
    model = tiny("llama")
    for name, change, error in (
        ("empty", lambda folder: [path.unlink() for path in folder.glob("*/adapter_config.json")], DemoError),
        ("broken", lambda folder: (folder / "ben" / "adapter_model.safetensors").write_bytes(b"no"), LoRAFileError),
        ("task", lambda folder: (folder / "ben" / "task.yaml").write_text("title: 3"), DemoError),
        (
            "base",
            lambda folder: write_folder(folder, model, {"ben": random_value(model, base_model="org/b")}),
            LoRAError,
        ),
    ):
        root = tmp_path / name
        root.mkdir()
        folder_of_adapters(model, root / "adapters")
        change(root / "adapters")
        from smallbase import save_base

        from hf_lora.demo.launch import make_demo

        base = save_base(model, root / "base", chat=True)
        with pytest.raises(error):
            make_demo(str(base), root / "adapters", base_id="org/tiny")


def test_a_form_that_cannot_be_sent_shows_at_the_start(tiny, tmp_path):
    small_demo(tiny("llama"), tmp_path).close()
    task = tmp_path / "adapters" / "tone" / "task.yaml"
    task.write_text(task.read_text().replace("w3 w4 w5", "w3 " * 100))
    from hf_lora.demo import make_demo

    with pytest.raises(DemoError, match="tone: an example of its task cannot be asked"):
        make_demo(str(tmp_path / "base"), tmp_path / "adapters", base_id="org/tiny")


def test_a_shipped_card_without_html_and_pictures():
    card = "# T\n<!-- hidden\n-->\n<form>x</form> ![alt](http://t/x.png) ![b][c] a < b\n```html\n<b>\n```\n<i>end"
    assert plain(card) == "# T\n\n&lt;form>x&lt;/form> alt b a &lt; b\n```html\n<b>\n```\n&lt;i>end"


def test_messages_hold_no_paths_addresses_or_tokens():
    token = "hf_" + "a" * 34
    shown = clean(
        f"in /home/me/.cache/hub/x.json and C:\\Users\\me\\y and http://10.0.0.1:80/z with {token}, see user/name"
    )
    assert shown == "in … and … and … with hf_…, see user/name"
    assert clean("'/tmp/my dir/secret.txt' is odd; error:/home/me/x and \\\\host\\share") == "… is odd; error:… and …"
    assert "https://huggingface.co/me" in clean("see https://huggingface.co/me")
    assert said(RuntimeError("/secret")).startswith("Something went wrong")
    assert "/secret" not in said(LoRAMismatchError("bad", facts=["/secret/file is odd"]))
    assert len(clean("x" * 10_000)) < 500


# ---- where it computes -----------------------------------------------------------------------------------------------


def test_on_zero_gpu_a_batch_is_one_call(tiny, tmp_path):
    """With the real `spaces`, which without its GPUs calls the function as it is."""
    pytest.importorskip("spaces", reason="spaces is not installed: install hf_lora[test]")
    from hf_lora.demo import launch

    demo = small_demo(tiny("llama"), tmp_path)
    try:
        stream = launch._on_zero_gpu(demo.engine)
        rows = [Row((3, 4), "ben", 5), Row((5,), None, 5)]
        plain = [event for event in demo.engine.stream(rows) if not isinstance(event, BatchFacts)]
        assert [event for event in stream(rows, None) if not isinstance(event, BatchFacts)] == plain
    finally:
        demo.close()


def test_another_process_has_its_own_pool(demo, monkeypatch):
    """Threads do not live on in a fork."""
    mine = demo.engine.pool
    monkeypatch.setattr("hf_lora.demo.engine.os.getpid", lambda: -1)
    other = demo.engine.pool
    assert other is not mine
    assert demo.engine.pool is other
    other.close()
    monkeypatch.undo()
    demo.engine._pool = None
    mine.close()


# ---- what the page shows of an adapter -------------------------------------------------------------------------------


def test_the_card_is_without_its_front_matter(demo):
    assert demo.library.get("v", "places").card().startswith("# The card of places")
    assert demo.library.get("v", "ben").card() == ""


def test_shipped_adapter_sizes(demo, tmp_path):
    for name in NAMES:
        value = read_adapter(tmp_path / "adapters" / name)
        found = demo.library.get("v", name)
        assert (found.nbytes, found.rank) == (value.nbytes, 1 + NAMES.index(name))
        assert demo.library.info(found) is demo.library.info(found)
