"""accelerate's save_state and load_state: what they write of a model with a LoRA, and that resuming is bit-exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import bits
from safetensors import safe_open

from hf_lora import LoRAConfig, LoRAMismatchError, LoRAUnsupportedError, optimizer_groups
from hf_lora.integrations.accelerate import save_adapters_alone

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")

BATCHES = [torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(k)) for k in range(6)]


def with_loras(tiny: Any, *, heads: bool = False) -> Any:
    model = tiny("llama")
    torch.manual_seed(3)
    model.add_lora(LoRAConfig(r=2, target_modules=["down"]), "first")
    more = {"modules_to_save": ["lm_head"], "bias": "all"} if heads else {}
    model.add_lora(LoRAConfig(r=4, target_modules=["q", "v"], dropout=0.1, **more), "second")
    if not heads:
        model.train_lora(["first", "second"])
        model.set_lora(["first", "second"])
    return model.train()


class Loop:
    """A loop as accelerate's documentation writes it."""

    def __init__(self, model: Any, *, alone: bool, **options: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        optimizer = torch.optim.AdamW(optimizer_groups(model, 1e-2, b_lr_ratio=2))
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        if alone:
            save_adapters_alone(self.accelerator)

    def run(self, batches: list[torch.Tensor]) -> list[float]:
        losses = []
        for ids in batches:
            with self.accelerator.accumulate(self.model):
                loss = self.model(input_ids=ids, labels=ids).loss
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses


def keys(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


@pytest.mark.parametrize("heads", [False, True], ids=["two adapters", "head and biases"])
@pytest.mark.parametrize("alone", [False, True], ids=["whole model", "adapters alone"])
def test_resuming_is_bit_exact(tiny: Any, tmp_path: Path, alone: bool, heads: bool) -> None:
    model = with_loras(tiny, heads=heads)
    torch.manual_seed(1)
    loop = Loop(model, alone=alone)
    loop.run(BATCHES[:3])
    loop.accelerator.save_state(str(tmp_path / "state"))
    losses = loop.run(BATCHES[3:])
    again = with_loras(tiny, heads=heads)
    torch.manual_seed(2)
    resumed = Loop(again, alone=alone)
    resumed.accelerator.load_state(str(tmp_path / "state"))
    assert resumed.run(BATCHES[3:]) == losses
    assert bits(again) == bits(model)


def test_what_is_written(tiny: Any, tmp_path: Path) -> None:
    """Stock save_state writes the base with the adapters; with the hook the adapters alone, as PEFT reads them."""
    Loop(with_loras(tiny), alone=False).accelerator.save_state(str(tmp_path / "whole"))
    whole = keys(tmp_path / "whole" / "model.safetensors")
    assert "model.embed_tokens.weight" in whole
    assert any(".lora_slots." in key for key in whole)
    Loop(with_loras(tiny), alone=True).accelerator.save_state(str(tmp_path / "alone"))
    names = {str(p.relative_to(tmp_path / "alone")) for p in (tmp_path / "alone").rglob("*") if p.is_file()}
    adapters = {f"lora-{name}/{file}" for name in ("first", "second") for file in FILES}
    assert names == {*adapters, "optimizer.bin", "scheduler.bin", "random_states_0.pkl"}
    other = tiny("llama")
    other.load_lora(tmp_path / "alone" / "lora-second")


FILES = ("adapter_config.json", "adapter_model.safetensors")


def test_one_adapter_lies_in_the_folder_itself_and_loads_elsewhere(tiny: Any, tmp_path: Path, peft: Any) -> None:
    model = with_loras(tiny, heads=True)
    loop = Loop(model, alone=True)
    loop.run(BATCHES[:2])
    loop.accelerator.save_state(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=BATCHES[0]).logits
        torch.testing.assert_close(theirs(input_ids=BATCHES[0]).logits, expected)


def test_models_beside_it_are_saved_as_ever(tiny: Any, tmp_path: Path) -> None:
    def build() -> tuple[Any, Any, Any, Any]:
        accelerator = accelerate.Accelerator(cpu=True)
        first, plain, second = with_loras(tiny), torch.nn.Linear(3, 3), with_loras(tiny, heads=True)
        accelerator.prepare(first, plain, second)
        save_adapters_alone(accelerator)
        return accelerator, first, plain, second

    accelerator, *models = build()
    for model in models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data)
    accelerator.save_state(str(tmp_path))
    assert (tmp_path / "model_2" / "adapter_model.safetensors").exists()
    accelerator, *others = build()
    accelerator.load_state(str(tmp_path))
    assert [bits(model) for model in others] == [bits(model) for model in models]


def test_asking_for_it_twice_changes_nothing(tiny: Any, tmp_path: Path) -> None:
    loop = Loop(with_loras(tiny), alone=True)
    save_adapters_alone(loop.accelerator)
    loop.accelerator.save_state(str(tmp_path))
    loop.accelerator.load_state(str(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()


def test_another_adapters_checkpoint_is_refused(tiny: Any, tmp_path: Path) -> None:
    Loop(with_loras(tiny, heads=True), alone=True).accelerator.save_state(str(tmp_path))
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=8, target_modules=["q"]), "second")
    before = bits(model)
    with pytest.raises(LoRAMismatchError):
        Loop(model, alone=True).accelerator.load_state(str(tmp_path))
    assert bits(model) == before


def test_where_accelerate_saves_models_itself_it_is_refused(tiny: Any, tmp_path: Path) -> None:
    loop = Loop(with_loras(tiny), alone=True)
    (hook,) = loop.accelerator._save_model_state_pre_hook.values()
    with pytest.raises(LoRAUnsupportedError, match="does not reach models"):
        hook(loop.accelerator._models, [], str(tmp_path))  # as under FSDP: no weights are handed over
    (hook,) = loop.accelerator._load_model_state_pre_hook.values()
    with pytest.raises(LoRAUnsupportedError, match="does not reach models"):
        hook([], str(tmp_path))


def test_accumulation_through_accelerate_equals_the_large_batch(tiny: Any) -> None:
    small, large = with_loras(tiny, heads=True), with_loras(tiny, heads=True)
    for model in (small, large):
        model.eval()  # no dropout: the two draw different masks
    loop = Loop(small, alone=False, gradient_accumulation_steps=2)
    loop.run([BATCHES[0][:2], BATCHES[0][2:]])
    Loop(large, alone=False).run([BATCHES[0]])
    for path, parameter in small.named_parameters():
        torch.testing.assert_close(parameter, large.get_parameter(path), rtol=2e-3, atol=2e-4)
