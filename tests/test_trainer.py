"""The stock Trainer, unsubclassed: train, checkpoint, resume, keep the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loras import bits, with_adapters

from hf_lora import LoRAConfig, LoRAFileError, LoRAMismatchError, LoRAStateError

pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")

STEPS = 6


def rows(n: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 64, (n, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    fixed: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    arguments = TrainingArguments(str(folder), **{**fixed, **options})
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(8))


CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": ["q", "v"], "alpha": 8},
    "dropout": {"r": 4, "target_modules": ["q", "v"], "dropout": 0.1},
    "head and biases": {"r": 2, "target_modules": ["q"], "modules_to_save": ["lm_head"], "bias": "all"},
}


def fresh(tiny: Any, case: str) -> Any:
    model = with_adapters(tiny("llama"), {"other": LoRAConfig(r=2, target_modules=["down"])})
    torch.manual_seed(3)
    model.add_lora(LoRAConfig(**CASES[case]), "org/task")
    return model


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("case", CASES)
def test_resuming_is_bit_exact_at_every_checkpoint(tiny: Any, tmp_path: Path, case: str) -> None:
    model = fresh(tiny, case)
    whole = trainer(model, tmp_path / "whole")
    whole.train()
    assert losses(whole)[-1] != losses(whole)[0]
    for step in (2, 4):
        folder = tmp_path / "whole" / f"checkpoint-{step}"
        weights = {p.name for p in folder.iterdir() if "model" in p.name}
        assert weights == {"adapter_model.safetensors"}  # the base is not in a checkpoint
        again = fresh(tiny, case)
        resumed = trainer(again, tmp_path / f"resumed-{step}")
        resumed.train(resume_from_checkpoint=str(folder))
        assert losses(resumed) == losses(whole)
        assert bits(again) == bits(model)


def test_resume_picks_the_newest_checkpoint(tiny: Any, tmp_path: Path) -> None:
    model = fresh(tiny, "plain")
    trainer(model, tmp_path, max_steps=4, lr_scheduler_type="constant").train()
    again = fresh(tiny, "plain")
    trainer(again, tmp_path, lr_scheduler_type="constant").train(resume_from_checkpoint=True)
    uninterrupted = fresh(tiny, "plain")
    trainer(uninterrupted, tmp_path / "other", lr_scheduler_type="constant").train()
    assert bits(again) == bits(uninterrupted)


def test_the_best_is_loaded_where_it_is_not_the_last(tiny: Any, tmp_path: Path) -> None:
    model = fresh(tiny, "plain")
    run = trainer(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls, so the first checkpoint is "best"
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    at_two = fresh(tiny, "plain")
    at_two.load_lora(tmp_path / "checkpoint-2", name="org/task", replace=True, trainable=True)
    found, expected = model.lora_state_dict("org/task"), at_two.lora_state_dict("org/task")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"bf16": True}], ids=str)
def test_options_of_trainer_that_touch_the_layers(tiny: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    from transformers import TrainingArguments

    if "activation_checkpointing" in options and not hasattr(TrainingArguments, "activation_checkpointing"):
        options = {"gradient_checkpointing": True}  # its name before transformers 5.2x
    model = fresh(tiny, "plain")
    before = model.lora_state_dict("org/task")
    run = trainer(model, tmp_path, **options)
    run.train()
    after = model.lora_state_dict("org/task")
    assert all(not torch.equal(after[key], before[key]) for key in after)
    assert all(torch.isfinite(torch.tensor(losses(run))))


def test_a_checkpoint_of_another_adapter_is_refused_and_nothing_is_loaded(tiny: Any, tmp_path: Path) -> None:
    trainer(fresh(tiny, "plain"), tmp_path, max_steps=2).train()
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=2, target_modules=["q", "k"]), "org/task")
    before = bits(model)
    with pytest.raises(LoRAMismatchError, match=r"k_proj: not in the file[\s\S]*rank or slices differ"):
        trainer(model, tmp_path / "out").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert bits(model) == before


def test_a_truncated_checkpoint_is_refused(tiny: Any, tmp_path: Path) -> None:
    trainer(fresh(tiny, "plain"), tmp_path, max_steps=2).train()
    file = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoRAFileError):
        trainer(fresh(tiny, "plain"), tmp_path / "out").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_model_without_a_lora_trains_and_resumes_as_stock(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    trainer(model, tmp_path).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    again = tiny("llama")
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert bits(again) == bits(model)


def test_a_model_on_which_nothing_trains_is_refused(tiny: Any, tmp_path: Path) -> None:
    model = fresh(tiny, "plain")
    model.train_lora([])
    with pytest.raises(LoRAStateError, match=r"Nothing on this LlamaForCausalLM trains[\s\S]*train_lora\('"):
        trainer(model, tmp_path).train()


def test_trainer_has_the_private_methods_that_are_wrapped() -> None:
    """If this fails, transformers changed `Trainer`: resume and load_best of a LoRA need another hook."""
    import inspect

    from transformers import Trainer

    for name, parameters in {
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
        "_load_best_model": ["self"],
    }.items():
        method = inspect.unwrap(getattr(Trainer, name))
        assert list(inspect.signature(method).parameters) == parameters, f"Trainer.{name} has other parameters now"
