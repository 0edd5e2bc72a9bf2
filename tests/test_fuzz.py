"""recipes/hostile/fuzz.py: its targets, on a few inputs each; what it can see; and the table of the whole run."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_lora import fields, importers, safefile

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "results" / "hostile.json"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def parts() -> Iterator[Any]:
    """The recipe's modules."""
    sys.path.insert(0, str(ROOT / "recipes" / "hostile"))
    try:
        import hostile_parts
        from hostile_parts import core, engines

        yield hostile_parts, core, engines
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.partition(".")[0] == "hostile_parts"]:
            del sys.modules[name]


def names() -> list[str]:
    return list(json.loads(TABLE.read_text(encoding="utf-8"))["targets"])


@pytest.mark.parametrize("name", names())
def test_a_few_inputs_of_each_target(parts: Any, name: str) -> None:
    if name == "page":
        pytest.importorskip("gradio", reason="gradio is not installed: install hf_lora[demo]")
    package, core, engines = parts
    target = package.targets()[name]()
    try:
        rng, seeds = random.Random(1), target.seeds()
        watch = core.Watch(target)
        for data in seeds[:20]:
            watch.play(data)
        assert watch.tally.outcomes["loaded"]
        for _ in range(target.few):
            watch.play(core.varied(rng, target, seeds))
        watch.tally.add(engines.hypothesis(target, 5, 1))
        assert watch.tally.findings == []
        assert watch.tally.outcomes["refused"]
    finally:
        target.close()


def test_the_table_has_every_target_and_no_finding(parts: Any) -> None:
    found = json.loads(TABLE.read_text(encoding="utf-8"))
    made = parts[0].targets()
    assert set(found["targets"]) == set(made)
    assert {f"import-{n.removeprefix('from_')}" for n in importers.__all__ if n.startswith("from_")} <= set(made)
    for name, row in found["targets"].items():
        outcomes = [row[outcome] for outcome in parts[1].OUTCOMES]
        assert row["inputs"] == sum(outcomes) >= 1_000, name
        assert row["loaded"] > 0, name
        assert row["refused"] > 0, name
        assert outcomes[2:] == [0, 0, 0, 0], name
        assert row["findings"] == [], name
        assert row["slowest_seconds"] <= found["bounds"]["seconds"], name
        assert row["most_memory_bytes"] <= found["bounds"]["bytes"], name
    assert found["total"]["inputs"] == sum(row["inputs"] for row in found["targets"].values()) >= 10**6
    page = TABLE.with_suffix(".md").read_text(encoding="utf-8")
    assert f"**{found['total']['inputs']:,}**" in page


# ---- it can see ------------------------------------------------------------------------------------------------------


def played(parts: Any, name: str, count: int) -> Any:
    package, core, _ = parts
    target = package.targets()[name]()
    try:
        rng, seeds, watch = random.Random(1), target.seeds(), core.Watch(target)
        for _ in range(count):
            watch.play(core.varied(rng, target, seeds))
        return watch.tally.outcomes
    finally:
        target.close()


def test_a_guard_that_is_gone_is_seen_as_a_crash(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safefile, "load_json", lambda data, what: json.loads(data.decode()))
    assert played(parts, "config", 300)["crash"]


def test_a_value_that_is_changed_is_seen_as_silent(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "fraction", lambda name, value: 0.0)
    assert played(parts, "config", 400)["silent"]


def test_a_changed_byte_is_seen_as_silent(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = safefile.read_tensors

    def changed(*given: Any) -> Any:
        tensors, together = read(*given)
        next(iter(tensors.values())).view(-1)[0] += 1e-3
        return tensors, together

    monkeypatch.setattr(safefile, "read_tensors", changed)
    assert played(parts, "adapter", 60)["silent"]


def test_time_is_bounded(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, core, _ = parts
    monkeypatch.setattr(core, "MOST_SECONDS", 0.05)

    class Slow(core.Target):  # type: ignore[misc, name-defined]
        kinds = ("bytes",)
        name = "slow"

        def check(self, data: bytes) -> None:
            while True:
                pass

    import signal

    before = signal.getsignal(signal.SIGALRM)
    core.bound()
    try:
        assert core.Watch(Slow()).play(b"") == "slow"
    finally:
        signal.signal(signal.SIGALRM, before)
