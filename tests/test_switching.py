"""The verbs and their mistakes: names, weights, routes, adding inside blocks, nesting models."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from loras import bits, logits, randomise, with_adapters

from hf_lora import (
    LoRAConfig,
    LoRAConfigError,
    LoRAError,
    LoRAFileError,
    LoRANameError,
    LoRARouteError,
    LoRAStateError,
    LoRATargetError,
    LoRAUnsupportedError,
)

A = LoRAConfig(r=2, target_modules=["q", "v"], alpha=4)
B = LoRAConfig(r=4, target_modules=["down"])


@pytest.fixture
def model(tiny: Any) -> Any:
    return with_adapters(tiny("llama"), {"a": A, "org/b": B})


def test_active_lora_says_what_set_lora_was_told(model: Any) -> None:
    assert model.lora_names == ("a", "org/b")
    for which in ("a", None, {"a": 0.5, "org/b": -1.0}, {"org/b": 2.0}):
        model.set_lora(which)
        assert model.active_lora == which
    model.set_lora(["a", "org/b"])
    assert model.active_lora == {"a": 1.0, "org/b": 1.0}
    model.set_lora({})
    assert model.active_lora is None


def test_a_mixture_is_the_sum_of_the_weighted_deltas(model: Any, batch: Any, tiny: Any) -> None:
    inputs, exact = batch(model), tiny("llama", dtype=torch.float64)
    for name, weight in {"a": 0.7, "org/b": -0.4}.items():
        for path, factors in model.lora_adapter(name).factors.items():
            A, B = factors.A.double(), factors.B.double()
            exact.get_submodule(path).weight.data += weight * factors.alpha / A.shape[0] * (B @ A)
    model.set_lora({"a": 0.7, "org/b": -0.4})
    expected = logits(exact, inputs)
    assert (logits(model, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_switching_never_touches_requires_grad(model: Any) -> None:
    model.train_lora("org/b")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    model.set_lora("a")
    with model.use_lora({"a": 0.5}), model.no_lora():
        pass
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_adding_makes_the_new_one_active_and_the_only_one_that_trains(model: Any) -> None:
    model.train_lora("a")
    model.add_lora(B, "c")
    assert model.active_lora == "c"
    slots = {int(name[-1]) for name, p in model.named_parameters() if p.requires_grad}
    assert len(slots) == 1
    model.add_lora(B, "d", active=False, trainable=False)
    assert model.active_lora == "c"
    assert {int(name[-1]) for name, p in model.named_parameters() if p.requires_grad} == slots


def test_training_back_and_forth_keeps_every_bit(model: Any, batch: Any) -> None:
    inputs = batch(model)
    before, files = logits(model, inputs), model.lora_state_dict("a")
    for names in ("a", ["a", "org/b"], [], "org/b", []):
        model.train_lora(names)
        again = model.lora_state_dict("a")
        assert all(torch.equal(files[key], again[key]) for key in files)
    assert torch.equal(logits(model, inputs), before)


def test_a_peft_config_is_accepted(tiny: Any, peft: Any) -> None:
    model = tiny("llama")
    model.add_lora(peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"], lora_dropout=0.1))
    adapter = model.lora_adapter()
    assert (adapter.config.r, adapter.config.alpha, adapter.config.dropout) == (4, 16, 0.1)


MISTAKES: dict[str, tuple[type[LoRAError], str, Any]] = {
    "no such adapter": (LoRANameError, r"No adapter 'c'.*'a', 'org/b'", lambda m: m.set_lora("c")),
    "no such adapter in a mixture": (LoRANameError, "No adapter 'x'", lambda m: m.set_lora({"a": 1, "x": 1})),
    "not a name": (LoRANameError, "3 names no adapters", lambda m: m.set_lora(3)),
    "twice": (LoRANameError, "named twice", lambda m: m.set_lora(["a", "a"])),
    "nan": (LoRAStateError, "weight nan", lambda m: m.set_lora({"a": float("nan")})),
    "true": (LoRAStateError, "weight True", lambda m: m.set_lora({"a": True})),
    "taken": (LoRANameError, "already on this model", lambda m: m.add_lora(A, "a")),
    "empty name": (LoRANameError, "'' is no name", lambda m: m.add_lora(A, "")),
    "no config": (LoRAConfigError, "'q' is neither", lambda m: m.add_lora("q")),
    "misspelt": (
        LoRATargetError,
        "q_porj[^$]*q_proj",
        lambda m: m.add_lora(LoRAConfig(target_modules=["q_porj"]), "c"),
    ),
    "rank": (LoRAConfigError, "rank 64 is above 32", lambda m: m.add_lora(LoRAConfig(r=64, target_modules=["q"]), "c")),
    "a string as route": (LoRARouteError, "a list", lambda m: m.route_lora("a").__enter__()),
    "an empty route": (LoRARouteError, "a list", lambda m: m.route_lora([]).__enter__()),
    "route to nobody": (LoRANameError, "No adapter 'c'", lambda m: m.route_lora(["c"]).__enter__()),
    "unmerge": (LoRAStateError, "No adapter is merged", lambda m: m.unmerge_lora()),
    "save which": (LoRANameError, "2 adapters", lambda m: (m.set_lora(None), m.save_lora("/nowhere"))),
    "no folder": (LoRAFileError, "/no/such/folder", lambda m: m.load_lora("/no/such/folder")),
    "no repo": (LoRAFileError, "neither a folder here nor whole in the cache", lambda m: m.load_lora("some/repo")),
    "remove": (LoRANameError, "No adapter 'c'", lambda m: m.remove_lora("c")),
    "eva": (
        LoRAUnsupportedError,
        "eva",
        lambda m: m.add_lora(LoRAConfig(peft_fields={"init_lora_weights": "eva"}), "c"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_error_and_changes_nothing(model: Any, batch: Any, mistake: str) -> None:
    kind, says, do = MISTAKES[mistake]
    inputs = batch(model)
    with model.use_lora("a"):
        before = logits(model, inputs)
    state, classes = bits(model), [type(m) for m in model.modules()]
    with pytest.raises(kind) as caught:
        do(model)
    assert re.search(says, str(caught.value), re.S), str(caught.value)
    assert bits(model) == state
    assert [type(m) for m in model.modules()] == classes
    assert model.lora_names == ("a", "org/b")
    with model.use_lora("a"):
        assert torch.equal(logits(model, inputs), before)


def test_positions_that_make_their_own_ids_are_refused(tiny: Any) -> None:
    with pytest.raises(LoRAError, match="something else than the ids"):
        tiny("opt").add_lora(LoRAConfig(r=2, target_modules=["embed_positions"]))


def test_rows_that_the_model_flattens_are_routed_and_compiled(tiny: Any, batch: Any) -> None:
    configs = {
        "a": LoRAConfig(r=2, target_modules=["fc1", "fc2"]),
        "b": LoRAConfig(r=3, target_modules=["fc2"], bias="all"),
    }
    model = with_adapters(tiny("opt"), configs)  # OPT runs fc1, fc2 and a norm on (B·T, d)
    inputs, alone = batch(model, 3), {}
    for name in ("a", "b", None):
        with model.use_lora(name):
            alone[name] = logits(model, inputs)
    expected = torch.stack([alone["b"][0], alone[None][1], alone["a"][2]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for trains in ([], ["a"]):
        model.train_lora(trains)
        with model.route_lora(["b", None, "a"]):
            for run in (model, compiled):
                found = logits(run, inputs, use_cache=False)
                assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        for wrong in (["a", "b"], ["a"] * 7, ["a"] * 21):  # 3 rows of 7 tokens: 7 and 21 divide, and are not rows
            with model.route_lora(wrong), pytest.raises(LoRARouteError, match=f"names {len(wrong)} rows"):
                logits(model, inputs)


def test_a_model_without_a_lora_says_so(tiny: Any) -> None:
    model = tiny("llama")
    assert model.lora_names == ()
    assert model.active_lora is None
    for verb in (lambda: model.set_lora("a"), model.remove_lora, model.merge_lora, model.lora_summary):
        with pytest.raises(LoRAStateError, match="has no LoRA"):
            verb()


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_a_route_of_another_length_raises_and_leaves_nothing(model: Any, batch: Any, rows: int) -> None:
    inputs = batch(model, 3)
    before = logits(model, inputs)
    with model.route_lora(["a"] * rows), pytest.raises(LoRARouteError, match=f"names {rows} rows.*has 3"):
        logits(model, inputs)
    assert torch.equal(logits(model, inputs), before)


def test_while_merged_the_other_verbs_raise(model: Any, tmp_path: Any) -> None:
    value = model.lora_adapter("org/b")
    model.merge_lora("a")
    assert model.active_lora is None  # nothing is added any more; it is in the weights
    for verb in (
        lambda: model.set_lora("a"),
        lambda: model.use_lora("a").__enter__(),
        lambda: model.route_lora(["a"]).__enter__(),
        lambda: model.add_lora(A, "c"),
        lambda: model.load_lora(value, name="c"),
        lambda: model.train_lora("a"),
        lambda: model.merge_lora("org/b"),
    ):
        with pytest.raises(LoRAStateError, match="merged"):
            verb()
    model.save_lora(tmp_path, "org/b")
    model.remove_lora("a")  # unmerges first
    assert model.lora_names == ("org/b",)
    model.set_lora("org/b")


def test_inside_a_block_adapters_are_neither_added_nor_removed(model: Any) -> None:
    with model.use_lora("a"):
        with pytest.raises(LoRAStateError, match="inside use_lora"):
            model.add_lora(A, "c")
        with pytest.raises(LoRAStateError, match="names it"):
            model.remove_lora("a")
        with pytest.raises(LoRAStateError, match="inside use_lora"):
            model.merge_lora()
        model.remove_lora("org/b")  # not in use here
    assert model.lora_names == ("a",)


def test_merging_while_training_is_refused(model: Any) -> None:
    model.train()
    with pytest.raises(LoRAStateError, match=r"model\.eval"):
        model.merge_lora("a")


def test_heads_cannot_be_mixed(tiny: Any) -> None:
    config = LoRAConfig(r=2, target_modules=["q"])
    model = with_adapters(tiny("bert-cls"), {"a": config, "b": config})
    assert model.lora_adapter("a").modules.keys() == {"classifier"}  # the new head, kept without being told
    for which in ({"a": 0.5}, ["a", "b"]):
        with pytest.raises(LoRAStateError, match="cannot be mixed or scaled"):
            model.set_lora(which)


def test_heads_and_biases_switch_and_route_with_their_adapter(tiny: Any, batch: Any) -> None:
    model = with_adapters(
        tiny("bert-cls"),
        {
            "a": LoRAConfig(r=2, target_modules=["q", "v"], bias="all"),
            "b": LoRAConfig(r=3, target_modules=["up"], bias="lora_only"),
        },
    )
    inputs, alone = batch(model, 3), {}
    for name in ("a", "b", None):
        with model.use_lora(name):
            alone[name] = logits(model, inputs)
    assert not torch.equal(alone["a"], alone["b"])
    for trains in ([], ["a"], ["a", "b"]):
        model.train_lora(trains)
        with model.route_lora(["b", None, "a"]):
            found = logits(model, inputs)
        expected = torch.stack([alone["b"][0], alone[None][1], alone["a"][2]])
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_route_through_experts_is_refused(batch: Any) -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM  # an architecture with shared experts as Linear

    from hf_lora.layers import LoRALinear

    config = DeepseekV2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=4, kv_lora_rank=8,
        q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = DeepseekV2ForCausalLM(config).eval()
    model.add_lora(LoRAConfig(r=2, target_modules=["o_proj"]), "a")
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_slots.row_map = "inner"  # as targeting marks a tower's or an expert's layers
    with model.route_lora(["a", None]), pytest.raises(LoRARouteError, match="no row map"):
        logits(model, batch(model))


def test_an_adapter_inside_and_one_around_cannot_share_layers(tiny: Any) -> None:
    model = tiny("llama")
    model.model.add_lora(LoRAConfig(r=2, target_modules=["q"]), "inner")
    with pytest.raises(LoRAStateError, match="through another model"):
        model.add_lora(LoRAConfig(r=2, target_modules=["q"]), "outer")
    model.model.remove_lora()
    model.add_lora(LoRAConfig(r=2, target_modules=["q"]), "outer")
    with pytest.raises(LoRAStateError, match="through another model"):
        model.model.add_lora(LoRAConfig(r=2, target_modules=["q"]), "inner")


def test_a_model_with_peft_layers_is_refused(tiny: Any, peft: Any) -> None:
    model = tiny("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(LoRAUnsupportedError, match="adapters of PEFT: 'default'"):
        model.add_lora(A)
    wrapped.unload().add_lora(A)


def test_loading_under_inference_mode_leaves_ordinary_tensors(tiny: Any, batch: Any) -> None:
    model = with_adapters(tiny("llama"), {"a": A})
    value = model.lora_adapter("a")
    with torch.inference_mode():
        model.load_lora(value, name="b")
        with model.route_lora(["b", "a"]):
            model(**batch(model))
    model.train_lora("a")
    inputs = batch(model)
    with model.route_lora(["b", "a"]):
        with torch.inference_mode():
            model(**inputs)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_summary_counts_what_trains(tiny: Any, capsys: Any) -> None:
    model = tiny("gpt2")
    model.add_lora(LoRAConfig(r=4, target_modules=["q", "v"]), "org/task")
    found = model.lora_summary()
    assert found.trainable == 2 * 2 * (4 * 32 + 32 * 4)  # 2 layers, q and v: the paper's 2 · L · d · r for each
    assert found.adapters[0].parameters == found.trainable
    assert found.adapters[0].targets == {"q": 2, "v": 2}
    assert found.base_parameters == sum(p.numel() for p in tiny("gpt2").parameters())
    model.print_lora_summary()
    printed = capsys.readouterr().out
    assert "'org/task' (active, trainable): r=4, 1,024 parameters" in printed
    assert "q × 2, v × 2" in printed
    randomise(model)
    assert model.lora_adapter().num_parameters == found.trainable  # of fused slices only their own rows


def test_replacing_keeps_the_place_and_weight_in_a_mixture(model: Any) -> None:
    model.set_lora({"a": 0.7, "org/b": 0.3})
    model.load_lora(model.lora_adapter("org/b"), name="a", replace=True)
    assert model.active_lora == {"a": 0.7, "org/b": 0.3}


def test_a_head_around_another_adapters_layer_is_its_own(tiny: Any, batch: Any) -> None:
    head = LoRAConfig(r=2, target_modules=["q"], modules_to_save=["classifier"])
    plain = with_adapters(tiny("bert-cls"), {"h": head})
    inputs, value = batch(plain), plain.lora_adapter("h")
    expected = logits(plain, inputs)
    model = tiny("bert-cls")
    model.add_lora(LoRAConfig(r=2, target_modules=["k"], modules_to_save=[]), "k")
    model.load_lora(value, name="h")
    model.set_lora("h")
    assert torch.equal(logits(model, inputs), expected)
    model.train_lora("h")
    assert torch.equal(logits(model, inputs), expected)
    model.remove_lora("k")
    assert torch.equal(logits(model, inputs), expected)


def test_a_head_tied_to_the_embedding_is_not_merged(tiny: Any) -> None:
    model = tiny("llama-tied")
    model.add_lora(LoRAConfig(r=2, target_modules=["q"], modules_to_save=["lm_head"]))
    randomise(model)
    before = bits(model)
    with pytest.raises(LoRAUnsupportedError, match="tied to"):
        model.merge_lora()
    assert bits(model) == before


def test_an_adapter_that_cannot_be_frozen_stays_and_nothing_is_added(model: Any) -> None:
    model.add_lora(A, "diverged")
    next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(LoRAError, match="NaN"):
        model.add_lora(B, "next")
    assert model.lora_names == ("a", "org/b", "diverged")
    assert model.active_lora == "diverged"


def test_room_that_was_reserved_is_used_without_moving_anything(tiny: Any, batch: Any) -> None:
    from hf_lora.model import reserve

    model, plain = tiny("llama"), tiny("llama")
    value = with_adapters(tiny("llama"), {"a": A}).lora_adapter("a")
    attributes = set(vars(model))
    reserve(model, 5, 4)
    banks: dict[str, int] = {}
    for i in range(5):
        model.load_lora(value, name=str(i))
        found = {name: b.data_ptr() for name, b in model.named_buffers() if ".bank_A" in name}
        assert found == (banks or found)
        banks = found
    assert {b.shape[1] for name, b in model.named_buffers() if ".bank_A" in name} == {4}
    plain.load_lora(value, name="0")
    assert torch.equal(logits(model, batch(model)), logits(plain, batch(plain)))
    reserve(model, None)
    model.remove_lora()
    assert set(vars(model)) == attributes
    for slots, rank in ((0, 4), (2, 0), (True, 4), (2, 1.5)):
        with pytest.raises(LoRAStateError, match="positive"):
            reserve(model, slots, rank)
