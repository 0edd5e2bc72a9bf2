"""Single rows of an embedding that train (`trainable_token_indices`), against PEFT both ways and a plain formula."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from oracles import build, disturb, logits
from oracles import inputs as make_inputs
from torch import nn

import hf_lora
from hf_lora import LoRAConfig
from hf_lora.errors import LoRAConfigError, LoRAError, LoRAMismatchError, LoRAStateError, LoRATargetError
from hf_lora.tokenfields import ROWS
from hf_lora.tokens import rows_of

IDS = [7, 60, 5]  # in no order
WIDE = torch.float64


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def batch_of(model: Any) -> dict[str, torch.Tensor]:
    """A batch in which the tokens stand, in some rows more than once."""
    inputs: dict[str, torch.Tensor] = make_inputs(model)
    inputs["input_ids"][0, :4] = torch.tensor([5, 60, 5, 7])
    inputs["input_ids"][1, 2:4] = torch.tensor([7, 6])
    return inputs


def trained(model: Any, name: str = "a", *, target: str = "q", seed: int = 1, **fields: Any) -> Any:
    """The model with an adapter that computes something, frozen."""
    config = {"trainable_token_indices": IDS, **fields}
    model.add_lora(LoRAConfig(r=4, target_modules=[target], **config), name)
    disturb(model, seed=seed)
    model.train_lora([])
    return model.eval()


def theirs(peft: Any, model: Any, targets: list[str], indices: Any, **fields: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules=targets, trainable_token_indices=indices, **fields)
        made = peft.get_peft_model(model, config)
    disturb(made)
    return made.eval()


FAMILIES = [("llama", "q"), ("llama-tied", "q"), ("gpt2", "q"), ("gemma3", "q"), ("bart", "q"), ("t5", "q")]
NAMES = {"gpt2": "c_attn", "t5": "q"}


# ---- against PEFT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family, _ in FAMILIES])
def test_a_file_of_peft_computes_the_same_and_goes_back(peft: Any, tmp_path: Any, family: str) -> None:
    made = theirs(peft, build(family, dtype=WIDE), [NAMES.get(family, "q_proj")], IDS)
    model = build(family, dtype=WIDE)
    inputs, before = batch_of(model), bits(model)
    expected = logits(made, inputs)
    assert (logits(model, inputs) - expected).abs().max() > 1e-2
    made.save_pretrained(tmp_path / "theirs")
    model.load_lora(tmp_path / "theirs", name="a")
    assert (logits(model, inputs) - expected).abs().max() <= 1e-12 * expected.abs().max()
    model.save_lora(tmp_path / "ours", "a")
    back = peft.PeftModel.from_pretrained(build(family, dtype=WIDE), tmp_path / "ours").eval()
    assert torch.equal(logits(back, inputs), expected)
    model.remove_lora()
    assert same(bits(model), before)


@pytest.mark.parametrize(
    "indices",
    [
        {"embed_tokens": [5, 7], "lm_head": [5, 7]},
        {"embed_tokens": [5, 7], "lm_head": [6]},
        {"lm_head": [6]},
        {"embed_tokens": [9]},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_modules_that_are_named(peft: Any, tmp_path: Any, family: str, indices: dict[str, list[int]]) -> None:
    made, inputs = theirs(peft, build(family, dtype=WIDE), ["q_proj"], indices), batch_of(build(family))
    expected = logits(made, inputs)
    made.save_pretrained(tmp_path)
    model = build(family, dtype=WIDE)
    model.load_lora(tmp_path, name="a")
    assert (logits(model, inputs) - expected).abs().max() <= 1e-12 * expected.abs().max()
    fresh = build(family, dtype=WIDE)
    fresh.add_lora(LoRAConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices))
    keys = {key for key in fresh.lora_state_dict() if ROWS in key}
    assert keys == {key for key in model.lora_state_dict("a") if ROWS in key}


def test_an_adapter_of_ours_computes_the_same_in_peft(peft: Any, tmp_path: Any) -> None:
    model = trained(build("llama-tied", dtype=WIDE))
    inputs = batch_of(model)
    model.save_lora(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["trainable_token_indices"] == IDS
    assert written["modules_to_save"] is None
    back = peft.PeftModel.from_pretrained(build("llama-tied", dtype=WIDE), tmp_path).eval()
    expected = logits(back, inputs)
    assert (logits(model, inputs) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_training_takes_the_steps_that_peft_takes(peft: Any) -> None:
    model, made = build("llama-tied", dtype=WIDE), build("llama-tied", dtype=WIDE)
    inputs = batch_of(model)
    indices = [0, 5, 7]  # 0 is padding, whose row gets no gradient in the embedding, and does in the head
    model.add_lora(LoRAConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices))
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], trainable_token_indices=indices)
    made = peft.get_peft_model(made, config)
    peft.set_peft_model_state_dict(made, model.lora_state_dict())
    inputs["input_ids"][2, 1] = 0
    found = []
    for each in (model.train(), made.train()):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            each(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(logits(each.eval(), inputs))
    assert (found[0] - found[1]).abs().max() <= 1e-9 * found[1].abs().max()
    rows = peft.get_peft_model_state_dict(made)
    key = f"base_model.model.model.embed_tokens.{ROWS}"
    assert (model.lora_state_dict()[key] - rows[key]).abs().max() <= 1e-10


# ---- a plain formula -------------------------------------------------------------------------------------------------


def with_rows(model: Any, adapter: Any, paths: list[str]) -> Any:
    """The model with the rows written into its weights, and W + ΔW, by hand."""
    for path, factors in adapter.factors.items():
        model.get_submodule(path).weight.data += factors.delta()
    for path, tensors in adapter.modules.items():
        for at in paths if len(adapter.modules) == 1 else [path]:
            model.get_submodule(at).weight.data[IDS] = tensors[ROWS]
    return model


def test_rows_stand_for_rows_of_the_weight_and_nothing_is_a_difference() -> None:
    model = trained(build("llama-tied", dtype=WIDE))
    inputs = batch_of(model)
    plain = with_rows(build("llama-tied", dtype=WIDE), model.lora_adapter(), ["model.embed_tokens"])
    expected = logits(plain, inputs)
    assert (logits(model, inputs) - expected).abs().max() <= 1e-12 * expected.abs().max()
    rows = model.lora_adapter().modules["model.embed_tokens"][ROWS]
    assert torch.equal(model.get_input_embeddings()(torch.tensor(IDS)), rows)


def test_a_new_adapter_changes_nothing_and_rows_that_are_tied_are_one_parameter() -> None:
    model = build("llama-tied")
    inputs = batch_of(model)
    expected = logits(model, inputs)
    model.add_lora(LoRAConfig(r=4, target_modules=["q"], trainable_token_indices=IDS))
    # the head's rows are multiplied apart, so that their last bit may be another
    assert (logits(model, inputs) - expected).abs().max() <= 1e-6
    one, other = (rows_of(model.get_submodule(path), 0) for path in ("model.embed_tokens", "lm_head"))
    assert one is not None
    assert other is not None
    assert one.rows is other.rows
    moved = copy.deepcopy(model)
    copied = [rows_of(moved.get_submodule(path), 0) for path in ("model.embed_tokens", "lm_head")]
    assert copied[0].rows is copied[1].rows  # type: ignore[union-attr]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 32 + 2 * 4 * (32 + 32)
    assert sum(group["name"] == "whole" for group in hf_lora.optimizer_groups(model, 1e-3)) == 1
    assert model.lora_summary().adapters[0].heads == ("model.embed_tokens (3 rows)",)


# ---- the verbs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3"])
def test_routes_switches_and_rows_without(family: str) -> None:
    model = trained(trained(build(family)), "b", seed=2, target="v", trainable_token_indices=[7, 9])
    model.add_lora(LoRAConfig(r=2, target_modules=["k"]), "plain", trainable=False)
    inputs = batch_of(model)
    inputs["input_ids"][:, -1] = torch.tensor([7, 9, 60])
    each = {}
    for name in ("a", "b", "plain", None):
        with model.use_lora(name):
            each[name] = logits(model, inputs)
    assert (each["a"] - each["b"]).abs().max() > 1e-2
    for names in (["a", "b", None], ["plain", "a", "b"], ["b", "b", "b"]):
        with model.route_lora(names):
            found = logits(model, inputs)
        for row, name in enumerate(names):
            assert (found[row] - each[name][row]).abs().max() <= 1e-5 * each[name].abs().max()
    for which in ({"a": 0.5}, ["a", "b"], {"a": 1.0, "plain": 1.0}):
        with pytest.raises(LoRAStateError, match="cannot be mixed"):
            model.set_lora(which)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3"])
def test_a_merge_copies_rows_and_is_undone_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model = trained(trained(build(family, dtype=dtype)), "b", seed=2, trainable_token_indices=[7, 9])
    inputs, before = batch_of(model), bits(model)
    expected = logits(model, inputs)  # of b, which was added last
    model.merge_lora("a")
    model.merge_lora("b", replace=True)
    rows = model.lora_adapter("b").modules["model.embed_tokens"][ROWS]
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight[[7, 9]], rows.to(dtype))
    assert torch.equal(weight[[5, 60]], before["model.embed_tokens.weight"][[5, 60]])
    assert family == "llama" or weight is model.lm_head.weight
    bound = 1e-5 if dtype == torch.float32 else 0.1
    assert (logits(model, inputs) - expected).abs().max() <= bound * expected.abs().max()
    kept = sum(tensor.numel() for tensor in model._lora_state.merged.tensors.values())
    assert kept == 2 * 32  # rows, and no second embedding
    model.unmerge_lora()
    assert same(bits(model), before)


def test_rows_of_a_tied_head_alone_are_merged_apart() -> None:
    model = trained(build("llama-tied"), trainable_token_indices={"lm_head": [6]})
    inputs, before = batch_of(model), bits(model)
    expected = logits(model, inputs)
    with pytest.raises(LoRAError, match="tied"):
        model.merge_lora()
    model.merge_lora(untie=True)
    assert (logits(model, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.unmerge_lora()
    assert same(bits(model), before)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_untie_leaves_together_what_changes_together() -> None:
    model = trained(build("llama-tied"))
    inputs = batch_of(model)
    expected = logits(model, inputs)
    model.merge_lora(untie=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert (logits(model, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_compiled() -> None:
    model = build("llama-tied")
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model = trained(trained(model), "b", seed=2, trainable_token_indices=[7, 9])
    inputs = batch_of(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for names in (["a", "b", None], ["b", "b", "a"]):
        with model.route_lora(names):
            expected = logits(model, inputs)
            assert (logits(compiled, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for which in ("a", "b", None):
        model.set_lora(which)
        expected = logits(model, inputs)
        assert (logits(compiled, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model = build("llama-tied")
        inputs = batch_of(model)
        torch.manual_seed(0)
        model.add_lora(LoRAConfig(r=4, target_modules=["q"], trainable_token_indices=IDS))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    assert all((found[1][name] - grad).abs().max() <= 1e-6 for name, grad in found[0].items())
    assert found[0]["model.embed_tokens.lora_heads.copies.0." + ROWS].abs().max() > 0


def test_masters_are_wide_and_the_base_stays_narrow() -> None:
    model = build("llama-tied", dtype=torch.bfloat16)
    model.add_lora(LoRAConfig(r=4, target_modules=["q"], trainable_token_indices=IDS))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model, batch_of(model)).dtype == torch.bfloat16
    model.train_lora([])
    assert rows_of(model.get_input_embeddings(), 1).rows.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert model.lora_state_dict()[f"base_model.model.model.embed_tokens.{ROWS}"].dtype == torch.float32  # as it came


# ---- tokens that are added -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_tokens_that_are_added_first(peft: Any, tmp_path: Any, family: str) -> None:
    new = [64, 65]
    model = build(family, dtype=WIDE)
    model.resize_token_embeddings(66)
    trained(model, trainable_token_indices=new)
    inputs = make_inputs(model)
    inputs["input_ids"][:, 1] = torch.tensor([64, 65, 3])
    expected = logits(model, inputs)
    model.save_lora(tmp_path)
    torch.manual_seed(7)  # the new rows of another base begin otherwise: what the adapter stores are rows
    other = build(family, dtype=WIDE)
    with pytest.raises(LoRAMismatchError, match="resize_token_embeddings"):
        other.load_lora(tmp_path, name="a")
    other.resize_token_embeddings(66, mean_resizing=False)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path).eval()
    other.load_lora(tmp_path, name="a")
    found = logits(other, inputs)
    assert torch.allclose(found, logits(again, inputs), atol=1e-12)
    if family == "llama-tied":  # else the head's new rows are another base's
        assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_tokens_that_are_added_while_the_adapter_is_there(family: str) -> None:
    model = trained(build(family))
    inputs = batch_of(model)
    expected, value = logits(model, inputs), model.lora_adapter()
    model.resize_token_embeddings(70)
    found = logits(model, inputs)
    assert (found[..., :64] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert model.lora_adapter().equal(value)
    model.resize_token_embeddings(64)
    assert torch.allclose(logits(model, inputs), expected, atol=1e-5)
    with pytest.raises(LoRAStateError, match="60"):
        model.resize_token_embeddings(40)
    assert model.lora_names == ("a",)
    assert len(model.get_input_embeddings().weight) == 64


def test_the_copy_of_a_resized_embedding_that_peft_writes(peft: Any, tmp_path: Any) -> None:
    base = build("llama")
    base.resize_token_embeddings(66)
    made = theirs(peft, copy.deepcopy(base), ["q_proj"], [64, 65])
    made.save_pretrained(tmp_path, save_embedding_layers=True)
    inputs = make_inputs(base)
    inputs["input_ids"][:, 1] = 65
    expected = logits(made, inputs)
    base.get_input_embeddings().weight.data[64:] = 3.0  # rows that the adapter brings do not matter
    base.load_lora(tmp_path, name="a")
    assert (logits(base, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    base.remove_lora()
    base.get_input_embeddings().weight.data[3] = 0
    with pytest.raises(LoRAMismatchError, match="another base"):
        base.load_lora(tmp_path, name="a")


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_no_list_of_tokens() -> None:
    for wrong in ([], [1, 1], [-1], "ab", [1.5], {"embed_tokens": []}, {}, {3: [1]}):
        with pytest.raises(LoRAConfigError, match="trainable_token_indices"):
            LoRAConfig(trainable_token_indices=wrong)
    with pytest.raises(LoRAConfigError, match="embed_tokens"):
        LoRAConfig(trainable_token_indices={"embed_tokens": [1]}, modules_to_save=["embed_tokens"])


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"trainable_token_indices": [64]}),
        ("llama", {"trainable_token_indices": {"embed_token": [1]}}),
        ("llama", {"trainable_token_indices": {"norm": [1]}}),
        ("llama", {"target_modules": ["q", "embed_tokens"]}),
        ("llama-tied", {"target_modules": ["q", "lm_head"]}),
        ("llama-tied", {"modules_to_save": ["lm_head"]}),
        ("llama", {"modules_to_save": ["embed_tokens"]}),
        ("llama", {"alora_invocation_tokens": [3]}),
    ],
    ids=str,
)
def test_what_does_not_go_together(family: str, fields: dict[str, Any]) -> None:
    model = build(family)
    before = bits(model)
    with pytest.raises((LoRAError, LoRATargetError), match=r"token|rows|whole"):
        model.add_lora(LoRAConfig(**{"r": 2, "target_modules": ["q"], "trainable_token_indices": [5], **fields}))
    assert same(bits(model), before)
    assert not hasattr(model, "_lora_state")


def test_another_adapter_s_factors_are_in_the_way() -> None:
    model = build("llama-tied")
    model.add_lora(LoRAConfig(r=2, target_modules=["lm_head"]), "head")
    with pytest.raises(LoRAMismatchError, match="another adapter has LoRA factors"):
        model.add_lora(LoRAConfig(r=2, target_modules=["q"], trainable_token_indices=[5]), "rows")
    model.remove_lora()
    model.add_lora(LoRAConfig(r=2, target_modules=["q"], trainable_token_indices=[5]), "rows")
    with pytest.raises(LoRAMismatchError, match="another adapter"):
        model.add_lora(LoRAConfig(r=2, target_modules=["lm_head"]), "head")


def test_the_value(tmp_path: Any) -> None:
    adapter = trained(build("llama")).lora_adapter()
    adapter.save(tmp_path)
    again = hf_lora.LoRAAdapter.load(tmp_path)
    assert again.config.trainable_token_indices == tuple(IDS)
    assert torch.equal(again.modules["model.embed_tokens"][ROWS], adapter.modules["model.embed_tokens"][ROWS])
    assert adapter.num_parameters == 3 * 32 + 2 * 4 * (32 + 32)
    with pytest.raises(LoRAError, match="embed_tokens"):
        hf_lora.combine([adapter, adapter], [0.5, 0.5])
    plain = adapter.factors_only()
    assert plain.config.trainable_token_indices is None
    assert not plain.modules
    assert plain.truncate(rank=2).factors.keys() == plain.factors.keys()


def test_a_merge_in_memory_writes_rows_and_one_on_disk_refuses(tmp_path: Any) -> None:
    import transformers

    from hf_lora.export import merge_to_folder

    base = build("llama-tied")
    base.save_pretrained(tmp_path / "base")
    model = trained(base)
    model.save_lora(tmp_path / "adapter")
    with pytest.raises(LoRAError, match="trainable_token_indices"):
        merge_to_folder(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    assert not (tmp_path / "merged").exists()
    model.merge_and_save(tmp_path / "whole")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    inputs = batch_of(model)
    expected = logits(model, inputs)
    assert (logits(again, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
