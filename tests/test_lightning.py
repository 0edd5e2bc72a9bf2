"""Lightning: a LightningModule around a model with our LoRA; checkpoints of the adapter alone; resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loras import bits

from hf_lora import LoRAConfig, optimizer_groups

lightning = pytest.importorskip("lightning", reason="lightning is not installed: install hf_lora[test]")

IDS = torch.randint(3, 64, (16, 9), generator=torch.Generator().manual_seed(7))


def with_lora(tiny: Any, **options: Any) -> Any:
    model = tiny("llama")
    torch.manual_seed(3)
    model.add_lora(LoRAConfig(r=2, target_modules=["down"]), "other")
    model.add_lora(LoRAConfig(**{"r": 4, "target_modules": ["q", "v"], **options}), "task")
    return model


class Whole(lightning.LightningModule):
    """As Lightning's documentation writes one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.train()  # Lightning leaves modes as they are, and from_pretrained gives eval mode
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        (ids,) = batch
        loss = self.model(input_ids=ids, labels=ids).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(optimizer_groups(self.model, 1e-2, b_lr_ratio=2))
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)}


class Alone(Whole):
    """As the page "Train" writes it: the checkpoint holds what trains, and nothing else may be missing."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rest = {name: tensor for name, tensor in self.state_dict().items() if not self._trains(name)}
        checkpoint["state_dict"] = rest | checkpoint["state_dict"]

    def _trains(self, name: str) -> bool:
        return name in {n for n, parameter in self.named_parameters() if parameter.requires_grad}


def fit(module: Any, folder: Path, epochs: int, trainer: Any = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        **(trainer or {}),
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        enable_checkpointing=False,
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IDS), batch_size=4)
    trainer.fit(module, loader, **options)
    return trainer


@pytest.mark.parametrize("heads", [False, True], ids=["factors", "head and biases"])
@pytest.mark.parametrize("kind", [Whole, Alone])
def test_resuming_is_bit_exact(tiny: Any, tmp_path: Path, kind: Any, heads: bool) -> None:
    more = {"modules_to_save": ["lm_head"], "bias": "all"} if heads else {}
    whole = kind(with_lora(tiny, **more))
    fit(whole, tmp_path, 2)
    half = kind(with_lora(tiny, **more))
    fit(half, tmp_path, 1).save_checkpoint(tmp_path / "half.ckpt")
    again = kind(with_lora(tiny, **more))
    fit(again, tmp_path, 2, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert half.losses + again.losses == whole.losses
    assert len(again.losses) == 4
    assert bits(again.model) == bits(whole.model)


def test_what_a_checkpoint_holds(tiny: Any, tmp_path: Path) -> None:
    found = {}
    for kind in (Whole, Alone):
        module = kind(with_lora(tiny))
        fit(module, tmp_path, 1).save_checkpoint(tmp_path / "a.ckpt")
        found[kind] = torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"].keys()
    assert "model.lm_head.weight" in found[Whole]
    trained = {f"model.{path}" for path, p in module.model.named_parameters() if p.requires_grad}
    assert found[Alone] == trained
    assert len(trained) == 8


def test_a_checkpoint_of_another_adapter_is_refused(tiny: Any, tmp_path: Path) -> None:
    fit(module := Alone(with_lora(tiny)), tmp_path, 1).save_checkpoint(tmp_path / "a.ckpt")
    assert module.losses
    for other in ({"target_modules": ["q", "v", "k"]}, {"target_modules": ["q"]}, {"r": 2}):
        with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key|size mismatch"):
            fit(Alone(with_lora(tiny, **other)), tmp_path, 2, ckpt_path=tmp_path / "a.ckpt", weights_only=False)


@pytest.mark.parametrize("precision", [None, "bf16-mixed"])
def test_factors_stay_float32_on_a_bfloat16_base(tiny: Any, tmp_path: Path, precision: Any) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    model.add_lora(LoRAConfig(r=2, target_modules=["q"]))
    fit(Whole(model), tmp_path, 1, trainer={"precision": precision})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_adapter_of_a_lightning_run_saves_and_loads_as_any(tiny: Any, tmp_path: Path) -> None:
    module = Whole(with_lora(tiny))
    fit(module, tmp_path, 1)
    module.model.save_lora(tmp_path / "adapter", "task")
    other = tiny("llama")
    other.load_lora(tmp_path / "adapter", name="task")
    model = module.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
