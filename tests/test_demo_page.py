"""The page in a real browser, and its API through gradio_client. One server for all, new visitors for each test."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from demos import NAMES, served, small_demo
from oracles import build, merged
from pools import QV, merged_base, random_value
from test_demo import prompt_ids, written

from hf_lora.demo import Demo
from hf_lora.store import write_adapter

CHROMIUM = shutil.which("chromium")
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> **w3** {w3} w4"

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    return small_demo(build("llama"), tmp_path_factory.mktemp("demo"), timeout=60.0, prompt_chars=300)


@pytest.fixture(scope="module")
def url(demo) -> Iterator[str]:
    with served(demo) as found:
        yield found


@pytest.fixture(scope="module")
def folder(demo) -> Path:
    return demo.library.shipped["ben"].folder.parent


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium: install it with `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield made
        made.close()


class Visitor:
    """A page in a browser of its own."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on(
            "request", lambda r: self.problems.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None
        )
        self.page.goto(url)
        self.page.wait_for_selector("#ask-run")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def said(self, place: str, kind: str = "good") -> str:
        """What the status line says, once it is of this kind."""
        found = self.page.wait_for_selector(f"#{place}-state .note.{kind}")
        return str(found.inner_text())

    def value(self, place: str) -> str:
        return str(self.page.locator(f"#{place} textarea, #{place} input").first.input_value())

    def fill(self, place: str, text: str) -> None:
        self.page.locator(f"#{place} textarea, #{place} input").first.fill(text)

    def choose(self, place: str, option: str) -> None:
        self.page.locator(f"#{place} input").click()
        self.page.get_by_role("option", name=option, exact=True).click()


@pytest.fixture
def visit(browser, url) -> Iterator[Callable[..., Visitor]]:
    made: list[Visitor] = []

    def open_page(**options: Any) -> Visitor:
        made.append(Visitor(browser, url, **options))
        return made[-1]

    yield open_page
    for visitor in made:
        visitor.context.close()
        assert visitor.problems == []  # no error on the page, and nothing fetched from elsewhere


def alone(folder: Path, name: str | None, text: str, count: int) -> str:
    """By hand in float64."""
    base = build("llama")
    model = merged_base(base) if name is None else merged(base, folder / name)
    return written(model, prompt_ids(text, chat=name != "tone"), count)


# ---- in the browser --------------------------------------------------------------------------------------------------


def test_ask_a_task_by_its_form(visit, folder):
    me = visit()
    page = me.page
    assert "Describe a place" in page.locator("#ask-task").inner_text()
    page.get_by_role("button", name="w9 · w30").click()  # an example
    page.wait_for_function(
        "document.querySelector('#ask-places-near_by textarea, #ask-places-near_by input').value == 'w30'"
    )
    page.get_by_role("button", name="Ask both").click()
    me.said("ask")
    text = "name w9 w5 w20 w30 w6"
    assert me.value("ask-adapter") == alone(folder, "places", text, 12)
    assert me.value("ask-base") == alone(folder, None, text, 12)
    facts = page.locator("#ask-facts").inner_text()
    assert re.search(r"SWITCH\s+(<\s)?\d+\.\d+ ms", facts, re.IGNORECASE)
    assert "2 rows" in facts
    assert "kB" in facts
    page.get_by_role("button", name="How good is it?").click()
    assert "30.6" in page.locator("#ask-score").inner_text()


def test_another_task_shows_another_form_and_keys_are_enough(visit, folder):
    me = visit()
    page = me.page
    page.get_by_role("radio", name="Describe a place").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.wait_for_selector("#ask-tone-sentence textarea", state="visible")
    assert page.locator("#ask-places-name").is_hidden()
    page.locator("#ask-tone-sentence textarea").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("w9 w10")
    page.get_by_role("button", name="Ask both").focus()
    page.keyboard.press("Enter")
    me.said("ask")
    assert me.value("ask-adapter") == alone(folder, "tone", "w9 w10", 3).partition("w63")[0].strip()


def test_every_control_has_a_name(visit):
    me = visit()
    for name in ("Ask", "Blend", "One batch", "Adapters"):
        me.tab(name)
        nameless = me.page.evaluate(
            """() => [...document.querySelectorAll('input, textarea, button, select')]
                .filter(e => e.offsetParent !== null)
                .filter(e => !(e.labels && e.labels.length && [...e.labels].some(l => l.innerText.trim()))
                    && !(e.getAttribute('aria-label') || e.getAttribute('title') || e.innerText || '').trim())
                .map(e => e.outerHTML.slice(0, 160))"""
        )
        assert nameless == [], name
    assert me.page.locator("[role=status][aria-live=polite]").count() > 0


def test_a_wrong_form_is_said_and_nothing_else(visit):
    me = visit()
    me.fill("ask-places-name", "")
    me.page.get_by_role("button", name="Ask both").click()
    assert me.said("ask", "bad") == "Name is empty."
    me.fill("ask-places-name", "w3 " * 5000)
    me.page.get_by_role("button", name="Ask both").click()
    me.page.get_by_text("at most 300 are taken here").wait_for()
    assert me.value("ask-adapter") == ""


def test_what_a_visitor_types_is_text(visit, demo):
    me = visit()
    page, title = me.page, me.page.title()
    me.fill("ask-places-name", HOSTILE)
    page.get_by_role("button", name="Ask both").click()
    me.said("ask")
    me.tab("Adapters")
    me.fill("adapters-repo", HOSTILE)
    page.get_by_role("button", name="Load", exact=True).click()
    assert "<img src=x" in me.said("adapters", "bad")
    page.wait_for_timeout(300)
    assert page.title() == title
    assert page.locator("img[src=x]").count() == 0


def test_the_card_of_a_shipped_adapter(visit):
    me = visit()
    me.tab("Adapters")
    me.page.get_by_role("button", name="Card").click()
    me.page.get_by_role("heading", name="The card of places").wait_for()
    me.page.wait_for_selector("#adapters-spectrum img")
    assert "Healthy" in me.page.locator("#adapters-health").inner_text()
    assert "q: " in str(me.page.locator("#adapters-spectrum img").get_attribute("alt"))
    assert "scaling 2" in me.page.locator("#adapters-facts").inner_text()


def test_blend_by_the_slider(visit, folder):
    me = visit()
    me.tab("Blend")
    me.fill("blend-prompt", "w3 w4")
    slider = me.page.locator("#blend-share input[type=range]")
    slider.focus()
    for _ in range(10):  # 50 to 100 in steps of 5
        me.page.keyboard.press("ArrowRight")
    me.page.get_by_role("button", name="Blend", exact=True).click()
    me.page.wait_for_function(
        "want => document.querySelector('#blend-answer textarea').value == want",
        arg=alone(folder, "places", "w3 w4", 12),
    )
    assert "100% places" in me.page.locator("#blend-answer").inner_text()


def test_one_batch_with_another_adapter_in_each_row(visit, folder):
    me = visit()
    me.tab("One batch")
    for i in range(1, 6):
        me.fill(f"batch-prompt-{i}", f"w{i + 2} w9")
    me.page.get_by_role("button", name="Run as one batch").click()
    me.said("batch")
    for i, name in enumerate(["places", "tone", "ben", "dora", None], 1):
        assert (name or "base") in me.page.locator(f"#batch-answer-{i}").inner_text()
        want = alone(folder, name, f"w{i + 2} w9", {"places": 12, "tone": 3}.get(name or "", 58))
        assert me.value(f"batch-answer-{i}") == (want.partition("w63")[0].strip() if name == "tone" else want)
    facts = me.page.locator("#batch-facts").inner_text()
    assert "5 rows" in facts
    assert "4 adapters in one batch" in facts


def test_two_browsers_with_different_tasks(visit, folder, demo):
    one, other = visit(), visit()
    other.page.get_by_role("radio", name="ben").check()
    other.page.wait_for_selector("#ask-free-prompt textarea", state="visible")
    for turn in range(3):
        one.fill("ask-places-name", f"w{10 + turn}")
        other.fill("ask-free-prompt", f"w{20 + turn}")
        one.page.get_by_role("button", name="Ask both").click()
        other.page.get_by_role("button", name="Ask both").click()
        want = alone(folder, "places", f"name w{10 + turn} w5 food w10 w6", 12)
        one.page.wait_for_function("want => document.querySelector('#ask-adapter textarea').value == want", arg=want)
        want = alone(folder, "ben", f"w{20 + turn}", 59)
        other.page.wait_for_function("want => document.querySelector('#ask-adapter textarea').value == want", arg=want)


def test_load_from_the_hub_use_and_remove(visit, hub, folder, tmp_path):
    for name, base in (("me/fresh", "org/tiny"), ("me/other", "org/another")):
        write_adapter(random_value(build("llama"), 7, targets=QV, scale=0.6, base_model=base), tmp_path / name)
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        hub.commit(name, {**files, "README.md": f"# A stranger's card\n{HOSTILE}"})
    me, stranger = visit(), visit()
    me.tab("Adapters")
    for name, words in (
        ("me/none", "There is no public repo me/none on the Hub."),
        ("me/other", "another base"),
        ("../../etc", "not the id of a repo"),
    ):
        me.fill("adapters-repo", name)
        me.page.get_by_role("button", name="Load", exact=True).click()
        me.page.get_by_text(words).wait_for()
    me.fill("adapters-repo", "me/fresh")
    me.page.keyboard.press("Enter")
    assert "me/fresh is loaded" in me.said("adapters")
    me.page.get_by_role("button", name="Card").click()
    me.page.wait_for_selector("#adapters-text textarea", state="visible")
    assert me.value("adapters-text") == f"# A stranger's card\n{HOSTILE}"
    assert me.page.locator("img[src=x]").count() == 0
    me.tab("Ask")
    assert "me/fresh" in me.page.locator("#ask-task").inner_text()
    me.fill("ask-free-prompt", "w3 w4")
    me.page.get_by_role("button", name="Ask both").click()
    want = alone(tmp_path, "me/fresh", "w3 w4", 58)
    me.page.wait_for_function("want => document.querySelector('#ask-adapter textarea').value == want", arg=want)
    assert "me/fresh" not in stranger.page.locator("#ask-task").inner_text()
    me.tab("Blend")
    me.choose("blend-first", "me/fresh")
    me.tab("Adapters")
    me.page.get_by_role("button", name="Remove").click()
    me.page.get_by_text("me/fresh is removed.").wait_for()
    me.tab("Blend")
    assert me.value("blend-first") == "Describe a place"  # what is gone is chosen nowhere
    me.tab("Adapters")
    me.page.get_by_role("button", name="Remove").click()
    me.page.get_by_text("comes with this demo").wait_for()
    me.tab("Ask")
    assert "me/fresh" not in me.page.locator("#ask-task").inner_text()


def slow(demo: Demo, patch: pytest.MonkeyPatch) -> threading.Event:
    """Every token of the model waits, until the event is set."""
    go = threading.Event()
    forward = demo.engine.model.forward

    def wait(*args: Any, **kwargs: Any) -> Any:
        go.wait(0.15)
        return forward(*args, **kwargs)

    patch.setattr(demo.engine.model, "forward", wait)
    return go


def test_stop_and_the_answer_streams(visit, demo, monkeypatch):
    me = visit()
    go = slow(demo, monkeypatch)
    me.page.get_by_role("button", name="Ask both").click()
    me.page.wait_for_function("document.querySelector('#ask-adapter textarea').value.split(' ').length >= 2")
    me.page.get_by_role("button", name="Stop").first.click()
    me.page.get_by_text("Stopped.").wait_for()
    written_so_far = me.value("ask-adapter")
    assert 2 <= len(written_so_far.split()) < 12
    go.set()
    me.page.get_by_role("button", name="Ask both").click()
    me.said("ask")
    assert me.value("ask-adapter").startswith(written_so_far)


def test_reload_leaves_nothing_running_and_nothing_of_the_old_page(visit, demo, monkeypatch, hub, tmp_path):
    write_adapter(random_value(build("llama"), 7, targets=QV, base_model="org/tiny"), tmp_path / "a")
    hub.commit("me/gone", {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()})
    me = visit()
    me.tab("Adapters")
    me.fill("adapters-repo", "me/gone")
    me.page.keyboard.press("Enter")
    me.said("adapters")
    me.tab("Ask")
    me.page.get_by_role("radio", name="Describe a place").check()
    go = slow(demo, monkeypatch)
    me.page.get_by_role("button", name="Ask both").click()
    me.page.get_by_text("Writing…").wait_for()
    me.page.reload()
    me.page.wait_for_selector("#ask-run")
    end = time.monotonic() + 20
    while demo.dispatcher._running or demo.dispatcher._waiting or demo.library._visitors:
        assert time.monotonic() < end, "the old page's action or adapters are still there"
        time.sleep(0.05)
    go.set()
    assert "me/gone" not in me.page.locator("#ask-task").inner_text()
    assert me.value("ask-adapter") == ""
    me.page.get_by_role("button", name="Ask both").click()
    me.said("ask")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(visit, scheme):
    """No sideways scrolling, and text that can be told from its ground."""
    me = visit(color_scheme=scheme)
    me.page.set_viewport_size({"width": 390, "height": 844})
    for name in ("Ask", "Blend", "One batch"):
        me.tab(name)
        assert me.page.evaluate("document.documentElement.scrollWidth") <= 390
    me.tab("Ask")
    contrast = me.page.evaluate(
        """() => {
            const rgb = text => text.match(/[\\d.]+/g).map(Number);
            const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
                .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            const ground = element => {
                for (let e = element; e; e = e.parentElement) {
                    const c = rgb(getComputedStyle(e).backgroundColor);
                    if (c.length < 4 || c[3] > 0.5) return c;
                }
                return [255, 255, 255];
            };
            const of = element => {
                const both = [rgb(getComputedStyle(element).color), ground(element)];
                const [a, b] = both.map(light).sort((x, y) => y - x);
                return (a + 0.05) / (b + 0.05);
            };
            return ['#ask-state .note', '#head .tile dd', '#head .tile dt', '#head .tile span', '#head h1', '#ask-run',
                '#ask-adapter textarea'].map(place => [place, of(document.querySelector(place))]);
        }"""
    )
    assert {place: ratio for place, ratio in contrast if ratio < 4.4} == {}  # white on the theme's indigo has 4.47


# ---- through the API -------------------------------------------------------------------------------------------------


@pytest.fixture
def client(url) -> Iterator[Any]:
    from gradio_client import Client

    made = Client(url, verbose=False)
    yield made
    made.close()


def test_the_named_endpoints(client, folder):
    found = {task["name"]: task for task in client.predict(api_name="/tasks")}
    assert list(found) == ["places", "tone", "ben", "dora"]
    assert [field["name"] for field in found["places"]["fields"]] == ["name", "food", "near_by"]
    asked = client.predict("places", {"name": "w7"}, True, api_name="/ask")
    assert [answer["text"] for answer in asked["answers"]] == [
        alone(folder, name, "name w7 w6", 12) for name in ("places", None)
    ]
    plain = client.predict("places", {"prompt": "w3"}, False, api_name="/ask")
    assert [answer["text"] for answer in plain["answers"]] == [alone(folder, "places", "w3", 12)]
    blend = client.predict("places", "ben", 1.0, "w3", api_name="/blend")
    assert blend["answers"][0]["text"] == plain["answers"][0]["text"]
    rows = client.predict(
        [{"adapter": "places", "fields": {"name": "w7"}}, {"adapter": None, "prompt": "w3"}], api_name="/rows"
    )
    assert rows["answers"][0]["text"] == asked["answers"][0]["text"]
    assert (rows["batch_rows"], rows["answers"][1]["label"]) == (2, "base")
    told = client.predict("tone", api_name="/describe")
    assert (told["ranks"], told["health"], told["card"][:10]) == ([2], [], "# The card")
    assert client.predict(api_name="/stats")["batches"] >= 4
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert sorted(endpoints) == sorted(
        f"/{name}" for name in ("tasks", "ask", "blend", "rows", "load", "remove", "describe", "stop", "stats")
    )


@pytest.mark.parametrize(
    ("arguments", "endpoint", "words"),
    [
        (("nobody", {"name": "w3"}, False), "/ask", "no adapter 'nobody'"),
        (("places", {"nam": "w3"}, False), "/ask", "no field 'nam'"),
        (("places", "w3", False), "/ask", "fields"),
        (("places", "ben", 2, "w3"), "/blend", "between 0 and 1"),
        (([],), "/rows", "at least one row"),
        ((["w3"],), "/rows", "row 1"),
        (([{"adapter": "places", "text": "w3"}],), "/rows", "'text'"),
        (("../x",), "/load", "not the id"),
        (("ben",), "/remove", "comes with this demo"),
        (("nobody",), "/describe", "no adapter"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_mistakes_through_the_api_are_said(client, arguments, endpoint, words):
    with pytest.raises(Exception, match=r"(?i)" + re.escape(words)) as caught:
        client.predict(*arguments, api_name=endpoint)
    assert "Traceback" not in str(caught.value)
    assert "/tmp" not in str(caught.value)


def test_fifty_at_once_over_four_tasks(url, demo, folder):
    """Every answer is that task's alone, by hand; many rows share a batch."""
    from gradio_client import Client

    asked = [(NAMES[i % 4], f"w{3 + i}") for i in range(50)]
    want = {}
    for name, text in asked:
        want[name, text] = alone(folder, name, text, {"places": 12, "tone": 3}.get(name, 59))
    before, rows = demo.dispatcher.batches, demo.dispatcher.rows
    clients = [Client(url, verbose=False) for _ in range(5)]
    with ThreadPoolExecutor(50) as pool:

        def one(i: int) -> Any:
            name, text = asked[i]
            return clients[i % 5].predict(
                name, {"prompt": text} if name != "tone" else {"sentence": text}, False, api_name="/ask"
            )

        found = list(pool.map(one, range(50)))
    for client in clients:
        client.close()
    for (name, text), answer in zip(asked, found, strict=True):
        shown = answer["answers"][0]
        assert (answer["state"], shown["label"]) == ("done", name)
        whole = want[name, text].partition("w63")[0].strip() if name == "tone" else want[name, text]
        assert shown["text"] == whole, name
    assert demo.dispatcher.rows - rows == 50
    assert demo.dispatcher.batches - before < 40
