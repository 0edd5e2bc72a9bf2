"""docs/pages/architectures-matrix.md: every model_type is in it, it is what its JSON says, and some rows run again.

And what the sweep over all architectures found: layers whose forward never runs, gates of one row, layers of no size.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import hf_lora
from hf_lora import LoRAConfig
from hf_lora.errors import LoRAMismatchError, LoRATargetError, LoRAUnsupportedError
from hf_lora.targeting import resolve

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "pages" / "architectures-matrix.md"
KINDS = (  # a row of each kind, run again here
    "llama",
    "bert",
    "t5",
    "vit",
    "wav2vec2",
    "clip",
    "llava",
    "mamba",
    "qwen3_next",
    "segformer",
)
OPEN = {"videoprism_vision_model"}  # at step 0 a last bit of its pooling head's output is another one
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}


@pytest.fixture(scope="module")
def recipe() -> Iterator[Any]:
    pytest.importorskip("peft", reason="peft is not installed: install hf_lora[test]")
    folder = ROOT / "recipes" / "compatibility"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location("architectures_matrix", folder / "architectures.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
        for name in [n for n in sys.modules if n.partition(".")[0] in ("architectures_parts", "variants_parts")]:
            patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def same_release(published: dict[str, Any]) -> None:
    made = published["versions"]["transformers"]
    if transformers.__version__ != made:
        pytest.skip(f"the rows are of transformers {made}, this is {transformers.__version__}: run the script again")


def test_the_page_is_what_its_rows_say(recipe: Any, published: dict[str, Any]) -> None:
    assert PAGE.read_text(encoding="utf-8") == recipe.page(published)
    assert PAGE.with_suffix(".json").read_text(encoding="utf-8") == recipe.written(published)


def test_every_model_type_is_accounted_for(recipe: Any, published: dict[str, Any], same_release: None) -> None:
    rows = published["rows"]
    assert [row["model_type"] for row in rows] == recipe.model_types()
    for row in rows:
        if "class" not in row:
            assert row["not_built"]
            continue
        for column in recipe.COLUMNS:
            cell = row[column]
            if row["model_type"] in OPEN:
                assert cell["outcome"] == "fail"
                continue
            assert cell["outcome"] in ("pass", "refused"), row["model_type"]
            assert cell["outcome"] == "refused" or cell["trained"] > 0
            assert (cell["outcome"] == "refused") == ("why" in cell)
    built = sum("class" in row for row in rows)
    assert built > 500


GATED, FUSED = "q k v o gate up down", "q k v o up down"
ROLES = {  # of families that no test of test_architectures.py builds
    **{
        f"{name}_vision_model": FUSED
        for name in ("sam", "sam_hq", "blip", "blip_2", "instructblip", "instructblipvideo")
    },
    **dict.fromkeys(("got_ocr2_vision", "deepseek_ocr2_sam_vision_model"), FUSED),
    **dict.fromkeys(("openai-gpt", "imagegpt", "decision_transformer", "gpt_neox_japanese", "ctrl", "funnel"), FUSED),
    **dict.fromkeys(("deepseek_v32", "axk1", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "mistral4"), GATED),
    **dict.fromkeys(("youtu", "longcat_flash"), GATED),
}


@pytest.mark.parametrize("name", ROLES)
def test_a_family_has_its_roles(published: dict[str, Any], same_release: None, name: str) -> None:
    (row,) = (row for row in published["rows"] if row["model_type"] == name)
    assert row["roles"]["outcome"] == "pass"
    assert row["roles"]["roles"] == ROLES[name].split()
    assert "refused_roles" not in row["roles"]


@pytest.mark.parametrize(
    "name", [n if n in ("llama", "vit", "qwen3_next") else pytest.param(n, marks=pytest.mark.slow) for n in KINDS]
)
def test_what_the_page_says_is_so(recipe: Any, published: dict[str, Any], same_release: None, name: str) -> None:
    (said,) = (row for row in published["rows"] if row["model_type"] == name)
    found = recipe.row(name, recipe.COLUMNS)
    for column in recipe.COLUMNS:
        for what in ("outcome", "layers", "roles", "why"):
            assert found[column].get(what) == said[column].get(what), (column, what, found[column])
    assert found["class"] == said["class"]


def test_a_cell_can_fail(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unmerge that does nothing, an adapter whose effect is lost, and an error that is no refusal."""
    from transformers import PreTrainedModel

    from hf_lora.slots import LoRASlots

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "unmerge_lora", lambda model: None)
        cell = recipe.row("gpt2", ["all-linear"])["all-linear"]
        assert (cell["outcome"], cell["step"]) == ("fail", "merge")
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_lora", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        cell = recipe.row("gpt2", ["all-linear"])["all-linear"]
        assert (cell["outcome"], cell["why"]) == ("error", "OSError: no room")
    monkeypatch.setattr(LoRASlots, "add", lambda self, x, output, base: output)
    monkeypatch.setattr(LoRASlots, "fused", lambda self, x, base: None)
    cell = recipe.row("gpt2", ["all-linear"])["all-linear"]
    assert cell["outcome"] != "pass"


@pytest.mark.parametrize("name", ["openai-gpt", "gpt_neox_japanese", "minicpm3", "glm4_moe_lite", "youtu"])
def test_the_rows_of_a_fused_layer_are_its_roles(recipe: Any, name: str) -> None:
    """Of one token alone the softmax is 1: what W_q and W_k are changes nothing, what W_v is does."""
    from architectures_parts.build import build, run

    built = build(name)
    given = {**built.given, "input_ids": built.given["input_ids"][:, :1]}
    before = run(built.model, given)["logits"]
    for role in "qkv":
        model = copy.deepcopy(built.model)
        model.add_lora(LoRAConfig(r=1, target_modules=[role]))
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if ".lora_slots.B" in path:
                    parameter.fill_(0.5)
        changed = float((run(model, given)["logits"] - before).abs().max() / before.abs().max())
        assert (changed > 1e-4) == (role == "v"), (role, changed)


# ---- what the sweep found --------------------------------------------------------------------------------------------


def _wavlm() -> Any:
    sizes = {"conv_dim": [8], "conv_kernel": [3], "conv_stride": [2], "num_feat_extract_layers": 1}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return transformers.WavLMModel(transformers.WavLMConfig(**TEXT, **sizes))


def test_a_layer_whose_weight_is_only_read_is_refused(tmp_path: Path) -> None:
    """WavLM's attention gives its layers' weights to one function: an adapter in them would never run."""
    model = _wavlm()
    with pytest.raises(LoRAUnsupportedError, match="WavLMAttention multiplies by its weight itself"):
        model.add_lora(LoRAConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(LoRATargetError):
        model.add_lora(LoRAConfig(r=2, target_modules=["q"]))
    resolution = resolve(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert not any(".attention." in target.path and "_proj" in target.path for target in resolution.targets)
    assert any("multiplies by its weight itself" in line for line in resolution.skipped)


def test_a_file_with_factors_for_such_a_layer_is_refused(tmp_path: Path, peft: Any) -> None:
    base = transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64))
    config = peft.LoraConfig(r=2, target_modules=["dt_proj", "x_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    model = transformers.MambaForCausalLM(base.config)
    with pytest.raises(LoRAMismatchError, match=r"dt_proj: MambaMixer multiplies by its weight itself"):
        model.load_lora(tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
def test_all_linear_takes_a_gate_of_one_row(tmp_path: Path, peft: Any, rslora: bool) -> None:
    """A gate of one row has rank 1, at the scaling that was asked for; PEFT reads the file."""
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    config = transformers.Qwen2MoeConfig(**TEXT, **sizes, num_experts_per_tok=2, num_key_value_heads=2)
    model = transformers.Qwen2MoeForCausalLM(config)
    model.add_lora(LoRAConfig(r=4, alpha=8, target_modules="all-linear", use_rslora=rslora))
    gate = "model.layers.0.mlp.shared_expert_gate"
    (target,) = (
        t
        for t in resolve(model, LoRAConfig(r=4, alpha=8, target_modules="all-linear", use_rslora=rslora)).targets
        if t.path == gate
    )
    scaling = 8 / (4**0.5 if rslora else 4)
    assert target.rank == 1
    assert target.alpha == pytest.approx(scaling)
    model.save_lora(tmp_path)
    kept = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert set(kept["rank_pattern"].values()) == {1}
    assert list(kept["alpha_pattern"].values()) == pytest.approx([scaling])
    with pytest.raises(hf_lora.errors.LoRAConfigError, match="rank 4 is above 1"):
        model.add_lora(LoRAConfig(r=4, target_modules=["shared_expert_gate"]), name="asked by name")


def test_a_layer_of_no_size_is_left_out() -> None:
    """MobileBERT's output head has a layer for what the embedding lacks of the width; it may lack nothing."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 0)})
    resolution = resolve(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert [target.path for target in resolution.targets] == ["a"]
    assert any("its weight is empty (0 x 4)" in line for line in resolution.skipped)


def test_a_sequential_head_is_trained_whole() -> None:
    """nn.Sequential runs all of its children, and what the adapters hold of a head is one of them."""
    text = {"image_size": 8, "patch_size": 4, "max_position_embeddings": 16}
    model = transformers.ViltForQuestionAnswering(transformers.ViltConfig(**TEXT, **text)).eval().requires_grad_(False)
    given = {"input_ids": torch.arange(6)[None], "pixel_values": torch.ones(1, 3, 8, 8)}
    before = model(**given).logits
    model.add_lora(LoRAConfig(r=2, target_modules=["q"]))
    assert torch.equal(model(**given).logits, before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_heads" in name and name.endswith("bias"):
                parameter.add_(1.0)
    assert not torch.equal(model(**given).logits, before)
    model.remove_lora()
    assert torch.equal(model(**given).logits, before)


def test_ibert_has_layers_that_are_none() -> None:
    """I-BERT's QuantLinear takes a scale and returns a pair."""
    model = transformers.IBertModel(transformers.IBertConfig(**TEXT))
    with pytest.raises(LoRAUnsupportedError, match="takes and returns scales"):
        model.add_lora(LoRAConfig(r=2, target_modules=["query"]))
