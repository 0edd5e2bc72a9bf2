"""LoRA on the experts' 3-D parameters: PEFT's files both ways, a float64 loop, routes, merges, and older adapters."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from loras import bits, logits, randomise
from safetensors.torch import load_file, save_file

import hf_lora
from hf_lora import LoRAAdapter, LoRAConfig
from hf_lora.errors import (
    LoRAConfigError,
    LoRAFileError,
    LoRAMismatchError,
    LoRARouteError,
    LoRATargetError,
    LoRAUnsupportedError,
)
from hf_lora.expertproxy import Adapted, Pair
from hf_lora.model import read
from hf_lora.values import Factors

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts_per_tok": 2,
}  # fmt: skip
MLA = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen3": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}),
    "deepseek": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**MLA, "n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1}
        | {"topk_group": 1, "n_shared_experts": 1},
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 4, "head_dim": 8}),
}
# Experts beside a layer's MLP; all experts' tokens in one product; lists of tokens.
FURTHER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {"head_dim": 8, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
        | {"hidden_size_per_layer_input": 0},
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
    ),
    "jetmoe": (
        "JetMoeConfig",
        "JetMoeForCausalLM",
        {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2},
    ),
}
NAMES = {name: ["experts.gate_up_proj", "experts.down_proj"] for name in ("gemma4", "llama4")}
NAMES["jetmoe"] = ["input_linear.weight", "output_linear.weight"]
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
_BUILT: dict[str, Any] = {}


def build(name: str, implementation: str = "eager") -> Any:
    """A tiny model with random weights, the same each time."""
    if name not in _BUILT:
        import transformers

        config, model, fields = {**MODELS, **FURTHER}[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = getattr(transformers, model)(getattr(transformers, config)(**{**SIZES, **fields})).eval()
            for path, parameter in made.named_parameters():
                if parameter.ndim == 3:
                    parameter.data.normal_(0, 0.2)  # some begin empty
                elif "norm" in path or "bias" in path:
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
        _BUILT[name] = made
    model = copy.deepcopy(_BUILT[name])
    if implementation != "eager" or name in MODELS:
        model.set_experts_implementation(implementation)
    return model


def ids(rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))}


def added(model: Any, name: str = "default", seed: int = 0, **fields: Any) -> Any:
    """The model with an adapter of random values."""
    model.add_lora(
        LoRAConfig(**{"r": 3, "alpha": 6, "target_modules": ["q"], "target_parameters": BOTH, **fields}), name
    )
    randomise(model, seed)
    return model


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def summed(model: Any, value: Any) -> Any:
    """The model in float64 with ΔW in its weights, by plain loops."""
    model = copy.deepcopy(model).double()
    for path, pair in value.factors.items():
        delta = (pair.B.double() @ pair.A.double()) * pair.scaling
        parameter, bracket, expert = path.removesuffix("]").partition("[")
        if not bracket:
            model.get_submodule(path).weight.data += delta
            continue
        turned = getattr(model.get_submodule(parameter.rpartition(".")[0]), "is_transposed", False)
        model.get_parameter(parameter).data[int(expert)] += delta.T if turned else delta
    return model


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_plain_loop_in_float64_computes_the_same(name: str, implementation: str) -> None:
    model = build(name, implementation)
    before = logits(model, ids())
    model.add_lora(LoRAConfig(r=3, alpha=6, target_modules=["q"], target_parameters=BOTH))
    assert torch.equal(logits(model, ids()), before)  # ΔW is zero
    randomise(model)
    found, value = logits(model, ids()), read(model, "default")
    assert close(found.double(), logits(summed(build(name), value), ids()))
    assert (found - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_peft_and_we_read_each_others_files(peft: Any, tmp_path: Any, name: str) -> None:
    model = added(build(name), target_modules=[] if name == "gpt_oss" else ["q_proj"], use_rslora=name == "qwen3")
    expected = logits(model, ids())
    model.save_lora(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours")
    assert close(logits(theirs, ids()), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    again = build(name)
    again.load_lora(tmp_path / "theirs", name="x")
    assert close(logits(again, ids()), expected)
    assert LoRAAdapter.load(tmp_path / "theirs").factors.keys() == read(model, "default").factors.keys()


def test_names_nest_as_in_peft_whatever_their_order(peft: Any, tmp_path: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["down_proj", "experts.gate_up_proj"])
    theirs = peft.get_peft_model(build("mixtral"), config)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    model = build("mixtral")
    model.load_lora(tmp_path / "theirs", name="x")
    assert close(logits(model, ids()), logits(theirs.eval(), ids()))
    model.save_lora(tmp_path / "ours")
    one, other = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["target_modules"] == []


@pytest.mark.parametrize(
    ("name", "implementation"), [*(("mixtral", i) for i in IMPLEMENTATIONS), ("gpt_oss", "grouped_mm")]
)
def test_gradients_are_pefts_with_checkpointing_too(peft: Any, tmp_path: Any, name: str, implementation: str) -> None:
    model = added(build(name, implementation), target_modules=["q_proj"]).train()
    model.save_lora(tmp_path)
    inputs = {**ids(), "labels": ids()["input_ids"]}

    def gradients(m: Any) -> dict[str, torch.Tensor]:
        m.zero_grad()
        m(**inputs).loss.backward()
        return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}

    own = gradients(model)
    assert len(own) == sum(p.requires_grad for p in model.parameters()) == 12
    assert all(".lora_slots." in n for n in own)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again = gradients(model)
        assert own.keys() == again.keys()
        assert all(torch.equal(own[n], again[n]) for n in own)
        model.gradient_checkpointing_disable()
    theirs = gradients(peft.PeftModel.from_pretrained(build(name, implementation), tmp_path, is_trainable=True).train())
    at, there = "model.layers.1.mlp.experts.", "base_model.model.model.layers.1.mlp.experts."
    assert close(own[f"{at}lora_slots.down_proj.A0"], theirs[f"{there}lora_A.default.weight"])
    B = own[f"{at}lora_slots.gate_up_proj.B0"]  # (out, E·r), in PEFT (out, r·E)
    assert close(B.view(len(B), 4, 3).mT.reshape(len(B), 12), theirs[f"{there}base_layer.lora_B.default.weight"])


def test_an_expert_that_no_token_reaches_costs_nothing() -> None:
    """Every operation's result is counted while one token runs: nothing is as large as the pairs of all experts."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            views = func.is_view or "detach" in str(func)
            if isinstance(output, torch.Tensor) and not views:
                self.found = max(self.found, output.numel())
            return output

    experts, wide = 64, 64
    import transformers

    fields = {**SIZES, "num_local_experts": experts, "hidden_size": wide, "num_hidden_layers": 1}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**fields)).eval()
    model.set_experts_implementation("eager")
    for trainable in (True, False):
        added(model, str(trainable), r=8, target_modules=[])
        model.train_lora([str(trainable)] if trainable else [])
        with torch.no_grad(), Largest() as seen:
            model(**ids(1, 1))
        assert seen.found < wide * 8 * 4 * 3  # a few experts' A at most, of 64


def test_the_backward_makes_each_factors_gradient_once() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        stacks = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.dim() == 3 and len(output) == 4:  # (E, r, ...)
                self.stacks += "select_backward" in str(func)
            return output

    model = added(build("mixtral"), target_modules=[])
    loss = model(**ids()).logits.sum()
    with Seen() as seen:
        loss.backward()
    assert seen.stacks == 0  # one of the whole factor for each expert that was reached


def test_parameters_in_another_order_than_files_tell_are_refused() -> None:
    from hf_lora.expertputting import expert_problems

    module = torch.nn.Module()
    module.down_proj = torch.nn.Parameter(torch.zeros(2, 4, 3))
    module.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 6, 4))
    pairs = {"down_proj": (3, 4), "gate_up_proj": (4, 6)}
    factors = {
        f"experts.{name}[{e}]": Factors("linear", torch.ones(1, wide), torch.ones(out, 1), 1.0)
        for name, (wide, out) in pairs.items()
        for e in range(2)
    }
    problems = expert_problems(factors, {"experts": module})
    assert len(problems) == 1
    assert "order" in problems[0]


# ---- every verb ------------------------------------------------------------------------------------------------------


def three(name: str, implementation: str) -> Any:
    model = added(build(name, implementation), "a", 1, target_modules=["q_proj"])
    added(model, "b", 2, r=2, target_modules=["o_proj"], target_parameters=BOTH[:1])
    return added(model, "c", 3, r=2, target_modules=["o_proj"], target_parameters=None)


@pytest.mark.parametrize(("name", "implementation"), [*zip(MODELS, (*IMPLEMENTATIONS, "eager"), strict=True)])
def test_each_row_takes_its_own(name: str, implementation: str) -> None:
    model, rows, inputs = three(name, implementation), ["a", None, "b", "c"], ids(4)
    for trained in (["a"], []):
        model.train_lora(trained)
        with model.route_lora(rows):
            found = logits(model, inputs)
            generated = model.generate(**inputs, max_new_tokens=2, do_sample=False) if trained else None
        for i, row in enumerate(rows):
            one = {"input_ids": inputs["input_ids"][i : i + 1]}
            with model.use_lora(row) if row else model.no_lora():
                assert close(found[i : i + 1], logits(model, one))
                if generated is not None:
                    assert torch.equal(generated[i : i + 1], model.generate(**one, max_new_tokens=2, do_sample=False))


@pytest.mark.parametrize("name", FURTHER)
def test_experts_of_other_forms(peft: Any, tmp_path: Any, name: str) -> None:
    model = added(build(name), "a", target_modules=[], target_parameters=NAMES[name])
    expected = logits(model, ids(2))
    model.save_lora(tmp_path)
    assert close(logits(peft.PeftModel.from_pretrained(build(name), tmp_path), ids(2)), expected)
    with model.route_lora(["a", None]):
        if name == "gemma4":
            found = logits(model, ids(2))
            assert close(found[:1], expected[:1])
            assert not close(found[1:], expected[1:], 1e-3)
        else:
            with pytest.raises(LoRARouteError, match=r"experts|rows"):
                logits(model, ids(2))


def test_routed_rows_train(batch: Any) -> None:
    model, inputs = added(build("qwen3", "grouped_mm"), "a", target_modules=[]), ids(2)
    with model.route_lora(["a", None]):
        model(**inputs).logits[0].sum().backward()
    routed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(input_ids=inputs["input_ids"][:1]).logits.sum().backward()
    assert routed
    assert all(close(routed[n], p.grad, 1e-4) for n, p in model.named_parameters() if p.grad is not None)


def test_a_route_that_nothing_tells_apart_is_refused() -> None:
    model = three("mixtral", "eager")
    with model.route_lora(["a", None]), pytest.raises(LoRARouteError, match="experts"):
        model.model.layers[0].mlp.experts(torch.randn(6, 32), torch.randint(4, (6, 2)), torch.rand(6, 2))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_mixtures_merge_and_come_out_again_bit_for_bit(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = three(name, "eager").to(dtype)
        model.train_lora([])
        before, which = bits(model), {"a": 0.7, "b": 0.3}
        model.set_lora(which)
        mixed = logits(model, ids())
        model.merge_lora()
        with torch.no_grad():
            experts = model.model.layers[0].mlp.experts
            assert type(experts.gate_up_proj) is torch.nn.Parameter
        assert close(logits(model, ids()).float(), mixed.float(), 1e-5 if dtype == torch.float32 else 0.1)
        model.merge_lora("b", replace=True)
        model.unmerge_lora()
        assert bits(model) == before


def test_removing_leaves_the_same_parameters() -> None:
    model = build("gpt_oss")
    before, own = bits(model), {n: id(p) for n, p in model.named_parameters()}
    added(model, target_modules=[])
    assert [key for key in model.state_dict() if ".lora_slots." not in key] == list(before)
    model.remove_lora()
    assert bits(model) == before
    assert {n: id(p) for n, p in model.named_parameters()} == own
    assert type(model.model.layers[0].mlp.experts).__name__ == "GptOssExperts"


def test_values_keep_a_matrix_for_each_expert(tmp_path: Any) -> None:
    model = added(build("mixtral"), target_modules=[])
    model.save_lora(tmp_path / "a")
    value = LoRAAdapter.load(tmp_path / "a")
    assert len(value.factors) == 2 * 2 * 4
    assert value.factors["model.layers.1.mlp.experts.down_proj[3]"].A.shape == (3, 48)
    twice = hf_lora.combine([value, value], [0.5, 0.5], method="svd")
    for number, other in enumerate([value, twice, value.truncate(energy=0.9)]):
        other.save(tmp_path / str(number))
        again = LoRAAdapter.load(tmp_path / str(number))
        assert again.equal(other)
        loaded = build("mixtral")
        loaded.load_lora(again, name="x")
        if other is twice:
            assert close(logits(loaded, ids()), logits(model, ids()))
    with pytest.raises(LoRAMismatchError, match="experts"):
        build("qwen3").load_lora(value, name="x")


def test_training_resumes_with_the_same_numbers(tmp_path: Any) -> None:
    model = added(build("qwen3"), target_modules=["q"])
    state = {k: v.clone() for k, v in model.lora_state_dict().items()}
    copied, fresh = copy.deepcopy(model), added(build("qwen3"), seed=5, target_modules=["q"])
    assert torch.equal(logits(copied, ids()), logits(model, ids()))
    from hf_lora.model import refill

    refill(fresh, {"default": read(model, "default")})
    assert all(torch.equal(tensor, fresh.lora_state_dict()[key]) for key, tensor in state.items())
    groups = hf_lora.optimizer_groups(model, 1e-3, b_lr_ratio=4)
    assert {group["name"]: len(group["params"]) for group in groups} == {"A": 6, "B": 6}
    still = added(build("qwen3"), freeze_a=True, target_modules=[])
    assert {n[-2:] for n, p in still.named_parameters() if p.requires_grad} == {"B0"}


def test_casts_keep_what_was_loaded(tmp_path: Any) -> None:
    model = added(build("mixtral"), alpha=3)
    model.save_lora(tmp_path / "a")
    model.train_lora([])
    model.to(torch.bfloat16).to(torch.float32)
    model.save_lora(tmp_path / "b")
    assert LoRAAdapter.load(tmp_path / "a").equal(LoRAAdapter.load(tmp_path / "b"))
    half = build("mixtral").to(torch.bfloat16)
    half.load_lora(tmp_path / "a", name="x")
    assert half.model.layers[0].mlp.experts.lora_slots.gate_up_proj.bank_A.dtype == torch.bfloat16
    assert logits(half, ids()).isfinite().all()


def test_compiled_with_a_break_at_the_experts() -> None:
    model = three("mixtral", "grouped_mm")
    block, x = model.model.layers[0].mlp, torch.randn(2, 5, 32)
    compiled = torch.compile(block, backend="eager")
    for which in ("a", "b"):
        with model.use_lora(which), torch.no_grad():
            assert close(compiled(x), block(x))
    with model.route_lora(["a", None]), torch.no_grad(), pytest.raises(LoRARouteError, match="compiled"):
        compiled(x)


def test_a_pool_takes_turns_with_them(tmp_path: Any) -> None:
    from hf_lora.pool import LoRAPool

    model, expected = build("mixtral"), {}
    for seed in range(3):
        own = added(build("mixtral"), seed=seed)
        own.save_lora(tmp_path / str(seed))
        expected[str(tmp_path / str(seed))] = logits(own, ids(1))
    with LoRAPool(model, max_rank=2) as small, pytest.raises(hf_lora.errors.LoRAError, match="rank 3"):
        small.acquire(next(iter(expected)))
    with LoRAPool(model, device_slots=2, max_rank=4) as pool:
        banks = set()
        for path, found in [*expected.items(), *expected.items()]:
            with pool.route([path]):
                assert close(logits(model, ids(1)), found)
            banks.add(id(model.model.layers[0].mlp.experts.lora_slots.down_proj.bank_A))
        assert len(banks) == 1  # room for every slot was made at once
    assert not hasattr(model, "_lora_state")


def test_plan_and_summary_count_them() -> None:
    config = LoRAConfig(r=2, target_modules=["q"], target_parameters=BOTH)
    planned = hf_lora.plan(build("mixtral", "grouped_mm"), config, length=8)
    model = added(build("mixtral"), r=2)
    assert planned.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.targets == {"q": 2, "gate_up_proj of 4 experts": 2, "down_proj of 4 experts": 2}
    assert planned.peak_bytes is not None
    from hf_lora.summary import summarise

    assert summarise(model).adapters[0].targets == dict(planned.targets)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{"dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"use_qalora": True}, {"layer_replication": [[0, 1]]}],
    ids=str,
)
def test_what_peft_refuses_beside_them(fields: dict[str, Any]) -> None:
    with pytest.raises(LoRAConfigError, match=next(iter(fields))):
        LoRAConfig(target_parameters=BOTH, **fields)


@pytest.mark.parametrize(
    ("parameters", "error", "said"),
    [
        (["q_proj.weight"], LoRAUnsupportedError, "target_modules"),
        (["mlp.gate.weight"], LoRAUnsupportedError, "router"),
        (["norm.weight"], LoRAUnsupportedError, "1 dimensions"),
        (["experts.gate_up"], LoRATargetError, r"experts\.gate_up_proj"),
    ],
)
def test_other_parameters_are_refused_by_name(parameters: list[str], error: Any, said: str) -> None:
    model = build("mixtral")
    with pytest.raises(error, match=said):
        model.add_lora(LoRAConfig(r=2, target_modules=[], target_parameters=parameters))
    assert not hasattr(model, "_lora_state")


def test_targets_say_what_to_name_instead() -> None:
    model = build("mixtral")
    with pytest.raises(LoRAUnsupportedError, match=r"router.*target_parameters"):
        model.add_lora(LoRAConfig(target_modules=["mlp.gate"]))
    with pytest.raises(LoRAUnsupportedError, match=r"target_parameters=\['mlp\.experts\.down_proj'\]"):
        model.add_lora(LoRAConfig(target_modules=["down"]))
    with pytest.raises(LoRAUnsupportedError, match="pissa"):
        model.add_lora(LoRAConfig(init="pissa", target_modules=[], target_parameters=BOTH))
    model.add_lora(LoRAConfig(r=2, target_modules="all-linear"))
    assert any("target_parameters" in line for line in model._lora_state.entry("default").record.skipped)


def test_a_matrix_in_a_peft_file_is_refused(peft: Any, tmp_path: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"])
    peft.get_peft_model(build("mixtral"), config).save_pretrained(tmp_path)
    with pytest.raises(LoRAUnsupportedError, match=r"q_proj\.weight.*matrix"):
        build("mixtral").load_lora(tmp_path, name="x")


def test_a_file_that_names_other_parameters_is_refused(tmp_path: Any) -> None:
    added(build("mixtral"), target_modules=[]).save_lora(tmp_path)
    path = tmp_path / "adapter_config.json"
    for wrong in (["mlp.experts.gate_up_proj"], ["mlp.experts.w1", *BOTH]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target_parameters": wrong}))
        with pytest.raises(LoRAFileError):
            build("mixtral").load_lora(tmp_path, name="x")


def test_whatever_else_a_forward_asks_is_an_error() -> None:
    weight = torch.randn(4, 6, 5)
    own = Adapted(weight, [Pair(torch.randn(4, 2, 5), torch.randn(4, 2, 6), 1.0, False)], "experts.w")
    wrong: list[Any] = [
        lambda: own + 1, lambda: torch.randn(4, 6, 5) + own, lambda: torch.relu(own), lambda: own.sum(),
        lambda: own.clone(), lambda: torch.einsum("eoi,ei->eo", own, torch.randn(4, 5)), lambda: own.data,
        lambda: own[:2], lambda: own[0][0], lambda: own.transpose(0, 1), lambda: torch.stack([own[0]]),
        lambda: torch.nn.functional.linear(own[0], torch.randn(3, 5)), lambda: own.view(-1),
    ]  # fmt: skip
    for ask in wrong:
        with pytest.raises((LoRAUnsupportedError, TypeError)):
            ask()
    assert (own.shape, own.dtype, own.size(0), own.dim()) == (weight.shape, weight.dtype, 4, 3)


# ---- adapters from before transformers 5 -----------------------------------------------------------------------------

OLD = {
    "mixtral": ("block_sparse_moe", {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}),
    "qwen3": ("mlp", {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}),
}
PLACE = {"w1": (0, 0), "gate_proj": (0, 0), "w3": (0, 1), "up_proj": (0, 1), "w2": (1, 0), "down_proj": (1, 0)}


def older(peft: Any, folder: Any, name: str, skipped: tuple[tuple[int, int], ...] = (), **fields: Any) -> Any:
    """An adapter with a pair for each expert's layers, and the base with its ΔW in the weights."""
    block, layers = OLD[name]
    generator, tensors, model = torch.Generator().manual_seed(5), {}, build(name)
    for layer in range(2):
        for expert in range(4):
            for number, (key, (out, wide)) in enumerate(layers.items()):
                if (expert, number) in skipped:
                    continue
                A, B = torch.randn(3, wide, generator=generator), 0.1 * torch.randn(out, 3, generator=generator)
                path = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{key}"
                tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
                parameter, part = PLACE[key]
                weight = model.get_parameter(f"model.layers.{layer}.{BOTH[parameter]}")
                weight.data[expert, part * out : (part + 1) * out] += 2 * B @ A
    save_file(tensors, folder / "adapter_model.safetensors")
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": list(layers), **fields}).to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items() if k != "runtime_config"}
    (folder / "adapter_config.json").write_text(json.dumps(config, default=str).replace('"PeftType.LORA"', '"LORA"'))
    return model


@pytest.mark.parametrize("name", OLD)
def test_adapters_of_each_experts_layers_load_where_they_were_fused(peft: Any, tmp_path: Any, name: str) -> None:
    expected = logits(older(peft, tmp_path, name), ids())
    model = build(name)
    model.load_lora(tmp_path, name="x")
    assert close(logits(model, ids()), expected)
    assert close(logits(peft.PeftModel.from_pretrained(build(name), tmp_path), ids()), expected)
    model.save_lora(tmp_path / "now")
    assert close(logits(peft.PeftModel.from_pretrained(build(name), tmp_path / "now"), ids()), expected)


def test_some_of_their_layers_and_dropout(peft: Any, tmp_path: Any) -> None:
    skipped = ((1, 0), (2, 1), (3, 0), (3, 1))  # of expert 3 nothing in gate_up_proj; PEFT refuses these
    expected = logits(older(peft, tmp_path, "mixtral", skipped, lora_dropout=0.1), ids())
    model = build("mixtral")
    model.load_lora(tmp_path, name="x")
    assert close(logits(model, ids()), expected)
    with pytest.raises(LoRAUnsupportedError, match="dropout"):
        model.load_lora(tmp_path, name="y", trainable=True)


def test_their_routers_are_refused(peft: Any, tmp_path: Any) -> None:
    model = build("mixtral")
    older(peft, tmp_path, "mixtral")
    value = LoRAAdapter.load(tmp_path)
    path = "model.layers.0.block_sparse_moe.gate"
    pair = hf_lora.LoRAAdapter.load(tmp_path).factors["model.layers.0.block_sparse_moe.experts.0.w1"]
    import dataclasses

    with pytest.raises(LoRAMismatchError, match="Router"):
        model.load_lora(dataclasses.replace(value, factors={**value.factors, path: pair}), name="x")
