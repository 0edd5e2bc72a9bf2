"""A plain PyTorch loop: what trains, what gets gradients, resuming, accumulation and autocast."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import bits, randomise

from hf_lora import LoRAConfig, optimizer_groups

BATCHES = [torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(k)) for k in range(6)]


def two(tiny: Any, **options: Any) -> Any:
    model = tiny("llama")
    torch.manual_seed(3)
    model.add_lora(LoRAConfig(r=2, target_modules=["q", "down"]), "first")
    randomise(model, 1)
    model.add_lora(LoRAConfig(**{"r": 4, "target_modules": ["q", "v"], **options}), "second")
    randomise(model, 2)
    return model.train()


def step(model: Any, optimizer: Any, ids: torch.Tensor) -> float:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def adamw(model: Any, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(optimizer_groups(model, lr))


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}


# ---- one over another ------------------------------------------------------------------------------------------------


def test_one_adapter_trains_over_another_that_is_active_and_frozen(tiny: Any) -> None:
    """Its gradient is that on a base whose weights hold the frozen one."""
    model = two(tiny)
    model.train_lora("second")
    model.set_lora(["first", "second"])
    assert [e.trainable for e in model._lora_state.entries.values()] == [False, True]
    frozen = model.lora_state_dict("first")
    found = gradients(model, BATCHES[0])
    oracle = tiny("llama").double().train()  # first by hand, second alone
    with torch.no_grad():
        for path, factors in _factors(model, "first").items():
            oracle.get_submodule(path).weight += factors.delta().double()
    oracle.load_lora(model.lora_adapter("second"), name="second", trainable=True)
    expected = gradients(oracle, BATCHES[0])
    assert len(found) == len(expected) == 2 * 2 * 2
    for path, grad in expected.items():
        (mine,) = [g for other, g in found.items() if _layer(other) == _layer(path)]
        torch.testing.assert_close(mine, grad, rtol=1e-4, atol=1e-7)
    before = bits(model)
    step(model, adamw(model), BATCHES[0])
    changed = {key for key, value in bits(model).items() if value != before[key]}
    assert changed == set(found)
    after = model.lora_state_dict("first")
    assert all(torch.equal(after[key], frozen[key]) for key in frozen)


def _layer(path: str) -> str:
    """Without the slot's number."""
    return path.rstrip("0123456789")


def _factors(model: Any, name: str) -> Any:
    from hf_lora.model import read

    return read(model, name).factors


def test_what_is_trainable_and_not_active_gets_no_gradient(tiny: Any) -> None:
    model = two(tiny)
    model.train_lora(["first", "second"])
    model.set_lora("second")
    paths = gradients(model, BATCHES[0])
    assert paths
    assert not [path for path in paths if "down_proj" in path]
    before = model.lora_state_dict("first")
    step(model, adamw(model), BATCHES[0])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.lora_state_dict("first").items())


def test_two_adapters_train_together(tiny: Any) -> None:
    model = two(tiny)
    model.train_lora(["first", "second"])
    model.set_lora(["first", "second"])
    before = {name: model.lora_state_dict(name) for name in ("first", "second")}
    base = {key: value for key, value in bits(model).items() if "lora_" not in key}
    optimizer = adamw(model)
    losses = [step(model, optimizer, BATCHES[0]) for _ in range(4)]
    assert losses[-1] < losses[0]
    for name, tensors in before.items():
        assert all(not torch.equal(tensor, tensors[key]) for key, tensor in model.lora_state_dict(name).items())
    assert {key: value for key, value in bits(model).items() if "lora_" not in key} == base


def test_a_mixtures_weights_scale_the_gradients(tiny: Any) -> None:
    """∂loss/∂B at B = 0 is proportional to the adapter's weight in the mixture."""
    model = tiny("llama")
    torch.manual_seed(3)
    model.add_lora(LoRAConfig(r=4, target_modules=["q"]), "task")
    whole = gradients(model, BATCHES[0])
    model.set_lora({"task": 0.25})
    part = gradients(model, BATCHES[0])
    for path, grad in whole.items():
        torch.testing.assert_close(part[path], 0.25 * grad)


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [False, True], ids=["factors", "head and biases"])
def test_resuming_a_loop_is_bit_exact(tiny: Any, tmp_path: Path, heads: bool) -> None:
    def build() -> Any:
        more = {"modules_to_save": ["lm_head"], "bias": "all"} if heads else {}
        return two(tiny, dropout=0.1, **more)

    model = build()
    optimizer = adamw(model)
    for ids in BATCHES[:3]:
        step(model, optimizer, ids)
    model.save_lora(tmp_path, "second")
    torch.save({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, tmp_path / "loop.pt")
    losses = [step(model, optimizer, ids) for ids in BATCHES[3:]]

    again = tiny("llama")
    torch.manual_seed(9)
    again.add_lora(LoRAConfig(r=2, target_modules=["q", "down"]), "first")
    again.load_lora(tmp_path, name="second", trainable=True)
    again.train_lora("second")
    again.set_lora("second")
    optimizer = adamw(again.train())
    saved = torch.load(tmp_path / "loop.pt", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    assert [step(again, optimizer, ids) for ids in BATCHES[3:]] == losses
    found, expected = again.lora_state_dict("second"), model.lora_state_dict("second")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# ---- accumulation, autocast ------------------------------------------------------------------------------------------


def test_accumulated_gradients_are_those_of_the_large_batch(tiny: Any) -> None:
    model = two(tiny)
    whole = gradients(model, BATCHES[0])
    model.zero_grad()
    for part in BATCHES[0].chunk(4):
        (model(input_ids=part, labels=part).loss / 4).backward()
    for path, grad in whole.items():
        torch.testing.assert_close(model.get_parameter(path).grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_float32_factors_and_is_near_float32(tiny: Any, dtype: torch.dtype) -> None:
    model = two(tiny).to(dtype) if dtype == torch.float32 else two_in(tiny, dtype)
    exact = gradients(two(tiny), BATCHES[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=BATCHES[0], labels=BATCHES[0]).loss
    loss.backward()
    for path, grad in exact.items():
        parameter = model.get_parameter(path)
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(parameter.grad.flatten(), grad.flatten(), 0)
        assert cosine > 0.99, path
        assert parameter.grad.norm() == pytest.approx(float(grad.norm()), rel=0.1)
    optimizer = adamw(model)
    optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def two_in(tiny: Any, dtype: torch.dtype) -> Any:
    """The same adapters on a base of another dtype."""
    source = two(tiny)
    model = tiny("llama", dtype=dtype)
    for name in ("first", "second"):
        model.load_lora(source.lora_adapter(name), name=name, trainable=True)
    model.train_lora("second")
    model.set_lora("second")
    return model.train()


def test_activation_checkpointing_gives_the_same_gradients(tiny: Any) -> None:
    model = two(tiny)
    model.set_lora(["first", "second"])
    plain = gradients(copy.deepcopy(model), BATCHES[0])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for path, grad in gradients(model, BATCHES[0]).items():
        torch.testing.assert_close(grad, plain[path])
