"""One test for each promise of the design, named after it; each would fail without what it promises.

(Atomic saving and what a hostile Hub file can do stand in test_store and test_hostile_files.)
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    FAMILIES,
    Snapshot,
    assert_apart,
    assert_close,
    bits,
    build,
    disturb,
    error,
    inputs,
    logits,
    merged,
    same_bits,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lora import (
    LoRAAdapter,
    LoRAConfig,
    LoRAError,
    LoRAFileError,
    LoRAMismatchError,
    LoRANameError,
    LoRAStateError,
    LoRATargetError,
    LoRAUnsupportedError,
)

ROUND = (torch.float32, torch.float16, torch.bfloat16)


def adapter(family: str, folder: Path, *, seed: int = 1, **fields: Any) -> Path:
    """A folder with a random adapter for the family's model."""
    model = build(family)
    model.add_lora(LoRAConfig(**{"r": 3, "alpha": 6, "target_modules": ["q", "v"], **fields}))
    disturb(model, seed=seed, std=0.1)
    return model.save_lora(folder)


# ---- At step 0 finite logits equal the base's (torch.equal); after remove_lora the whole state dict does, bit for bit


@pytest.mark.parametrize("targets", [["q", "v"], "all-linear"], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_at_step_0_logits_equal_the_bases_and_after_remove_the_model_is_the_base(family: str, targets: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = build(family, dtype=dtype)
        before, batch = Snapshot(model), inputs(model)
        plain = logits(model, batch)
        for name, init in (("one", "kaiming"), ("two", "gaussian")):
            model.add_lora(LoRAConfig(r=2, target_modules=targets, init=init, bias="all", use_rslora=True), name)
            assert bool(plain.isfinite().all())
            assert torch.equal(logits(model, batch), plain)
        with model.route_lora(["one", None, "two"]):  # a head's copy runs on its rows alone, which may round otherwise
            assert_close(logits(model, batch), plain, dtype)
        disturb(model)
        assert not torch.equal(logits(model, batch), plain)
        model.remove_lora("one")
        model.remove_lora("two")
        before.assert_same(model)
        assert torch.equal(logits(model, batch), plain)


def test_after_training_and_removal_the_base_is_as_it_was_bit_for_bit() -> None:
    model = build("bert-cls")
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)  # what trained before is what trains after
    before, batch = Snapshot(model), inputs(model)
    model.add_lora(LoRAConfig(r=2, target_modules=["q", "v"], bias="all", task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    first = None
    for _ in range(8):
        loss = model(**batch, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = loss.item() if first is None else first
    assert loss.item() < 0.5 * first
    before.assert_weights(model)
    model.remove_lora()
    before.assert_same(model)


@pytest.mark.parametrize("dtype", ROUND, ids=str)
def test_odd_bits_of_the_base_survive_minus_zero_nan_and_subnormals(dtype: torch.dtype) -> None:
    model = build("llama", dtype=dtype)
    weight = model.model.layers[0].self_attn.k_proj.weight.data
    weight[0, :4] = torch.tensor([-0.0, float("nan"), 1e-7 if dtype == torch.float16 else 1e-40, -float("inf")])
    before = Snapshot(model)
    model.add_lora(LoRAConfig(r=2, target_modules="all-linear"))
    disturb(model)
    model.eval().merge_lora()
    model.unmerge_lora()
    before.assert_weights(model)
    model.remove_lora()
    before.assert_same(model)


# ---- Forward, merged forward, routed forward and PEFT's forward on the same files agree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("gpt2", {"target_modules": ["q", "v", "mlp"], "use_rslora": True}),
        ("gemma3", {"target_modules": ["q", "v"], "alpha": 16}),
        ("bert-cls", {"target_modules": ["query", "value"], "bias": "all", "task_type": "SEQ_CLS"}),
        ("bart", {"target_modules": ["attention"], "alpha": 16}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_forward_merged_routed_and_pefts_forward_on_the_same_files_agree(
    family: str, fields: dict[str, Any], dtype: torch.dtype, peft: Any, tmp_path: Path
) -> None:
    adapter(family, tmp_path / "a", **fields)
    model, batch = build(family, dtype=dtype), inputs(build(family))
    plain = logits(model, batch)
    model.load_lora(tmp_path / "a")
    forward = logits(model, batch)
    with model.route_lora(["a", "a", "a"]):
        routed = logits(model, batch)
    model.merge_lora()
    in_weights = logits(model, batch)
    model.remove_lora()
    theirs = logits(peft.PeftModel.from_pretrained(model, str(tmp_path / "a")).eval().get_base_model(), batch)
    truth = logits(merged(build(family, dtype=dtype), tmp_path / "a"), batch)
    assert_apart(truth, plain, dtype)
    found = {"forward": forward, "routed": routed, "merged": in_weights, "PEFT": theirs}
    for what, result in found.items():
        assert_close(result, truth, dtype, what)
        assert_close(result, theirs, dtype, f"{what} and PEFT")


# ---- merge → unmerge restores every bit, any number of cycles and adapters; non-finite changes nothing; B after A


@pytest.mark.parametrize("dtype", ROUND, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-cls"])
def test_merge_and_unmerge_restore_every_bit_after_many_cycles_and_adapters(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    extra = {"bias": "lora_only", "task_type": "SEQ_CLS"} if family == "bert-cls" else {}
    model = build(family, dtype=dtype)
    before, batch, names = Snapshot(model), inputs(model), []
    for seed in range(5):
        targets = "all-linear" if seed % 2 else ["q", "v"]
        folder = adapter(family, tmp_path / f"task-{seed}", seed=seed, r=1 + seed % 3, target_modules=targets, **extra)
        names.append(model.load_lora(folder))
    expected = {}
    for name in names:
        model.set_lora(name)
        expected[name] = logits(model, batch)
    for cycle in range(30):
        name = names[cycle % len(names)]
        model.merge_lora(name)
        if cycle < len(names):
            assert_close(logits(model, batch), expected[name], dtype)
            changed = [key for key, tensor in before.state.items() if not same_bits(model.state_dict()[key], tensor)]
            assert changed, "the merge did not reach the weights"
        model.unmerge_lora()
        before.assert_weights(model)
    if not extra:
        for weights in ({names[0]: 0.7, names[1]: -1.3}, dict.fromkeys(names, 1.0)):
            model.set_lora(weights)
            mixed = logits(model, batch)
            model.merge_lora()
            assert_close(logits(model, batch), mixed, dtype)
            model.unmerge_lora()
            before.assert_weights(model)
    model.merge_lora(names[0])
    model.remove_lora()  # unmerges first
    before.assert_same(model)


@pytest.mark.parametrize("dtype", ROUND, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_every_bit_comes_back_whatever_the_size_of_the_change(dtype: torch.dtype, scale: float) -> None:
    model = build("llama", dtype=dtype)
    before = Snapshot(model)
    model.add_lora(LoRAConfig(r=4, target_modules="all-linear"))
    disturb(model, std=scale**0.5)
    model.eval().merge_lora()
    model.unmerge_lora()
    before.assert_weights(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_merge_of_a_non_finite_adapter_changes_nothing(bad: float, where: str) -> None:
    model = build("llama")
    model.add_lora(LoRAConfig(r=2, target_modules="all-linear"))
    disturb(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[0 if where == "first" else -1].data[0, 0] = bad
    before = Snapshot(model)
    with pytest.raises(LoRAError):
        model.eval().merge_lora()
    before.assert_same(model)
    with pytest.raises(LoRAStateError):
        model.unmerge_lora()  # nothing is merged
    model.set_lora(None)


@pytest.mark.parametrize("leaf", ["bias", "classifier"])
def test_a_merge_of_a_non_finite_bias_or_head_changes_nothing(leaf: str) -> None:
    model = build("bert-cls")
    model.add_lora(LoRAConfig(r=2, target_modules=["q", "v"], bias="lora_only"))
    disturb(model)
    named = [(path, p) for path, p in model.named_parameters() if p.requires_grad]
    next(p for path, p in named if leaf in path and ("lora_slots" in path) == (leaf == "bias")).data.view(-1)[1] = (
        float("nan")
    )
    before = Snapshot(model)
    with pytest.raises(LoRAError):
        model.eval().merge_lora()
    before.assert_same(model)
    model.set_lora(None)


def test_a_merge_that_would_overflow_changes_nothing() -> None:
    model = build("llama", dtype=torch.float16)
    model.add_lora(LoRAConfig(r=2, target_modules="all-linear"))
    disturb(model, std=300)
    before = Snapshot(model)
    with pytest.raises(LoRAStateError, match="overflow"):
        model.eval().merge_lora()
    before.assert_same(model)


@pytest.mark.parametrize("dtype", ROUND, ids=str)
def test_merging_task_b_after_a_equals_merging_b_fresh(dtype: torch.dtype, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        adapter("llama", tmp_path / name, seed=seed, target_modules="all-linear")
    used, fresh = build("llama", dtype=dtype), build("llama", dtype=dtype)
    used.load_lora(tmp_path / "a")
    used.load_lora(tmp_path / "b")
    fresh.load_lora(tmp_path / "b")
    used.merge_lora("a")
    used.unmerge_lora()
    used.merge_lora("b")
    fresh.merge_lora("b")
    one, other = dict(used.named_parameters()), dict(fresh.named_parameters())
    base = dict(build("llama").named_parameters())
    assert all(same_bits(one[key], other[key]) for key in base)


def test_a_merge_keeps_no_second_copy_of_the_weights() -> None:
    model = build("llama", dtype=torch.bfloat16)
    model.add_lora(LoRAConfig(r=1, target_modules="all-linear"))
    disturb(model, std=0.02)
    model.eval()
    tensors = _tensors_reachable(model)
    model.merge_lora()
    kept = [t for key, t in _tensors_reachable(model).items() if key not in tensors]
    weights = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear) and hasattr(m, "lora_slots"))
    assert 0 < sum(t.nbytes for t in kept) < 0.6 * weights


def _tensors_reachable(model: nn.Module) -> dict[int, Tensor]:
    import gc

    gc.collect()
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    queue: list[Any] = [model.__dict__]
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, (type, str, int, float)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found[item.untyped_storage().data_ptr()] = item
        elif isinstance(item, dict):
            queue += item.values()
        elif isinstance(item, (list, tuple, set)):
            queue += item
        elif hasattr(item, "__dict__"):
            queue.append(vars(item))
    return found


# ---- Loading is all or nothing


def _drop(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    gone = sorted(key for key in tensors if "layers.1" in key and "q_proj.lora_B" in key)
    for key in gone:
        del tensors[key]
    return ["layers.1.self_attn.q_proj", "lora_B"]


def _drop_pair(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    for key in [key for key in tensors if "layers.1.self_attn.v_proj" in key]:
        del tensors[key]
    return ["model.layers.1.self_attn.v_proj"]


def _drop_head(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    config["modules_to_save"] = ["lm_head"]
    return ["lm_head"]


def _extra(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.ones(3, 32)
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight"] = torch.ones(32, 3)
    return ["model.layers.7.self_attn.q_proj"]


def _unknown(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = torch.ones(3, 32)
    return ["lora_C"]


def _shape_in(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    key = next(key for key in tensors if "layers.1" in key and "v_proj.lora_A" in key)
    tensors[key] = torch.ones(3, 31)
    return ["model.layers.1.self_attn.v_proj", "31"]


def _shape_out(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    for key in [key for key in tensors if "v_proj.lora_B" in key]:
        tensors[key] = torch.ones(17, 3)
    return ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "17"]


def _rank(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    config["r"] = 5
    return ["rank", "5", "3"]


def _not_a_number(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    key = sorted(tensors)[-1]
    tensors[key][0, 0] = float("nan")
    return [key.removeprefix("base_model.model.").split(".lora")[0]]


def _infinite(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    key = sorted(tensors)[0]
    tensors[key][-1, -1] = -float("inf")
    return [key.removeprefix("base_model.model.").split(".lora")[0]]


def _head_shape(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    config["modules_to_save"] = ["lm_head"]
    tensors["base_model.model.lm_head.weight"] = torch.ones(65, 32)
    return ["lm_head", "65"]


def _bias_without_owner(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[str]:
    config["bias"] = "all"
    tensors["base_model.model.model.layers.0.mlp.up_proj.bias"] = torch.ones(48)
    return ["mlp.up_proj"]


BROKEN: tuple[Callable[[dict[str, Tensor], dict[str, Any]], list[str]], ...] = (
    _drop,
    _drop_pair,
    _drop_head,
    _extra,
    _unknown,
    _shape_in,
    _shape_out,
    _rank,
    _not_a_number,
    _infinite,
    _head_shape,
    _bias_without_owner,
)


@pytest.mark.parametrize("resident", [False, True], ids=["first adapter", "beside another"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__.strip("_"))
def test_loading_is_all_or_nothing(broken: Any, trainable: bool, resident: bool, tmp_path: Path) -> None:
    adapter("llama", tmp_path / "good")
    tensors = load_file(str(tmp_path / "good" / "adapter_model.safetensors"))
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    listed = broken(tensors, config)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text(json.dumps(config))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, str(bad / "adapter_model.safetensors"))

    model, batch = build("llama"), inputs(build("llama"))
    if resident:
        model.load_lora(tmp_path / "good", name="good")
    before, computed = Snapshot(model), logits(model, batch)
    with pytest.raises((LoRAFileError, LoRAMismatchError, LoRAUnsupportedError)) as caught:
        model.load_lora(bad, trainable=trainable)
    for part in listed:
        assert part in str(caught.value)
    before.assert_same(model)
    assert model.lora_names == (("good",) if resident else ())
    assert torch.equal(logits(model, batch), computed)
    assert model.load_lora(tmp_path / "good", name="after", trainable=trainable) == "after"


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("part", ["A", "B"])
def test_a_value_that_is_not_finite_is_not_loaded_either(part: str, bad: float, tmp_path: Path) -> None:
    value = LoRAAdapter.load(adapter("llama", tmp_path / "task"))
    path, factors = list(value.factors.items())[-1]
    spoilt = getattr(factors, part).clone()
    spoilt[0, -1] = bad
    value = dataclasses.replace(value, factors={**value.factors, path: dataclasses.replace(factors, **{part: spoilt})})
    model = build("llama")
    before = Snapshot(model)
    with pytest.raises(LoRAMismatchError, match=path):
        model.load_lora(value)
    before.assert_same(model)


def test_factors_that_the_bases_dtype_cannot_hold_are_not_loaded(tmp_path: Path) -> None:
    tuned = build("llama")
    tuned.add_lora(LoRAConfig(r=2, target_modules=["q", "v"]))
    disturb(tuned, std=3e4)
    tuned.save_lora(tmp_path / "task")  # finite in float32, beyond 65504 in float16
    model = build("llama", dtype=torch.float16)
    before = Snapshot(model)
    with pytest.raises(LoRAError, match="float16"):
        model.load_lora(tmp_path / "task")
    before.assert_same(model)


@pytest.mark.parametrize("family", ["gpt2", "bert-cls", "qwen3", "t5"])
def test_an_adapter_of_another_base_is_refused_with_every_tensor_listed(family: str, tmp_path: Path) -> None:
    adapter("llama", tmp_path, target_modules=["q_proj", "v_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/llama"}))
    model = build(family)
    if family == "qwen3":  # the same names, another size
        import transformers

        fields = {**FAMILIES["qwen3"][2], "hidden_size": 48}
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields)).eval()
    before = Snapshot(model)
    with pytest.raises(LoRAMismatchError) as caught:
        model.load_lora(tmp_path)
    assert len(caught.value.facts) == 4
    assert "some/llama" in str(caught.value)
    before.assert_same(model)


def test_replacing_by_a_broken_adapter_keeps_the_old_one(tmp_path: Path) -> None:
    adapter("llama", tmp_path / "task")
    model, batch = build("llama"), inputs(build("llama"))
    model.load_lora(tmp_path / "task")
    before, computed = Snapshot(model), logits(model, batch)
    adapter("gpt2", tmp_path / "other" / "task", target_modules=["c_attn"])
    with pytest.raises(LoRAMismatchError):
        model.load_lora(tmp_path / "other" / "task", replace=True)
    before.assert_same(model)
    assert (model.lora_names, model.active_lora) == (("task",), "task")
    assert torch.equal(logits(model, batch), computed)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_a_failure_in_the_middle_of_writing_leaves_the_model_as_it_was(
    trainable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_lora.layers import LoRASlots

    adapter("llama", tmp_path / "task", target_modules="all-linear")
    model = build("llama")
    before, calls = Snapshot(model), Counter[str]()
    for name in ("put_frozen", "put_trainable"):
        whole = getattr(LoRASlots, name)

        def failing(self: Any, *args: Any, _whole: Any = whole) -> None:
            calls["put"] += 1
            if calls["put"] == 6:
                raise MemoryError("no room for the sixth layer")
            _whole(self, *args)

        monkeypatch.setattr(LoRASlots, name, failing)
    with pytest.raises(MemoryError):
        model.load_lora(tmp_path / "task", trainable=trainable)
    before.assert_same(model)
    assert model.lora_names == ()


# ---- A mis-spelt target raises, naming near matches; same name twice raises unless replace=True


@pytest.mark.parametrize(
    ("targets", "near"),
    [
        (["q_prj"], "q_proj"),
        (["q_proj", "v_porj"], "v_proj"),
        (["q", "v_projj"], "v_proj"),
        (["self_atn.q_proj"], "q_proj"),
        (["gate_pro"], "gate_proj"),
    ],
)
def test_a_misspelt_target_raises_and_names_near_matches(targets: list[str], near: str) -> None:
    model = build("llama")
    before = Snapshot(model)
    with pytest.raises(LoRATargetError) as caught:
        model.add_lora(LoRAConfig(r=2, target_modules=targets))
    assert near in str(caught.value)
    assert repr(targets[-1]) in str(caught.value)
    before.assert_same(model)
    assert model.lora_names == ()


def test_the_same_name_twice_raises_unless_replace_is_given(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        adapter("llama", tmp_path / name, seed=seed, alpha=6 + 10 * seed)
    model, batch = build("llama"), inputs(build("llama"))
    model.load_lora(tmp_path / "one", name="task")
    one, before = logits(model, batch), Snapshot(model)
    for again in (
        lambda: model.load_lora(tmp_path / "two", name="task"),
        lambda: model.load_lora(tmp_path / "two", name="task", trainable=True),
        lambda: model.add_lora(LoRAConfig(r=2, target_modules=["q"]), "task"),
    ):
        with pytest.raises(LoRANameError, match="'task'"):
            again()
        before.assert_same(model)
        assert torch.equal(logits(model, batch), one)
    model.load_lora(tmp_path / "two", name="task", replace=True)  # its weights and its alpha
    assert model.lora_names == ("task",)
    assert_close(logits(model, batch), logits(merged(build("llama"), tmp_path / "two"), batch))


# ---- Saving is atomic (the file-level kills are in test_store)


def test_saving_over_an_adapter_gives_the_new_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    adapter("llama", tmp_path, seed=1)
    first = LoRAAdapter.load(tmp_path)
    adapter("llama", tmp_path, seed=2, r=5, target_modules=["k"])
    second = LoRAAdapter.load(tmp_path)
    assert first.config.r == 3
    assert second.config.r == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_nothing_loaded_keeps_a_hold_on_the_file(tmp_path: Path) -> None:
    adapter("llama", tmp_path / "task")
    model, batch = build("llama"), inputs(build("llama"))
    model.load_lora(tmp_path / "task")
    computed = logits(model, batch)
    (tmp_path / "task" / "adapter_model.safetensors").write_bytes(b"\xff" * 5000)
    assert torch.equal(logits(model, batch), computed)
    model.save_lora(tmp_path / "copy")
    shutil.rmtree(tmp_path / "task")
    assert_close(logits(merged(build("llama"), tmp_path / "copy"), batch), computed)


# ---- Concurrent requests with different adapters never see each other's


@pytest.fixture
def served(tmp_path: Path) -> tuple[Any, dict[str, Tensor], dict[str | None, Tensor]]:
    """A model with four adapters, a batch, and what each adapter alone computes on it."""
    batch = inputs(build("llama"), rows=2, length=4)
    model = build("llama")
    expected: dict[str | None, Tensor] = {None: logits(model, batch)}
    for seed, name in enumerate(("a", "b", "c", "d")):
        adapter(
            "llama", tmp_path / name, seed=seed, r=1 + seed, target_modules=["q", "v"] if seed % 2 else "all-linear"
        )
        model.load_lora(tmp_path / name, trainable=name == "d")
        with model.use_lora(name):
            expected[name] = logits(model, batch)
    for name in "abcd":
        assert_apart(expected[name], expected[None])
    return model, batch, expected


def choose(model: Any, names: list[str | None], n: int) -> tuple[Any, list[str | None]]:
    """One way to ask for adapters: a route of two rows, one adapter, or none."""
    one, two = names[n % 5], names[(n * 3 + 1) % 5]
    if n % 3 == 0:
        return model.route_lora([one, two]), [one, two]
    return (model.no_lora() if one is None else model.use_lora(one)), [one, one]


def test_threads_with_different_adapters_never_see_each_others(served: Any) -> None:
    model, batch, expected = served
    names: list[str | None] = ["a", "b", None, "c", "d"]
    model.set_lora("b")
    workers = 4
    barrier = threading.Barrier(workers)

    def work(worker: int) -> list[tuple[int, int, float]]:
        wrong = []
        torch.set_num_threads(1)
        barrier.wait(timeout=60)
        for n in range(worker, 60 * workers, workers):
            block, rows = choose(model, names, n)
            with block:
                found = logits(model, batch)
            for i, name in enumerate(rows):
                if (apart := error(found[i], expected[name][i])) > 1e-5:
                    wrong.append((n, i, apart))
            if error(logits(model, batch), expected["b"]) > 1e-5:
                wrong.append((n, -1, 0.0))  # outside the block this thread has the model's default
        return wrong

    with ThreadPoolExecutor(workers) as pool:
        results = [wrong for done in pool.map(work, range(workers)) for wrong in done]
    assert not results, f"{len(results)} wrong: {results[:5]}"
    assert model.active_lora == "b"


def test_asyncio_tasks_with_different_adapters_never_see_each_others(served: Any) -> None:
    model, batch, expected = served
    names: list[str | None] = ["a", "b", None, "c", "d"]
    model.set_lora("c")
    order = random.Random(0)

    async def request(n: int) -> list[tuple[int, int]]:
        block, rows = choose(model, names, n)
        with block:
            for _ in range(order.randrange(3)):
                await asyncio.sleep(0)  # other tasks run here, with their own blocks open
            found = logits(model, batch)
            await asyncio.sleep(0)
            again = await asyncio.to_thread(logits, model, batch) if n % 10 == 0 else logits(model, batch)
        outside = logits(model, batch)
        wrong = [(n, i) for i, name in enumerate(rows) for y in (found, again) if error(y[i], expected[name][i]) > 1e-5]
        return wrong + ([(n, -1)] if error(outside, expected["c"]) > 1e-5 else [])

    async def all_requests() -> list[list[tuple[int, int]]]:
        found: list[list[tuple[int, int]]] = []
        for start in range(0, 120, 24):
            found += await asyncio.gather(*(request(n) for n in range(start, start + 24)))
        return found

    assert not [wrong for done in asyncio.run(all_requests()) for wrong in done]
    assert model.active_lora == "c"


def test_an_exception_inside_a_block_leaves_nothing_behind(served: Any) -> None:
    model, batch, expected = served
    model.set_lora("a")
    for block in (model.use_lora("b"), model.no_lora(), model.route_lora(["c", None])):
        with pytest.raises(RuntimeError, match="in the forward"), block:
            hook = model.model.layers[1].register_forward_pre_hook(_raise)
            try:
                logits(model, batch)
            finally:
                hook.remove()
        assert model.active_lora == "a"
        assert error(logits(model, batch), expected["a"]) <= 1e-5


def _raise(*args: Any) -> None:
    raise RuntimeError("in the forward")


# ---- fp32 masters on a bf16 base, compute in the base's dtype: factors are cast, never the activations

ROWS, LENGTH = 3, 11  # sizes that no weight of the model has


def is_activation(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and (tuple(tensor.shape[:2]) == (ROWS, LENGTH) or tensor.shape[0] == ROWS * LENGTH)


class Casts(TorchDispatchMode):
    """Counts conversions of activations to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and is_activation(args[0]) and result.dtype == torch.float32:
            self.found[tuple(args[0].shape)] += 1
        return result


def step(model: Any, hidden: Tensor) -> tuple[Counter[tuple[int, ...]], Counter[tuple[int, ...]], int]:
    """A forward and backward: casts of activations to float32, float32 activations saved for backward, bytes saved."""
    saved: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if is_activation(tensor):
            saved[tensor.data_ptr(), tuple(tensor.shape)] = tensor
        return tensor

    with Casts() as casts, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.model(inputs_embeds=hidden).last_hidden_state
    out.float().sum().backward()
    wide = Counter(shape for (_, shape), tensor in saved.items() if tensor.dtype == torch.float32)
    return casts.found, wide, sum(t.nbytes for t in saved.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", ["all-linear", ["q", "v"]], ids=str)
def test_fp32_masters_on_a_bf16_base_and_activations_are_never_cast(targets: Any, dropout: float) -> None:
    model = build("llama", dtype=torch.bfloat16).train()
    hidden = torch.randn(ROWS, LENGTH, 32, dtype=torch.bfloat16, requires_grad=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    base_casts, base_wide, base_bytes = step(model, hidden)
    model.add_lora(LoRAConfig(r=2, target_modules=targets, dropout=dropout))
    disturb(model)
    casts, wide, total = step(model, hidden)
    assert casts == base_casts, f"activations were cast: {casts - base_casts}"
    assert wide == base_wide, f"float32 copies of activations were saved: {wide - base_wide}"
    assert total > base_bytes
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32 for p in trained)
    assert all(p.grad.abs().max() > 0 for p in trained)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if not p.requires_grad)
    # A small update of a master that bfloat16 could not hold is kept.
    first = trained[0]
    kept = first.detach().clone()
    first.data += 1e-4 * kept.abs().max()
    assert not torch.equal(first.detach(), kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_frozen_adapter_is_cast_once_to_the_bases_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter("llama", tmp_path / "task", target_modules="all-linear")
    model, batch = build("llama", dtype=dtype), inputs(build("llama"))
    model.load_lora(tmp_path / "task")
    held = [b for path, b in model.named_buffers() if "lora" in path and b.numel()]
    assert held
    assert {buffer.dtype for buffer in held if buffer.is_floating_point()} == {dtype}

    class Any_(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.cast = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.cast += func is torch.ops.aten._to_copy.default
            return func(*args, **(kwargs or {}))

    with model.no_lora(), Any_() as base:
        logits(model, batch)
    with Any_() as ours:
        logits(model, batch)
    assert ours.cast == base.cast
    # … and what is saved from it is what was loaded, in full precision
    model.save_lora(tmp_path / "again")
    first, again = (load_file(str(tmp_path / n / "adapter_model.safetensors")) for n in ("task", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(bits(first[key]), bits(again[key])) for key in first)
