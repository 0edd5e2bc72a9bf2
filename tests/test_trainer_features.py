"""docs/pages/trainer-features.md: its table is of the recipe's rows, and what it says of hf_lora is so."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "pages" / "trainer-features.md"
CHEAP = (  # rows that are run again here
    "train",
    "checkpoints hold the adapter alone",
    "resume, training over an active frozen adapter",
    "resume, biases trained",
    "the newest checkpoint is half written, resume_from_checkpoint=True",
    "optimizer.pt is missing",
    "auto_find_batch_size, out of memory at step 3",
    "load_best_model_at_end, two adapters train",
)


@pytest.fixture(scope="module")
def recipe() -> Any:
    path = ROOT / "recipes" / "compatibility" / "trainer_features.py"
    spec = importlib.util.spec_from_file_location("trainer_features", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trainer_features"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def cells() -> dict[str, list[str]]:
    """The table's rows: name → outcomes, in the order hf_lora, PeftModel, add_adapter."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").partition("<!-- table: end -->")[0].splitlines():
        if line.startswith("| ") and not line.startswith("| |"):
            name, *outcomes, _ = [part.strip() for part in line.strip("|").split("|")]
            found[name] = [re.sub(r" \[.*", "", outcome) for outcome in outcomes]
    return found


def test_the_page_has_the_recipes_rows(recipe: Any) -> None:
    assert list(cells()) == [row.name for row in recipe.FEATURES]
    assert all(len(row) == 3 and set(row) <= {"pass", "fail", "error"} for row in cells().values()), (
        "a cell is none of pass, fail, error"
    )


def test_every_cell_of_hf_lora_passed() -> None:
    assert {name for name, row in cells().items() if row[0] != "pass"} == set()


def test_the_page_says_with_what_it_was_made(recipe: Any) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.search(
        r"Run on \d{4}-\d\d-\d\d, CPU, transformers [\d.]+, torch \S+, accelerate [\d.]+, peft [\d.]+:", text
    )
    assert "python recipes/compatibility/trainer_features.py" in text
    for title, column in zip(recipe.WAYS, zip(*cells().values(), strict=True), strict=True):
        assert f"{title} {column.count('pass')} of {len(column)}" in text


def test_every_outcome_that_is_not_a_pass_is_explained() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("<!-- table: end -->")[0]
    table, _, notes = text.partition("### What was said")
    numbers = {int(n) for n in re.findall(r"(?:fail|error) \[(\d+)\]\(#what-was-said\)", table)}
    assert len(re.findall(r"\| (?:fail|error) ", table)) == len(re.findall(r"(?:fail|error) \[", table))
    assert numbers == {int(n) for n in re.findall(r"^(\d+)\. `.+`$", notes, re.M)}


@pytest.mark.parametrize("name", CHEAP)
def test_what_the_page_says_of_hf_lora_is_so(recipe: Any, name: str) -> None:
    row = next(row for row in recipe.FEATURES if row.name == name)
    assert recipe.cell(row, recipe.WAYS["hf_lora"]) == (cells()[name][0], "")


@pytest.mark.parametrize(
    ("name", "way"), [("resume", "add_adapter"), ("load_best_model_at_end, two adapters train", "PeftModel")]
)
def test_what_the_page_says_of_others_is_so(recipe: Any, peft: Any, name: str, way: str) -> None:
    row = next(row for row in recipe.FEATURES if row.name == name)
    outcome, why = recipe.cell(row, recipe.WAYS[way])
    assert outcome == cells()[name][list(recipe.WAYS).index(way)]
    assert f"`{why.replace('`', chr(39))}`" in PAGE.read_text(encoding="utf-8")


def test_a_wrong_result_is_a_fail_and_an_exception_an_error(recipe: Any) -> None:
    """The recipe itself can fail: a way that forgets to save, one that raises, one whose base moves."""
    ours = recipe.WAYS["hf_lora"]

    class Raises(type(ours)):  # type: ignore[misc]
        def build(self, setup: Any, seed: int) -> Any:
            raise RuntimeError("no such thing\nsecond line")

    class Moves(type(ours)):  # type: ignore[misc]
        def build(self, setup: Any, seed: int) -> Any:
            model = super().build(setup, seed)
            model.model.norm.weight.requires_grad_(True)
            return model

    rows = {row.name: row for row in recipe.FEATURES}
    assert recipe.cell(rows["train"], Raises()) == ("error", "RuntimeError: no such thing")
    assert recipe.cell(rows["train"], Moves()) == ("fail", "the base has changed")
