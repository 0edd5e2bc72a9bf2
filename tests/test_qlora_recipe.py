"""recipes/qlora: every arm for a few steps on a tiny base, and the page that comes of it."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from smallbase import save_base

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "qlora" / "run.py"
PLACES = ["Aromi", "Bibimbap House", "Clowns", "Cotto", "Cocum", "Fitzbillies", "Giraffe", "Green Man"]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("qlora_run", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "qlora_run", module)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec.loader.exec_module(module)
    return module


def write(file: Path, names: list[str]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(["mr", "ref"])
        rows.writerows(
            [f"name[{name}], food[Italian]", f"{name} serves {kind} food."] for name in names for kind in "ab"
        )


@pytest.mark.filterwarnings("ignore")
def test_every_arm_and_the_page(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.LlamaConfig(
        **sizes, vocab_size=64, max_position_embeddings=512, eos_token_id=2, pad_token_id=0
    )
    base = save_base(transformers.LlamaForCausalLM(config), tmp_path / "base")
    write(tmp_path / "devset.csv", PLACES[:5])
    write(tmp_path / "testset_w_refs.csv", PLACES[5:])
    options = SimpleNamespace(
        data=tmp_path,
        base=base,
        work=tmp_path,
        out=tmp_path / "results",
        steps=3,
        batch=2,
        length=24,
        tests=3,
        seeds=1,
        seed=0,
    )
    monkeypatch.setattr(recipe, "RANK", 4)
    records = [{"arm": arm.name, "seed": 0, **recipe.run(arm, options)} for arm in recipe.ARMS]
    assert all(len(record["losses"]) == 3 for record in records)
    by_name = {record["arm"]: record for record in records}
    assert by_name["QLoRA"]["base_bytes"] < by_name["LoRA"]["base_bytes"]
    assert by_name["QLoRA"]["trainable"] == by_name["LoRA"]["trainable"] < by_name["full fine-tuning"]["trainable"]
    assert by_name["QLoRA"]["planned"] is not None
    recipe.write(records, options)
    page = (tmp_path / "results" / "qlora.md").read_text(encoding="utf-8")
    assert all(f"| {arm.name} |" in page for arm in recipe.ARMS)
    assert len(json.loads((tmp_path / "results" / "qlora.json").read_text())["records"]) == len(recipe.ARMS)


def test_the_error_is_paired(recipe: Any) -> None:
    """A difference that is the same everywhere has no error, however far the losses lie apart."""
    mine = [{"losses": [1.0, 2.0, 3.0]}, {"losses": [2.0, 3.0, 4.0]}]
    other = [{"losses": [1.5, 2.5, 3.5]}, {"losses": [2.5, 3.5, 4.5]}]
    assert recipe.paired(mine, other) == "-0.500 ± 0.000"
    assert recipe.paired(mine, mine) == "–"


def test_the_committed_page_has_every_arm(recipe: Any) -> None:
    kept = json.loads((RECIPE.parents[2] / "docs" / "results" / "qlora.json").read_text(encoding="utf-8"))
    assert {record["arm"] for record in kept["records"]} == {arm.name for arm in recipe.ARMS}
