"""recipes/benchmarks/serving.py: it runs, has every row, checks what it times, and ends when something is wrong."""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed: install hf_lora[test]")

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "recipes" / "benchmarks"
PUBLISHED = ROOT / "docs" / "benchmarks"

# section -> the cases of a smoke run -> who is in them
MIXED = {
    *("base", "hf_lora, use_lora", "PEFT, set_adapter", "the same maths by hand"),
    *(f"hf_lora, route of {n}{call}" for n in (1, 2, 4) for call in ("", ", first call")),
    *(f"PEFT, adapter_names of {n}" for n in (1, 2, 4)),
}
GENERATED = {
    *("base", "hf_lora, route_lora", "PEFT, adapter_names", "PEFT, one request after another"),
    *("hf_lora, one for all", "PEFT, one for all"),
}
LOADED = {"reading the file", "hf_lora", "PEFT", "PEFT, low_cpu_mem_usage"}
RESIDENT = {*(f"hf_lora, {n} resident" for n in (1, 4, 8)), *(f"PEFT, {n} resident" for n in (1, 4))}
FIRST = {"base", *(f"hf_lora, {n} resident, first call" for n in (1, 4, 8))}
BOTH = {"hf_lora", "PEFT"}
ROWS: dict[str, dict[str, set[str]]] = {
    "rows": {
        "4 rows, T=1 after 4": MIXED,
        "4 rows, T=1 after 4: 4 distinct against 1": {"hf_lora, route of 1", "hf_lora, route of 4"},
        "4 rows, T=1 after 4: 4 distinct against 1, PEFT": {"PEFT, adapter_names of 1", "PEFT, adapter_names of 4"},
        "4 rows, T=4": MIXED,
        "4 rows, T=4: 4 distinct against 1": {"hf_lora, route of 1", "hf_lora, route of 4"},
        "4 rows, T=4: 4 distinct against 1, PEFT": {"PEFT, adapter_names of 1", "PEFT, adapter_names of 4"},
    },
    "generate": {"4 requests, q and v": GENERATED, "4 requests, all linear layers": GENERATED},
    "load": {
        **{f"load number {n}": LOADED for n in (1, 2, 3)},
        "2 loads one after another, each": BOTH,
    },
    "growth": {
        "switch between the first resident and the last": RESIDENT,
        "load one more": RESIDENT,
        "decode step, 4 rows, all through the last resident": RESIDENT | FIRST,
        "decode step, 4 rows, each through another resident": (RESIDENT | FIRST)
        - {"hf_lora, 1 resident", "hf_lora, 1 resident, first call", "PEFT, 1 resident"},
        **{
            f"decode step, 4 rows, {rows} resident: first call of a route": {
                f"hf_lora, {least} resident, first call",
                "hf_lora, 8 resident, first call",
            }
            for rows, least in (("all through the last", 1), ("each through another", 4))
        },
    },
    "merge": {
        f"{verb}, {dtype}": BOTH
        for dtype in ("float32", "bfloat16")
        for verb in ("merge", "unmerge", "swap", "weights that are not the base's after merge, swap and unmerge")
    },
    "bytes": {
        "each of 4 adapters resident: the rows' model": {"the tensors in the file", *BOTH},
        "each of 5 adapters resident: the rows' model": {"the tensors in the file", "hf_lora"},
        "an open route of 4 rows over 4 adapters: the rows' model": {"the tensors in the file", "hf_lora"},
    },
    "import": {"from transformers import PreTrainedModel; import hf_lora after it": {"transformers", "hf_lora"}},
}
PROFILED = {
    *("base", "the same maths by hand", "PEFT, adapter_names of all"),
    *("hf_lora, route of all", "hf_lora, route of all, first call"),
}


def outcomes(data: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(case, who) for cases in data["sections"].values() for case in cases for who in case["competitors"]]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import serving_parts
    from serving_parts import measure, memory, report, rows, sizes, subjects  # noqa: F401

    return serving_parts


@pytest.mark.slow
def test_a_smoke_run_has_every_row_and_checks_what_it_times(peft: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "serving.py"), "--smoke", "--threads", "1", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "serving.json").read_text(encoding="utf-8"))
    table = (tmp_path / "serving.md").read_text(encoding="utf-8")

    profiled = data["sections"].pop("profile")
    found = {
        key: {case["case"]: {who["who"] for who in case["competitors"]} for case in cases}
        for key, cases in data["sections"].items()
    }
    assert found == ROWS
    assert all({who["who"] for who in case["competitors"]} == PROFILED for case in profiled)
    for case, who in outcomes(data):
        assert who["checked"]["equal"] is True, (case["case"], who["who"])
        assert who["checked"]["difference"] <= who["checked"]["tolerance"], (case["case"], who["who"])
        assert who["min"] <= who["q1"] <= who["median"] <= who["q3"] <= who["max"]
        assert (who["ratio"] is None) == (case["reference"] is None)
    assert table.count("| equal: ") == len(outcomes(data)) + len(PROFILED)
    assert "DIFFERS" not in table
    assert "A smoke run" in table
    assert data["smoke"] is True
    assert data["machine"]["threads"] == 1
    goals = {case["case"] for case, who in outcomes(data) if who["goal"]}
    assert {"4 rows, T=1 after 4", "4 rows, T=4", "load number 3", "swap, bfloat16"} <= goals
    assert (tmp_path / "serving.svg").stat().st_size > 10_000
    assert (tmp_path / "serving.png").stat().st_size > 10_000


def test_the_bytes_are_those_that_a_count_by_hand_gives(parts: Any, peft: Any, tmp_path: Path) -> None:
    """Rank 8 on 7 targets of each of 2 layers, hidden 32, key and value 16, intermediate 48, float32."""
    each = 8 * 4 * 2 * sum((32 + 32, 32 + 16, 32 + 16, 32 + 32, 32 + 48, 32 + 48, 48 + 32)) / 1e6
    with torch.no_grad():
        per, _, _ = parts.memory.measure_bytes(tmp_path, parts.sizes.SMOKE)
    megabytes = {who.name: who.samples[0] for who in per.outcomes}
    assert megabytes["the tensors in the file"] == pytest.approx(each)
    assert megabytes["PEFT"] == pytest.approx(each, rel=0.02)
    assert each * 0.99 <= megabytes["hf_lora"] <= each * 4


@pytest.mark.parametrize("wrong", ["by hand", "PEFT"])
def test_what_computes_something_else_is_not_timed(
    wrong: str, parts: Any, peft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"by hand": "by_hand", "PEFT": "theirs"}[wrong]
    right = getattr(parts.subjects, name)
    monkeypatch.setattr(parts.subjects, name, lambda model, folders, *rest: right(model, folders[::-1], *rest))
    monkeypatch.setattr(parts.measure, "_timed", lambda competitor, clock: pytest.fail(f"{competitor.name} was timed"))
    with torch.no_grad(), pytest.raises(SystemExit, match=r"does not compute what it should"):
        parts.rows.measure_rows(tmp_path, parts.sizes.SMOKE)


# ---- the timing ------------------------------------------------------------------------------------------------------


class Clock:
    """Moved by competitors alone; on a slow machine all of them take longer."""

    def __init__(self) -> None:
        self.now, self.slow = 0.0, 1.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, seconds: float) -> Any:
        def run() -> None:
            assert not gc.isenabled()
            self.now += seconds * self.slow
            self.ran.append(name)

        return run

    def passes(self) -> None:
        self.now += 1000.0


@pytest.fixture
def clock(parts: Any, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(parts.measure.time, "perf_counter", clock)
    return clock


def timed(parts: Any, clock: Clock, **options: Any) -> Any:
    """base takes 1 s, "three" 3 s in each round and "slow" 5 s in every second; every round is slower than the last."""

    def slower() -> None:
        clock.slow *= 1.5

    measure = parts.measure
    competitors = [
        measure.Competitor("base", clock.takes("base", 1.0), before=clock.passes, after=clock.passes),
        measure.Competitor("three", clock.takes("three", 3.0), before=clock.passes),
        measure.Competitor("slow", clock.takes("slow", 5.0), every=2),
    ]
    monkey = measure.gc.collect  # called once a round, before it
    measure.gc.collect = lambda: (slower(), monkey())[1]
    try:
        checks = {competitor.name: measure.Check("another", 0.0, 0.0) for competitor in competitors}
        return measure.in_turn(
            "case", competitors, rounds=4, checks=checks, unit="s", reference="base", warmup=1, **options
        )
    finally:
        measure.gc.collect = monkey


def test_a_ratio_is_of_one_round_and_only_run_is_timed(parts: Any, clock: Clock) -> None:
    case = timed(parts, clock)
    assert [len(outcome.samples) for outcome in case.outcomes] == [4, 4, 2]
    assert case.ratios("three") == pytest.approx([3.0] * 4)
    assert case.ratios("slow") == pytest.approx([5.0] * 2)
    assert max(case["base"].samples.values()) > 3 * min(case["base"].samples.values())
    assert max(case["base"].samples.values()) < 1000
    assert gc.isenabled()


def test_each_round_begins_with_the_next_competitor(parts: Any, clock: Clock) -> None:
    timed(parts, clock)
    rounds = [["slow", "base", "three"], ["base", "three", "slow"], ["three", "base"], ["slow", "base", "three"]]
    assert clock.ran == [name for names in [*rounds, ["base", "three"]] for name in names]


def test_goals_are_judged_by_the_median_and_the_table_says_so(parts: Any, clock: Clock) -> None:
    goal = parts.measure.Goal
    case = timed(
        parts,
        clock,
        goals={"three": goal(3.1, "ratio", "design"), "slow": goal(4.9, "ratio", "issue")},
        rivals={"three": "slow"},
    )
    facts = {"versions": {}, "cpu": "a", "cores": 2, "threads": 2, "python": "3", "commit": None, "load_before": 1.5}
    head = {"command": "c", "date": "today", "seconds": 1, "smoke": False, "machine": facts}
    data = parts.report.as_json({"rows": [case]}, head)
    assert [who["reached"] for _, who in outcomes(data)] == [None, True, False]
    table = parts.report.as_markdown(data)
    assert "| case; three | 3 × base | 5 × base | ≤ 3.1 × | design | yes |" in table
    assert "| case; slow | 5 × base |  | ≤ 4.9 × | issue | **no** |" in table
    assert "The machine was busy when this began (load 1.5 on 2 cores)" in table


@pytest.mark.parametrize("check", [None, float("nan"), 2e-4])
def test_a_competitor_without_an_equal_output_ends_the_run(check: float | None, parts: Any) -> None:
    measure = parts.measure
    ran: list[int] = []
    checks = {} if check is None else {"a": measure.Check("b", check, measure.TOLERANCE)}
    with pytest.raises(SystemExit, match=r"case: a does not compute what it should"):
        measure.in_turn("case", [measure.Competitor("a", lambda: ran.append(1))], rounds=1, checks=checks)
    assert not ran


# ---- what is published -----------------------------------------------------------------------------------------------


def test_the_published_table_is_of_the_published_samples(parts: Any) -> None:
    data = json.loads((PUBLISHED / "serving.json").read_text(encoding="utf-8"))
    assert list(data["sections"]) == list(parts.report.SECTIONS)
    assert data["smoke"] is False
    assert all(who["checked"]["equal"] for _, who in outcomes(data))
    assert (PUBLISHED / "serving.md").read_text(encoding="utf-8") == parts.report.as_markdown(data)


@pytest.mark.parametrize("name", ["training", "variants"])
def test_the_published_training_table_is_of_the_published_samples(parts: Any, name: str) -> None:
    from training_parts import sections, variants

    titles = {"training": sections.TITLES, "variants": variants.TITLES}[name]
    data = json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
    assert list(data["sections"]) == list(titles)
    assert data["smoke"] is False
    assert all(who["checked"]["equal"] for _, who in outcomes(data))
    assert (PUBLISHED / f"{name}.md").read_text(encoding="utf-8") == parts.report.as_markdown(data, titles)


@pytest.mark.parametrize(("page", "name"), [("benchmarks", "serving"), ("training-cost", "training")])
def test_the_page_shows_the_table_and_the_figure(page: str, name: str) -> None:
    text = (ROOT / "docs" / "pages" / f"{page}.md").read_text(encoding="utf-8")
    assert f'--8<-- "{name}.md"' in text
    (figure,) = re.findall(r'<img src="([^"]+)"', text)
    assert (ROOT / "docs" / "pages" / figure).resolve() == PUBLISHED / f"{name}.png"
    assert (PUBLISHED / f"{name}.png").is_file()


def test_the_gpu_script_runs_small_on_a_cpu(peft: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two subjects, here: the same steps from the same factors give the same losses, and the table has the ratios."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "benchmarks"))
    import gpu

    options = argparse.Namespace(shape="tiny", device="cpu", batch=1, length=16, steps=2, date="today")
    found = {}
    for subject in ("full fine-tuning", "PEFT, all-linear r=16", "hf_lora, all-linear r=16"):
        options.subject = subject
        found[subject] = gpu.run(options)
    ours, theirs = found["hf_lora, all-linear r=16"]["losses"], found["PEFT, all-linear r=16"]["losses"]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours != pytest.approx(found["full fine-tuning"]["losses"], rel=1e-5)
    assert ours[0] != ours[-1]  # it trains
    text = gpu.as_markdown(found, options)
    assert text.count("\n| ") == 4
    assert "1.00" in text


# ---- training --------------------------------------------------------------------------------------------------------

TITLES = ("time", "parts", "saved")
STEPS = ("q, v r=8", "all-linear r=16", "all-linear r=16, dropout 0.05")
TRAINED = {
    *("the limit", "full fine-tuning"),
    *(f"{who}, {step}" for who in ("hf_lora", "PEFT") for step in STEPS),
    *(f"hf_lora, {step}, generic path" for step in STEPS[1:]),
}
SAVED = {"the frozen base", f"hf_lora, {STEPS[2]}, generic path", *(f"{w}, {s}" for w in BOTH for s in STEPS)}


@pytest.mark.slow
def test_a_smoke_run_of_the_training_benchmark(peft: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "training.py"), "--smoke", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    names = {key: [{who["who"] for who in case["competitors"]} for case in data["sections"][key]] for key in TITLES}
    assert names["time"] == [TRAINED] * 2
    assert names["saved"] == [SAVED] * 2
    assert len(names["parts"]) == 3
    assert all(who["checked"]["equal"] for _, who in outcomes(data))
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_what_the_variants_benchmark_compares_is_the_same(peft: Any, parts: Any) -> None:
    """The gradients of hf_lora and PEFT are equal on every setting, PiSSA's second pair too."""
    from training_parts import steps, variants

    made = steps.Subjects(steps.SMOKE, torch.float32)
    ids = steps.inputs(made.base, (2, 8))
    weights = {name: p.clone() for name, p in made.base.named_parameters()}
    for setting in variants.SETTINGS:
        ours, theirs = (steps.gradients(model, ids) for model in (made.ours(setting), made.theirs(setting)))
        assert ours.abs().max() > 0
        assert parts.measure.difference(ours, theirs) < 1e-4, setting.name
    assert all(torch.equal(p, weights[name]) for name, p in made.base.named_parameters())
    (begun,) = variants.measure_begin(steps.SMOKE)
    assert [outcome.name for outcome in begun.outcomes] == list(variants.STARTS)
