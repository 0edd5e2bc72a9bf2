"""Models that accelerate has dispatched: on several devices, on the CPU and offloaded to disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loras import logits, with_adapters

from hf_lora import LoRAConfig, LoRAUnsupportedError

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")

CONFIG = LoRAConfig(r=4, target_modules=["q", "down", "embed_tokens"], alpha=8)
PLACES = {
    "cpu": {"": "cpu"},
    "last layer on disk": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
    "all on disk": {"model": "disk", "lm_head": "disk"},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("first", ["dispatch", "lora"])
def test_a_dispatched_model_computes_and_trains_the_same(
    tiny: Any, batch: Any, tmp_path: Any, place: str, first: str
) -> None:
    whole = with_adapters(tiny("llama"), {"a": CONFIG})
    whole.save_lora(tmp_path / "adapter")
    inputs = batch(whole)
    expected, base = logits(whole, inputs), logits(tiny("llama"), inputs)
    model = tiny("llama")
    if first == "lora":
        model.load_lora(tmp_path / "adapter", name="a")
    model = accelerate.dispatch_model(
        model, PLACES[place], main_device="cpu", offload_dir=tmp_path / "weights", force_hooks=True
    )
    if first == "dispatch":
        model.load_lora(tmp_path / "adapter", name="a")
    assert torch.equal(logits(model, inputs), expected)
    with model.no_lora():
        assert torch.equal(logits(model, inputs), base)

    gradients = []
    for m in (whole, model):
        m.train_lora("a")
        m(**inputs, labels=inputs["input_ids"]).loss.backward()
        # The slot, which ends the name, differs with what was put when.
        gradients.append({n[:-1]: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 2 * 5
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])

    if place != "cpu":
        with pytest.raises(LoRAUnsupportedError, match="offloaded"):
            model.merge_lora()
    model.remove_lora()
    assert torch.equal(logits(model, inputs), base)
    assert not any("lora" in type(m).__name__.lower() for m in model.modules())


def test_from_pretrained_with_a_device_map(tiny: Any, batch: Any, tmp_path: Any) -> None:
    model = with_adapters(tiny("llama"), {"a": CONFIG})
    inputs = batch(model)
    expected = logits(model, inputs)
    model.save_lora(tmp_path / "adapter")
    tiny("llama").save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(
        tmp_path / "base", device_map=PLACES["last layer on disk"], offload_folder=str(tmp_path / "weights")
    )
    again.load_lora(tmp_path / "adapter")
    assert torch.equal(logits(again, inputs), expected)


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_biases_and_heads_of_an_offloaded_model(tiny: Any, batch: Any, tmp_path: Any, fields: dict[str, Any]) -> None:
    family, targets = ("opt", ["q"]) if "bias" in fields else ("llama", ["q"])
    whole = with_adapters(tiny(family), {"a": LoRAConfig(r=2, target_modules=targets, **fields)})
    whole.save_lora(tmp_path / "adapter")
    inputs = batch(whole)
    expected, base = logits(whole, inputs), logits(tiny(family), inputs)
    model = accelerate.cpu_offload(tiny(family))
    model.add_lora(LoRAConfig(r=2, target_modules=targets, **fields), "new")
    assert torch.equal(logits(model, inputs), base)
    model.load_lora(tmp_path / "adapter", name="a")
    with model.use_lora("a"):
        assert torch.equal(logits(model, inputs), expected)
    model.remove_lora()
    assert torch.equal(logits(model, inputs), base)
