"""Tied weights under adapters: `ensure_weight_tying` against PEFT both ways, merges, what is never silently wrong."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from oracles import build, disturb, inputs, logits

import hf_lora
from hf_lora import LoRAConfig
from hf_lora.errors import LoRAConfigError, LoRAError, LoRAMismatchError, LoRAStateError, LoRAUnsupportedError

WIDE = torch.float64
EMBED, HEAD = "model.embed_tokens", "lm_head"

# What names one of the tied modules, or both, under PEFT's names.
NAMED: dict[str, dict[str, Any]] = {
    "embedding whole": {"modules_to_save": ["embed_tokens"]},
    "head whole": {"modules_to_save": ["lm_head"]},
    "both whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "regex": {"target_modules": r".*(q_proj|embed_tokens)"},
    "rows": {"trainable_token_indices": [5, 7]},
}


def ours(dtype: torch.dtype = torch.float32, *, seed: int = 1, **fields: Any) -> Any:
    """A tied model with a frozen adapter that computes something."""
    model = build("llama-tied", dtype=dtype)
    torch.manual_seed(seed)
    model.add_lora(LoRAConfig(**{"r": 4, "target_modules": ["q_proj"], **fields}), "a")
    disturb(model, seed=seed)
    return model.eval()


def theirs(peft: Any, **fields: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **copy.deepcopy(fields)})
        made = peft.get_peft_model(build("llama-tied", dtype=WIDE), config)
    disturb(made)
    return made.eval()


def close(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-12) -> bool:
    return bool((found - expected).abs().max() <= bound * expected.abs().max())


# ---- against PEFT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ensure", [False, True], ids=["apart", "ensured"])
@pytest.mark.parametrize("named", NAMED)
def test_peft_s_file_computes_the_same(peft: Any, tmp_path: Any, named: str, ensure: bool) -> None:
    made = theirs(peft, **NAMED[named], ensure_weight_tying=ensure)
    model = build("llama-tied", dtype=WIDE)
    batch = inputs(model)
    expected = logits(made, batch)
    assert not close(logits(model, batch), expected, 1e-3)
    made.save_pretrained(tmp_path)
    model.load_lora(tmp_path, name="a")
    assert close(logits(model, batch), expected)
    before = logits(build("llama-tied", dtype=WIDE), batch)
    model.remove_lora()
    assert torch.equal(logits(model, batch), before)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("ensure", [False, True], ids=["apart", "ensured"])
@pytest.mark.parametrize("named", NAMED)
def test_our_file_computes_the_same_in_peft(peft: Any, tmp_path: Any, named: str, ensure: bool) -> None:
    model = ours(WIDE, **NAMED[named], ensure_weight_tying=ensure)
    batch = inputs(model)
    expected = logits(model, batch)
    model.save_lora(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(build("llama-tied", dtype=WIDE), tmp_path).eval()
    assert close(logits(back, batch), expected)
    again = build("llama-tied", dtype=WIDE)
    again.load_lora(tmp_path, name="a", trainable=True)
    assert close(logits(again, batch), expected)


@pytest.mark.parametrize("named", ["embedding", "head whole"])
def test_training_takes_the_steps_that_peft_takes(peft: Any, named: str) -> None:
    model = ours(WIDE, **NAMED[named], ensure_weight_tying=True)
    made = theirs(peft, **NAMED[named], lora_alpha=4, ensure_weight_tying=True)
    peft.set_peft_model_state_dict(made, model.lora_state_dict())
    batch, found = inputs(model), []
    for each in (model.train(), made.train()):
        # PEFT's two views of one memory are two Parameters: only steps that add up are the same
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            each(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(logits(each.eval(), batch))
    assert close(found[0], found[1], 1e-9)


# ---- what is tied ----------------------------------------------------------------------------------------------------


def test_factors_that_are_tied_are_one_pair() -> None:
    model = ours(**NAMED["embedding"], ensure_weight_tying=True)
    value = model.lora_adapter()
    embedding, head = value.factors[EMBED], value.factors[HEAD]
    assert torch.equal(head.A, embedding.B.T)
    assert torch.equal(head.B, embedding.A.T)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * (32 + 32) + 4 * (64 + 32)
    groups = hf_lora.optimizer_groups(model, 1e-3)
    assert sum(len(group["params"]) for group in groups) == 4 + 2
    moved = copy.deepcopy(model)
    with torch.no_grad():
        next(p for n, p in moved.named_parameters() if n.startswith(EMBED) and n.endswith(".B0")).mul_(2)
    copied = moved.lora_adapter()
    assert torch.equal(copied.factors[HEAD].A, 2 * head.A)
    assert torch.equal(model.lora_adapter().factors[HEAD].A, head.A)
    model.train_lora([])
    assert model.lora_adapter().equal(value)
    model.train_lora(["a"])
    assert model.lora_adapter().equal(value)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * (32 + 32) + 4 * (64 + 32)


def test_a_new_tied_adapter_changes_nothing() -> None:
    for named in ("embedding", "both whole", "rows"):
        model = build("llama-tied")
        expected = logits(model, inputs(model))
        model.add_lora(LoRAConfig(**{"r": 4, "target_modules": ["q_proj"], **NAMED[named]}, ensure_weight_tying=True))
        assert close(logits(model, inputs(model)), expected, 1e-6)


def test_a_module_that_trains_whole_is_one_parameter() -> None:
    model = ours(**NAMED["head whole"], ensure_weight_tying=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * (32 + 32) + 64 * 32
    held = model.lora_adapter().modules
    assert held.keys() == {EMBED, HEAD}
    assert torch.equal(held[EMBED]["weight"], held[HEAD]["weight"])


def test_compiled_and_checkpointed_with_tied_factors() -> None:
    model = ours(**NAMED["embedding"], ensure_weight_tying=True)
    batch = inputs(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert close(logits(compiled, batch), logits(model, batch), 1e-5)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


def test_where_nothing_is_tied_it_is_said() -> None:
    model = build("llama")
    model.add_lora(LoRAConfig(r=4, target_modules=["q", "embed_tokens"], ensure_weight_tying=True))
    assert any("ensure_weight_tying" in line for line in model.lora_summary().adapters[0].skipped)
    assert model.lora_adapter().factors.keys() & {HEAD, EMBED} == {EMBED}


# ---- merges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ensure", [False, True], ids=["apart", "ensured"])
@pytest.mark.parametrize("named", ["embedding", "head", "both", "embedding whole", "head whole", "rows"])
def test_a_merge_keeps_a_tie_or_splits_it_when_told(tmp_path: Any, named: str, ensure: bool) -> None:
    import transformers

    model = ours(**NAMED[named], ensure_weight_tying=ensure)
    batch = inputs(model)
    expected = logits(model, batch)
    before = {name: tensor.clone() for name, tensor in build("llama-tied").state_dict().items()}
    as_one = ensure or named == "rows"
    if not as_one:
        with pytest.raises(LoRAUnsupportedError, match="tied"):
            model.merge_lora()
    model.merge_lora(untie=not as_one)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == as_one
    assert close(logits(model, batch), expected, 1e-5)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings == as_one
    assert close(logits(again, batch), expected, 1e-5)
    if not as_one:
        with pytest.raises(LoRAStateError, match="tie_weights"):
            model.tie_weights()
        assert close(logits(model, batch), expected, 1e-5)
    else:
        model.tie_weights()  # harmless: it is tied
    model.unmerge_lora()
    model.tie_weights()
    model.remove_lora()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_adapters_that_tie_and_that_do_not_are_not_merged_as_one() -> None:
    model = ours(**NAMED["embedding"], ensure_weight_tying=True)
    model.add_lora(LoRAConfig(r=2, target_modules=["lm_head"]), "head")
    disturb(model, seed=3)
    model.train_lora([])
    model.set_lora({"a": 1.0, "head": 1.0})
    expected = logits(model.eval(), inputs(model))
    with pytest.raises(LoRAUnsupportedError, match="tied"):
        model.merge_lora()
    model.merge_lora(untie=True)
    assert close(logits(model, inputs(model)), expected, 1e-5)
    model.unmerge_lora()
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_embedding_s_factors_leave_the_head_alone(peft: Any) -> None:
    model = ours(**NAMED["embedding"])
    hidden = torch.randn(1, 2, 32)
    assert torch.equal(model.lm_head(hidden), build("llama-tied").lm_head(hidden))


# ---- resizing --------------------------------------------------------------------------------------------------------


def test_a_tied_pair_is_resized_as_one() -> None:
    model = ours(**NAMED["embedding"], ensure_weight_tying=True)
    batch = inputs(model)
    expected = logits(model, batch)
    model.resize_token_embeddings(70)
    assert close(logits(model, batch)[..., :64], expected, 1e-5)
    value = model.lora_adapter()
    assert torch.equal(value.factors[HEAD].B, value.factors[EMBED].A.T)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with pytest.raises(LoRAUnsupportedError, match="whole"):
        ours(**NAMED["both whole"], ensure_weight_tying=True).resize_token_embeddings(70)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q", "embed_tokens"], "exclude_modules": ["lm_head"]},
        {"target_modules": ["q", "embed_tokens"], "rank_pattern": {"lm_head": 2}},
        {"target_modules": ["q", "lm_head"], "lora_bias": True},
    ],
    ids=str,
)
def test_what_cannot_be_tied(fields: dict[str, Any]) -> None:
    model = build("llama-tied")
    with pytest.raises(LoRAError, match=r"ensure_weight_tying|embedding|lm_head"):
        model.add_lora(LoRAConfig(r=4, ensure_weight_tying=True, **fields))
    assert not hasattr(model, "_lora_state")
    with pytest.raises(LoRAConfigError, match="ensure_weight_tying"):
        LoRAConfig(ensure_weight_tying=1)


@pytest.mark.parametrize("named", ["embedding", "head whole"])
def test_parts_that_differ_are_refused(tmp_path: Any, named: str) -> None:
    value = ours(**NAMED[named]).lora_adapter()
    model = ours(**NAMED[named], ensure_weight_tying=True)
    held = model.lora_state_dict()
    name = next(name for name in held if "lm_head" in name)
    held[name] = held[name] + 1
    from hf_lora.layout import from_state_dict

    odd = from_state_dict(model.lora_adapter().config, held)
    with pytest.raises(LoRAMismatchError, match="ensure_weight_tying"):
        build("llama-tied").load_lora(odd, name="x")
    build("llama-tied").load_lora(value, name="x")
