"""A compiled model takes new adapters without compiling anew, within the room that reserve_lora() made."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import oracles
import pytest
import torch
from oracles import disturb, inputs, logits
from torch import nn

from hf_lora import LoRAConfig
from hf_lora.errors import LoRAMismatchError, LoRAStateError, LoRATargetError
from hf_lora.layers import LoRALinear

FIRST = {"r": 4, "target_modules": ["q", "v"]}
OTHERS = (
    {"r": 8, "alpha": 3, "target_modules": ["q", "v"]},  # another rank and scaling
    {"r": 2, "target_modules": ["q"]},  # fewer layers
    {"r": 16, "alpha": 64, "use_rslora": True, "target_modules": ["down", "k"]},  # none that had one before
    {"r": 1, "target_modules": ["down"], "layers_to_transform": [0]},
)


def build(family: str, **options: Any) -> Any:
    """A model of one layer: tracing takes time by layers."""
    model = oracles.build(family, **options)
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    del layers[1:]
    model.config.num_hidden_layers = 1
    return model


def adapter(seed: int, family: str = "llama", **fields: Any) -> Any:
    model = build(family)
    torch.manual_seed(seed)
    model.add_lora(LoRAConfig(**fields))
    disturb(model, seed=seed)
    return model.lora_adapter()


def alone(value: Any, batch: Any, family: str = "llama") -> torch.Tensor:
    """What a model computes that was never compiled, and had no other adapter and no room."""
    model = build(family)
    model.load_lora(value, name="x")
    return logits(model, batch)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize(("family", "targets"), [("llama", "all-linear"), ("gpt2", ["q", "v", "k", "down"])])
def test_swaps_compile_nothing(family: str, targets: Any) -> None:
    model = build(family)
    batch = inputs(model)
    model.reserve_lora(slots=1, rank=16, targets=targets)
    model.load_lora(adapter(1, family, **FIRST), name="task")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits(compiled, batch)
    assert graphs() == 1
    for seed, fields in enumerate((*OTHERS, FIRST), 2):
        value = adapter(seed, family, **fields)
        model.load_lora(value, name="task", replace=True)
        assert close(logits(compiled, batch), alone(value, batch, family))
    assert model.lora_names == ("task",)
    assert graphs() == 1


def test_several_adapters_are_swapped_mixed_and_routed() -> None:
    model = build("llama")
    batch = inputs(model)
    model.load_lora(adapter(1, **FIRST), name="a")
    model.reserve_lora(slots=3, rank=16, targets=["q", "k", "v", "down"])
    for name in ("b", "c"):
        model.load_lora(adapter(2, **FIRST), name=name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with model.route_lora(["a", None, "b"]):
        logits(compiled, batch)
    model.set_lora({"a": 0.5, "b": 0.5})
    logits(compiled, batch)
    warm = graphs()
    values = {name: adapter(seed, **fields) for seed, (name, fields) in enumerate(zip("abc", OTHERS, strict=False), 3)}
    for name, value in values.items():
        model.load_lora(value, name=name, replace=True)
    with model.route_lora(["c", None, "a"]):
        found = logits(compiled, batch)
    assert close(found[0], alone(values["c"], batch)[0])
    assert close(found[1], logits(build("llama"), batch)[1])
    assert close(found[2], alone(values["a"], batch)[2])
    model.set_lora({"a": 0.25, "c": 2.0})
    assert close(logits(compiled, batch), logits(model, batch))
    assert graphs() == warm == 1


def test_files_of_peft_are_swapped(peft: Any, tmp_path: Any) -> None:
    model = build("llama", dtype=torch.float64)
    batch = inputs(model)
    model.reserve_lora(1, 8, ["q_proj", "up_proj", "v_proj", "o_proj"])
    compiled, expected = torch.compile(model, backend="eager", fullgraph=True), []
    for i, (rank, targets) in enumerate(((8, ["q_proj"]), (2, ["up_proj", "v_proj"]), (5, ["o_proj"]))):
        made = peft.get_peft_model(
            build("llama", dtype=torch.float64), peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets)
        )
        disturb(made, seed=i)
        made.save_pretrained(tmp_path / str(i))
        expected.append(logits(made.eval(), batch))
    for i, theirs in enumerate(expected):
        model.load_lora(tmp_path / str(i), name="task", replace=i > 0)
        assert (logits(compiled, batch) - theirs).abs().max() <= 1e-12 * theirs.abs().max()
    assert graphs() == 1


def test_more_than_the_room_is_still_right_and_costs_one_graph() -> None:
    model = build("llama")
    batch = inputs(model)
    model.reserve_lora(1, 4, ["q", "v"])
    model.load_lora(adapter(1, **FIRST), name="task")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits(compiled, batch)
    value = adapter(2, r=16, target_modules=["q", "down"])
    model.load_lora(value, name="task", replace=True)
    assert close(logits(compiled, batch), alone(value, batch))
    assert graphs() == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_room_changes_nothing_and_goes_again(when: str) -> None:
    model = build("llama")
    batch, value = inputs(model), adapter(1, **FIRST)
    classes, attributes = [type(m) for m in model.modules()], set(vars(model))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if when == "before":
        model.reserve_lora(2, 8, "all-linear")
        assert [type(m) for m in model.modules()] == classes  # a note; layers are made with the first adapter
    model.load_lora(value, name="a")
    if when == "after":
        model.reserve_lora(2, 8, "all-linear")
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 7
    assert torch.equal(logits(model, batch), alone(value, batch))
    assert model.lora_adapter("a").factors.keys() == value.factors.keys()
    for moved in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(moved, batch), logits(model, batch))
    assert "lora_slots" not in "".join(model.state_dict())
    model.merge_lora()
    model.unmerge_lora()
    model.remove_lora("a")
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.load_lora(value, name="b")  # what was reserved is still
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 7
    model.reserve_lora(None)
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 2
    model.remove_lora()
    assert [type(m) for m in model.modules()] == classes
    assert set(vars(model)) == attributes


def test_a_first_adapter_that_fails_leaves_no_room_behind(monkeypatch: Any) -> None:
    from hf_lora.slots import LoRASlots

    model, value = build("llama"), adapter(1, **FIRST)
    classes = [type(m) for m in model.modules()]
    model.reserve_lora(1, 4, "all-linear")
    reserve = LoRASlots.reserve

    def failing(self: Any, *args: Any, **options: Any) -> None:
        if self.out_features == 48:
            raise MemoryError
        reserve(self, *args, **options)

    monkeypatch.setattr(LoRASlots, "reserve", failing)
    with pytest.raises(MemoryError):
        model.load_lora(value, name="a")
    assert [type(m) for m in model.modules()] == classes
    assert not hasattr(model, "_lora_state")


def test_training_beside_room() -> None:
    model = build("llama")
    model.reserve_lora(1, 4, "all-linear")
    model.add_lora(LoRAConfig(**FIRST))
    model.train()(**inputs(model), labels=inputs(model)["input_ids"]).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 4
    assert all(grad is not None for grad in grads)


def test_what_is_no_room() -> None:
    model = build("llama")
    for slots, rank in ((0, 4), (2, 0), (True, 4), (2, 1.5), ("2", 4)):
        with pytest.raises(LoRAStateError, match="positive"):
            model.reserve_lora(slots, rank)
    with pytest.raises(LoRATargetError, match="q_pro"):
        model.reserve_lora(1, 4, ["q_pro"])
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    model.load_lora(adapter(1, **FIRST), name="a")
    model.merge_lora()
    with pytest.raises(LoRAStateError, match="merged"):
        model.reserve_lora(1, 4, "all-linear")
    model.unmerge_lora()
    with model.use_lora("a"), pytest.raises(LoRAStateError, match="with block"):
        model.reserve_lora(1, 4, "all-linear")
    model.reserve_lora(1, 4, ["lm_head"])
    with pytest.raises(LoRAMismatchError, match="reserve_lora"):
        model.add_lora(LoRAConfig(r=2, target_modules=["q"], modules_to_save=["lm_head"]), "whole")


def test_transformers_own_verb_reserves() -> None:
    model = build("llama")
    batch = inputs(model)
    model.load_lora(adapter(1, **FIRST), name="task")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.enable_peft_hotswap(target_rank=16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits(compiled, batch)
    value = adapter(2, **{**FIRST, "r": 16})
    model.load_lora(value, name="task", replace=True)
    assert close(logits(compiled, batch), alone(value, batch))
    assert graphs() == 1


def test_the_layers_of_a_plain_module_can_have_room() -> None:
    from hf_lora.model import add, reserve

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    add(model, LoRAConfig(r=2, target_modules=["0"]), trainable=False)
    reserve(model, 2, 4, ["0", "2"])
    assert isinstance(model[2], LoRALinear)
    assert model[2](torch.ones(1, 4)).shape == (1, 4)


def test_room_without_a_rank_is_refused(tiny: Any) -> None:
    model = tiny("llama")
    for slots, rank in ((4, None), (0, 4), (4, 0)):
        with pytest.raises(LoRAStateError, match="room is reserved"):
            model.reserve_lora(slots, rank)
