"""docs/pages/variants-matrix.md: it is what its JSON says, every variant has a row, and some cells run again."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_lora import LoRAConfig, initnames
from hf_lora.errors import LoRAStateError, LoRAUnsupportedError

pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "pages" / "variants-matrix.md"

# Fields of LoRAConfig that choose sizes, layers and names: no variants. A new field needs a row, or a place here.
NO_VARIANTS = {
    *("r", "alpha", "dropout", "rank_pattern", "alpha_pattern", "init_options", "bias", "modules_to_save"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("task_type", "base_model", "revision", "peft_fields", "trainable_token_indices", "ensure_weight_tying"),
    "target_parameters",
}
CHEAP = (  # cells that are run again here: row, kind of layer, check
    ("DoRA + PiSSA", "Conv1D", "train"),
    ("LoRA-GA", "Linear, biases trained", "train"),
    ("DoRA + lora_bias", "Conv1D", "save → PEFT"),
    ("KaSA", "Linear", "PEFT → load"),
    ("CorDA", "Linear", "PEFT → load"),
    ("lora_bias", "Linear", "merge"),
    ("OLoRA", "roles of a fused layer", "merge"),
    ("DoRA", "Embedding", "route"),
    ("EVA", "Linear, biases trained", "mix"),
    ("MiCA", "Conv1D", "checkpointing"),
    ("DoRA", "Linear", "compile"),
    ("LoRA-FA + EVA", "Linear", "resume"),
)


@pytest.fixture(scope="module")
def recipe() -> Iterator[Any]:
    pytest.importorskip("peft", reason="peft is not installed: install hf_lora[test]")
    folder = ROOT / "recipes" / "compatibility"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location("variants_matrix", folder / "variants.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
        for name in [name for name in sys.modules if name.partition(".")[0] == "variants_parts"]:
            patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture
def scene(recipe: Any) -> Iterator[Any]:
    made: list[Any] = []

    def make(row: str, kind: str) -> Any:
        made.append(recipe.Scene(recipe.VARIANTS[row], recipe.KINDS[kind]))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_page_is_what_its_cells_say(recipe: Any, published: dict[str, Any]) -> None:
    assert PAGE.read_text(encoding="utf-8") == recipe.page(published)
    cells = [(c["variant"], c["kind"], c["check"]) for c in published["cells"]]
    assert cells == [(v, k, c) for v in recipe.VARIANTS for k in recipe.KINDS for c in recipe.CHECKS]
    assert [c for c in published["cells"] if c["outcome"] not in ("pass", "formula", "refused")] == []
    assert all(bool(c["why"]) == (c["outcome"] != "pass") for c in published["cells"])


def test_every_variant_and_start_has_a_row(recipe: Any) -> None:
    rows = [row.fields for row in recipe.VARIANTS.values()]
    known = {field.name for field in dataclasses.fields(LoRAConfig)} - NO_VARIANTS
    assert known == {name for fields in rows for name in fields} - {"task_type"}  # by which PEFT knows an aLoRA's model
    starts = {initnames.method(fields["init"]) for fields in rows if "init" in fields}
    assert starts == set(initnames.NAMES) - {"kaiming", "off"}  # every row's own, and for debugging


@pytest.mark.parametrize(("row", "kind", "check"), CHEAP)
def test_what_the_page_says_is_so(
    recipe: Any, published: dict[str, Any], scene: Any, row: str, kind: str, check: str
) -> None:
    wanted = (row, kind, check)
    (said,) = (c for c in published["cells"] if (c["variant"], c["kind"], c["check"]) == wanted)
    assert recipe.cell(scene(row, kind), check) == (said["outcome"], said["why"])


def test_a_cell_can_fail(recipe: Any, scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant that forgets its gain, an unmerge that does nothing, and errors that are no refusal of the verb."""
    from transformers import PreTrainedModel

    from hf_lora.variants.dora import DoRA

    one = scene("DoRA", "Linear")
    assert recipe.cell(one, "save → PEFT") == ("pass", "")
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "unmerge_lora", lambda model: None)
        assert recipe.cell(one, "merge") == ("fail", "unmerge_lora has not given every bit back")
        for error, outcome in ((LoRAStateError, "error"), (LoRAUnsupportedError, "refused"), (OSError, "error")):

            def refuse(model: Any, error: Any = error) -> None:
                raise error("no such thing\nsecond line")

            patch.setattr(PreTrainedModel, "merge_lora", refuse)
            assert recipe.cell(one, "merge") == (outcome, f"{error.__name__}: no such thing")
    monkeypatch.setattr(DoRA, "apply", lambda self, effect, *rest: effect)
    outcome, why = recipe.cell(one, "mix")
    assert outcome == "fail"
    assert why.startswith("the formula: ")
